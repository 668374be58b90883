"""A prompt whose places of context and question are known: frameworks fill in marks there, and nothing is guessed.

The passages are then read apart from the prompt, and the question is the question, whatever the prompt looks like.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from .chat_template import SYSTEM, USER, Message
from .contexts import split_context
from .frames import frame_of_task, words_around
from .known_prompts import IN_ONE_MESSAGE, IN_SYSTEM_MESSAGE
from .parsing import APART, ParsedPrompt, around, known_options
from .task_prompts import MAP_RERANK, TASKS, TASKS_IN_SYSTEM_MESSAGE
from .template import QUESTION, REST, Template, first_match

CONTEXT_MARK = "FinchContextGoesHere"
QUESTION_MARK = "FinchQuestionGoesHere"
_MARKS = (QUESTION_MARK, CONTEXT_MARK)


def kind_of(messages: Sequence[Message]) -> Literal["known", "task", "own"]:
    """Whose words a prompt is made of that was formatted with marks.

    Args:
        messages: With `CONTEXT_MARK` and `QUESTION_MARK`.

    Returns:
        "known" and "task" for the prompts of frameworks that `finch_rag.prompts.parsing` knows, where a task is read
        whole if it fits; "own" for all others.
    """
    *earlier, last = messages
    in_system = [message["content"] for message in earlier if message["role"] == SYSTEM]

    def is_one_of(whole: Iterable[Template], of_system: Iterable[Template]) -> bool:
        return first_match(whole, last["content"]) is not None or any(
            first_match(of_system, text) for text in in_system
        )

    if MAP_RERANK.match(last["content"]) is not None:
        return "task"
    if is_one_of(IN_ONE_MESSAGE, IN_SYSTEM_MESSAGE):
        return "known"
    if is_one_of(TASKS, TASKS_IN_SYSTEM_MESSAGE):
        return "task"
    return "own"


def parse_marked(
    messages: Sequence[Message], question: str | None, instructions: str | None = None, context: str = ""
) -> ParsedPrompt | None:
    """What a prompt asks that was formatted with marks.

    Args:
        messages: With `CONTEXT_MARK` for the context, at least once, and `QUESTION_MARK` for the question, maybe.
        question: The question; None where the prompt's own words ask.
        instructions: The caller's own; they stand before those of the prompt.
        context: The passages as a framework has joined them; empty where the caller has them apart.

    Returns:
        The prompt, with the passages of ``context``; None where it has no mark for them.
    """
    place = next((index for index, message in enumerate(messages) if CONTEXT_MARK in message["content"]), None)
    if place is None:
        return None
    filled = [
        message if index == place else Message(role=message["role"], content=_filled(message["content"], question))
        for index, message in enumerate(messages)
    ]
    parsed = _of_known(filled, place, question, instructions) or _of_own(filled, place, question, instructions)
    split = split_context(context)
    return replace(parsed, passages=split.passages, notes=(*parsed.notes, *split.notes))


def _filled(text: str, question: str | None) -> str:
    return text.replace(QUESTION_MARK, question or "").replace(CONTEXT_MARK, "")


def _of_known(
    messages: Sequence[Message], place: int, question: str | None, instructions: str | None
) -> ParsedPrompt | None:
    *earlier, last = messages
    content = messages[place]["content"]
    if place == len(messages) - 1:
        match = first_match(IN_ONE_MESSAGE, content)
        if match is None or match.context != CONTEXT_MARK or match.field(QUESTION) is None:
            return None
        asked = _filled(match.field(QUESTION) or "", question)
        return around(earlier, known_options(match, ParsedPrompt(asked, [], APART), instructions))
    match = first_match(IN_SYSTEM_MESSAGE, content) if messages[place]["role"] == SYSTEM else None
    if match is None or match.context != CONTEXT_MARK:
        return None
    parsed = known_options(match, ParsedPrompt(last["content"], [], APART), instructions)
    rest = Message(role=SYSTEM, content=_filled(match.field(REST) or "", question))
    return around([*messages[:place], rest, *messages[place + 1 : -1]], parsed)


def _of_own(messages: Sequence[Message], place: int, question: str | None, instructions: str | None) -> ParsedPrompt:
    """A user's own prompt: what stands around the context, without the labels and marks that set it off."""
    *earlier, last = messages
    before, _, after = messages[place]["content"].partition(CONTEXT_MARK)
    if place == len(messages) - 1:
        if question is None:
            frame = frame_of_task(before, after.replace(CONTEXT_MARK, ""))
            words = "\n\n".join(filter(None, (instructions, frame.instructions)))
            return around(earlier, ParsedPrompt(frame.question, [], APART, instructions=words, in_own_words=True))
        words = "\n\n".join(filter(None, (instructions, words_around(before, after, _MARKS))))
        return around(earlier, ParsedPrompt(question, [], APART, instructions=words or None))
    words = words_around(before, after, _MARKS)
    asked = last["content"]
    if question is not None and question not in asked:
        asked = "\n\n".join(filter(None, (asked.strip(), question)))
    role, follows = messages[place]["role"], messages[place + 1]["role"]
    if not words and role == USER and follows != USER:  # the assistant's turn needs one of the user's before it
        words = _filled(f"{before}{after}", question).strip()
    kept = [Message(role=role, content=words)] if words else []
    if kept and role == USER and follows == USER:
        # Two turns of the user in a row: the words are instructions, and many chat templates refuse them.
        own = "\n\n".join(filter(None, (instructions, words)))
        parsed = ParsedPrompt(asked, [], APART, instructions=own)
        return around([*messages[:place], *messages[place + 1 : -1]], parsed)
    parsed = ParsedPrompt(asked, [], APART, instructions=instructions)
    return around([*messages[:place], *kept, *messages[place + 1 : -1]], parsed)
