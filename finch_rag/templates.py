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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .chat_template import ASSISTANT, SYSTEM, USER, Message
from .contexts import split_context
from .errors import InputError
from .known_prompts import (
    CONDENSE,
    DEFAULT_SYSTEM_PROMPT,
    IN_ONE_MESSAGE,
    IN_SYSTEM_MESSAGE,
    Match,
    first_match,
    last_match,
)
from .prompt import INSTRUCTIONS, Passage

APART = "apart"
WHOLE = "whole"
LAST_PARAGRAPH = "last paragraph"
LONGEST_MESSAGE = "longest message"


@dataclass(frozen=True, slots=True)
class Request:
    """What a prompt asks, taken apart.

    Attributes:
        question: The question.
        passages: What it is asked of; empty where the prompt has no context.
        parse_mode: Name of the template; or "apart" (the caller gave the passages), "whole", "last paragraph",
            "longest message".
        options: Of the call: "history", and "instructions" and "system_prompt" where the prompt has its own.
    """

    question: str
    passages: list[Passage]
    parse_mode: str
    options: dict[str, Any] = field(default_factory=dict)


def take_apart(
    messages: str | Iterable[Message],
    passages: Sequence[Passage],
    are_short: Callable[[Sequence[str]], bool],
    instructions: str | None = None,
) -> Request:
    """Finds question and passages in a conversation, or in a flat prompt.

    Args:
        messages: A prompt, or messages of which the last is the user's.
        passages: Given apart; then the messages are not searched.
        are_short: Whether texts are short enough to be read whole.
        instructions: The caller's own; they stand before those of the prompt. None for Finch's.

    Raises:
        InputError: If the messages cannot be used.
    """
    conversation = [Message(role=USER, content=messages)] if isinstance(messages, str) else _checked(messages)
    *earlier, last = conversation
    question = last["content"]
    if passages:
        return Request(question, list(passages), APART, _options(earlier))
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
    conversation = list(messages)
    for index, message in enumerate(conversation):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in (SYSTEM, USER, ASSISTANT):
            raise InputError(f"message {index} has the role {role!r}: use system, user or assistant")
        if not isinstance(content, str):
            raise InputError(f"message {index} is {type(content).__name__}, not text: pass a str as content")
    if not conversation or conversation[-1]["role"] != USER:
        raise InputError("the last message is not the user's: end the conversation with a question")
    return conversation


def _from_match(
    match: Match, question: str, instructions: str | None, earlier: Sequence[Message], *own: str
) -> Request:
    """A known prompt's request; ``own`` are the user's words around the template's."""
    options = _options([*earlier, *(Message(role=SYSTEM, content=text) for text in own)])
    if match.template.keeps_words:
        words = match.head.rstrip("-\n ")
        options["instructions"] = f"{instructions}\n\n{words}" if instructions else words
    elif answer := match.fields.get("answer"):
        base = INSTRUCTIONS if instructions is None else instructions
        options["instructions"] = (
            f"{base}\n\nAn earlier answer, from other passages, is: {answer}\n"
            "Give a better one if the passages below allow it, else repeat it."
        )
    return Request(question, split_context(match.fields["context"]), match.template.name, options)


_OPENING = "system: "
_USER_LABEL = re.compile(r"\n(?:user|human): ", re.IGNORECASE)
_TURN_LABEL = re.compile(r"\n(user|human|assistant|ai): ", re.IGNORECASE)
_END_LABEL = re.compile(r"\n(?:assistant|ai): *\Z", re.IGNORECASE)


def _from_transcript(earlier: Sequence[Message], prompt: str, instructions: str | None) -> Request | None:
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


def _from_unknown(earlier: Sequence[Message], text: str, are_short: Callable[[Sequence[str]], bool]) -> Request:
    if text.lstrip().startswith(CONDENSE) or are_short([text, *(message["content"] for message in earlier)]):
        return Request(text, [], WHOLE, {"instructions": "", **_options(earlier)})
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
    return Request(question, split_context(context), mode, _options(earlier))


def _options(earlier: Sequence[Message]) -> dict[str, Any]:
    """The options that carry what stands before the last message."""
    options: dict[str, Any] = {}
    if history := [message for message in earlier if message["role"] != SYSTEM]:
        options["history"] = history
    texts = [message["content"].strip() for message in earlier if message["role"] == SYSTEM]
    if own := "\n\n".join(filter(None, (text.removeprefix(DEFAULT_SYSTEM_PROMPT).strip() for text in texts))):
        options["system_prompt"] = own
    return options
