"""Finds passages and question inside the prompts that RAG frameworks make.

A framework formats its passages into one text before a model sees them. Such a prompt is recognised here by the words
that its template puts around the context, and taken apart again, so that passages can be kept or evicted whole:

    a known prompt         context -> passages, query -> question; its wording gives way to Finch's own, but for what
                           asks for more than an answer from the context, and for what the user added
    an unknown short one   read whole, as any model reads it
    an unknown long one    its last paragraph is taken for the question, the others for passages, with a warning

Nothing is guessed silently: ``parse_mode`` in the report names what was done.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

from ..errors import InputError
from .builder import INSTRUCTIONS, refine_instructions
from .chat_template import ASSISTANT, SYSTEM, USER, Message, check_messages
from .contexts import split_context
from .known_prompts import (
    CONDENSE,
    DEFAULT_SYSTEM_PROMPT,
    IN_ONE_MESSAGE,
    IN_SYSTEM_MESSAGE,
    Match,
    first_match,
    last_match,
)
from .passages import Passage, check_unicode

APART = "apart"
WHOLE = "whole"
LAST_PARAGRAPH = "last paragraph"
LONGEST_MESSAGE = "longest message"


class PromptOptions(TypedDict, total=False):
    """Options of a call that a prompt may bring along."""

    instructions: str
    system_prompt: str
    history: list[Message]


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """What a prompt asks, taken apart.

    Attributes:
        question: The question.
        passages: What it is asked of; empty where the prompt has no context.
        parse_mode: Name of the template; or "apart" (the caller gave the passages), "whole", "last paragraph",
            "longest message".
        instructions: The prompt's own; None where it has none.
        system_prompt: The prompt's own; None where it has none.
        history: Earlier messages.
    """

    question: str
    passages: list[Passage]
    parse_mode: str
    instructions: str | None = None
    system_prompt: str | None = None
    history: list[Message] = field(default_factory=list)

    @property
    def options(self) -> PromptOptions:
        """What the prompt has of its own, as options of a call."""
        found = PromptOptions()
        if self.instructions is not None:
            found["instructions"] = self.instructions
        if self.system_prompt is not None:
            found["system_prompt"] = self.system_prompt
        if self.history:
            found["history"] = self.history
        return found


def parse_prompt(
    messages: str | Iterable[Message],
    passages: Sequence[Passage],
    are_short: Callable[[Sequence[str]], bool],
    instructions: str | None = None,
) -> ParsedPrompt:
    """Finds question and passages in a conversation, or in a flat prompt.

    Args:
        messages: A prompt, or messages of which the last is the user's.
        passages: Given apart; then the messages are not searched.
        are_short: Whether texts are short enough to be read whole.
        instructions: The caller's own; they stand before those of the prompt. None for Finch's.

    Raises:
        InputError: If the messages cannot be used.
    """
    if isinstance(messages, str):
        check_unicode(messages, "the prompt")
        conversation = [Message(role=USER, content=messages)]
    else:
        conversation = _checked(messages)
    *earlier, last = conversation
    question = last["content"]
    if passages:
        return _around(earlier, ParsedPrompt(question, list(passages), APART))
    if match := first_match(IN_ONE_MESSAGE, question):
        return _from_match(match, match.fields["question"], instructions, earlier, match.before)
    for place, message in enumerate(earlier):
        if message["role"] == SYSTEM and (match := first_match(IN_SYSTEM_MESSAGE, message["content"])):
            others = [*earlier[:place], *earlier[place + 1 :]]
            return _from_match(match, question, instructions, others, match.before, match.fields.get("rest", ""))
    only_system = all(message["role"] == SYSTEM for message in earlier)
    found = _from_transcript(earlier, question, instructions) if only_system else None
    return found or _from_unknown(earlier, question, are_short)


def _checked(messages: Iterable[Message]) -> list[Message]:
    if not isinstance(messages, Iterable):
        raise InputError(f"messages is {type(messages).__name__}: pass a prompt, or a list of messages")
    conversation = check_messages(messages, (SYSTEM, USER, ASSISTANT), "message")
    if not conversation or conversation[-1]["role"] != USER:
        raise InputError("the last message is not the user's: end the conversation with a question")
    return conversation


def _from_match(
    match: Match, question: str, instructions: str | None, earlier: Sequence[Message], *own: str
) -> ParsedPrompt:
    """What a known prompt asks; ``own`` are the user's words around the template's."""
    parsed = ParsedPrompt(question, split_context(match.fields["context"]), match.template.name)
    if match.template.keeps_words:
        words = match.head.rstrip("-\n ")
        parsed = replace(parsed, instructions=f"{instructions}\n\n{words}" if instructions else words)
    elif answer := match.fields.get("answer"):
        base = INSTRUCTIONS if instructions is None else instructions
        parsed = replace(parsed, instructions=refine_instructions(base, answer))
    return _around([*earlier, *(Message(role=SYSTEM, content=text) for text in own)], parsed)


_OPENING = "system: "
_USER_LABEL = re.compile(r"\n(?:user|human): ", re.IGNORECASE)
_TURN_LABEL = re.compile(r"\n(user|human|assistant|ai): ", re.IGNORECASE)
_END_LABEL = re.compile(r"\n(?:assistant|ai): *\Z", re.IGNORECASE)


def _from_transcript(earlier: Sequence[Message], prompt: str, instructions: str | None) -> ParsedPrompt | None:
    """A conversation written out as "system: ...", "user: ...", as frameworks do for models that cannot chat."""
    label = last_match(_USER_LABEL.finditer(prompt))
    if label is None or prompt[: len(_OPENING)].lower() != _OPENING:
        return None
    match = first_match(IN_SYSTEM_MESSAGE, prompt[: label.start()])
    if match is None:
        return None
    # Turns are looked for behind the context only: the context may hold anything.
    own, *turns = _TURN_LABEL.split(f"\n{match.fields.get('rest', '')}")
    roles = (USER if role.lower() in ("user", "human") else ASSISTANT for role in turns[::2])
    history = [Message(role=role, content=text.strip()) for role, text in zip(roles, turns[1::2], strict=True)]
    question = _END_LABEL.sub("", prompt[label.end() :])
    return _from_match(match, question, instructions, [*earlier, *history], match.before[len(_OPENING) :], own)


_ANSWER_LABEL = re.compile(r"\n[ \t]*\w[\w ]{0,29}:\Z")  # a last line such as "Answer:" asks nothing


def _from_unknown(earlier: Sequence[Message], text: str, are_short: Callable[[Sequence[str]], bool]) -> ParsedPrompt:
    if text.lstrip().startswith(CONDENSE) or are_short([text, *(message["content"] for message in earlier)]):
        return _around(earlier, ParsedPrompt(text, [], WHOLE, instructions=""))
    context, _, question = _ANSWER_LABEL.sub("", text.rstrip()).rpartition("\n\n")
    mode, taken = LAST_PARAGRAPH, "the question, the others for passages"
    longest = max(earlier, key=lambda message: len(message["content"]), default=None)
    if longest is not None and len(longest["content"]) > len(text):
        mode, taken, context, question = LONGEST_MESSAGE, "passages", longest["content"], text
        earlier = [message for message in earlier if message is not longest]
    warnings.warn(
        f"this prompt is of no known template: its {mode} is taken for {taken}; pass the passages apart to be sure",
        stacklevel=2,
    )
    return _around(earlier, ParsedPrompt(question, split_context(context), mode))


def _around(earlier: Sequence[Message], parsed: ParsedPrompt) -> ParsedPrompt:
    """The same with what stands before the last message."""
    texts = [message["content"].strip() for message in earlier if message["role"] == SYSTEM]
    own = "\n\n".join(filter(None, (text.removeprefix(DEFAULT_SYSTEM_PROMPT).strip() for text in texts)))
    history = [message for message in earlier if message["role"] != SYSTEM]
    return replace(parsed, system_prompt=own or None, history=history)
