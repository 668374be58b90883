"""Finds passages and question inside the prompts that RAG frameworks make.

A framework formats its passages into one text before a model sees them. Such a prompt is recognised here by the words
that its template puts around the context, and taken apart again, so that passages can be kept or evicted whole:

    a known prompt       context -> passages, query -> question; the framework's wording gives way to Finch's own, but
                         for what asks for more than an answer from the context, and for what the user wrote
    any other that fits  read whole, as any model reads it
    a known task         (summarise, grade, extract) over a text that does not fit: its words are kept, the text is
                         what may be evicted
    an unknown long one  its ends are kept, what stands between them may be evicted, with a warning

A template counts only where it frames the whole message, so that no passage can take over. Nothing is guessed silently:
``parse_mode`` and ``notes`` of the report say what was done.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..errors import InputError
from .builder import INSTRUCTIONS, refine_instructions
from .chat_template import ASSISTANT, SYSTEM, USER, Message, check_messages
from .contexts import split_context
from .frames import frame_of_task
from .known_prompts import DEFAULT_SYSTEM_PROMPT, IN_ONE_MESSAGE, IN_SYSTEM_MESSAGE
from .passages import Passage, check_unicode
from .task_prompts import MAP_RERANK, TASKS, TASKS_IN_SYSTEM_MESSAGE
from .template import ANSWER, QUESTION, REST, Match, first_match, last_match
from .unknown import Parts, parts_of

APART = "apart"
WHOLE = "whole"
KEPT_ENDS = "kept ends"

_ENDS = 8  # of the window, each end of an unknown long prompt may take this part
_SHOWN = 80  # characters of a question in a warning
_SHORT = 100  # characters: a shorter paragraph at an open border may be the user's instruction


class Room(Protocol):
    """What a model reads in one call."""

    def holds(self, parsed: ParsedPrompt) -> bool:
        """Whether a prompt fits into the window, answer included, with nothing evicted but older turns."""

    def tokens(self, text: str) -> int:
        """Counts the tokens of a text."""

    @property
    def window(self) -> int:
        """Positions of the model."""


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """What a prompt asks, taken apart.

    Attributes:
        question: The question.
        passages: What it is asked of; empty where the prompt has no context.
        parse_mode: Name of the template; or "apart" (the caller gave the passages), "whole", "kept ends".
        instructions: The prompt's own; None where it has none.
        system_prompt: The prompt's own; None where it has none.
        history: Earlier messages.
        following: The assistant's messages behind the question.
        in_own_words: The question brings all words that it needs, so that none are put around it.
        keeps_all: Nothing may be evicted: a passage may be the user's instruction.
        notes: What else the report should say.
    """

    question: str
    passages: list[Passage]
    parse_mode: str
    instructions: str | None = None
    system_prompt: str | None = None
    history: list[Message] = field(default_factory=list)
    following: list[Message] = field(default_factory=list)
    in_own_words: bool = False
    keeps_all: bool = False
    notes: tuple[str, ...] = ()


def parse_prompt(
    messages: str | Iterable[Message],
    passages: Sequence[Passage],
    room: Room,
    instructions: str | None = None,
    strict: bool = False,
) -> ParsedPrompt:
    """Finds question and passages in a conversation, or in a flat prompt.

    Args:
        messages: A prompt, or messages, of which the user's last asks; the assistant's behind it stay there. Where all
            are system messages, they ask.
        passages: Given apart; then the messages are not searched.
        room: What the model reads in one call.
        instructions: The caller's own; they stand before those of the prompt. None for Finch's.
        strict: Raise where a prompt would have to be guessed at.

    Raises:
        InputError: If the messages cannot be used, or with ``strict``, if an unknown prompt does not fit.
    """
    if isinstance(messages, str):
        check_unicode(messages, "the prompt")
        return _parsed([], messages, passages, room, instructions, strict)
    earlier, question, following = _asked(messages)
    parsed = _parsed(earlier, question, passages, _RoomBehind(room, following), instructions, strict)
    return replace(parsed, following=following)


@dataclass(frozen=True, slots=True)
class _RoomBehind:
    """The room of a model that also reads what follows the question."""

    room: Room
    following: list[Message]

    def holds(self, parsed: ParsedPrompt) -> bool:
        return self.room.holds(replace(parsed, following=self.following))

    def tokens(self, text: str) -> int:
        return self.room.tokens(text)

    @property
    def window(self) -> int:
        return self.room.window


def _parsed(
    earlier: list[Message],
    question: str,
    passages: Sequence[Passage],
    room: Room,
    instructions: str | None,
    strict: bool,
) -> ParsedPrompt:
    if passages:
        return around(earlier, ParsedPrompt(question, list(passages), APART))
    if MAP_RERANK.match(question) is None and (match := first_match(IN_ONE_MESSAGE, question)):
        return _from_match(match, match.field(QUESTION) or "", room, instructions, earlier)
    for place, message in enumerate(earlier):
        if message["role"] == SYSTEM and (match := first_match(IN_SYSTEM_MESSAGE, message["content"])):
            others = [*earlier[:place], *earlier[place + 1 :]]
            return _from_match(match, question, room, instructions, others, match.field(REST) or "")
    only_system = all(message["role"] == SYSTEM for message in earlier)
    found = _from_transcript(earlier, question, room, instructions) if only_system else None
    if found is not None:
        return found
    whole = around(earlier, ParsedPrompt(question, [], WHOLE, instructions=instructions or "", in_own_words=True))
    if room.holds(whole):
        return whole
    task = _from_task(earlier, question, instructions)
    if task is not None and room.holds(replace(task, passages=[])):
        return task
    return _from_unknown(whole, room, strict)


def _asked(messages: Iterable[Message]) -> tuple[list[Message], str, list[Message]]:
    """The messages before the question, the question, and the assistant's messages behind it."""
    if not isinstance(messages, Iterable):
        raise InputError(f"messages is {type(messages).__name__}: pass a prompt, or a list of messages")
    conversation = check_messages(messages, (SYSTEM, USER, ASSISTANT), "message")
    if not conversation:
        raise InputError("there are no messages: end the conversation with a question")
    if all(message["role"] == SYSTEM for message in conversation):
        return [], "\n\n".join(message["content"] for message in conversation), []
    place = max((place for place, message in enumerate(conversation) if message["role"] == USER), default=None)
    if place is None:
        raise InputError("no message is the user's: end the conversation with a question")
    behind = conversation[place + 1 :]
    earlier = [*conversation[:place], *(message for message in behind if message["role"] == SYSTEM)]
    return earlier, conversation[place]["content"], [message for message in behind if message["role"] == ASSISTANT]


def _from_match(
    match: Match,
    question: str,
    room: Room,
    instructions: str | None,
    earlier: Sequence[Message],
    *own: str,
) -> ParsedPrompt:
    """What a known prompt asks; ``own`` are the user's words around the template's."""
    split = split_context(match.context)
    parsed = ParsedPrompt(question, split.passages, match.template.name, notes=split.notes)
    parsed = known_options(match, parsed, instructions)
    parsed = around([*earlier, *(Message(role=SYSTEM, content=text) for text in own)], parsed)
    return _at_open_borders(match, parsed, room, INSTRUCTIONS if instructions is None else instructions)


def known_options(match: Match, parsed: ParsedPrompt, instructions: str | None) -> ParsedPrompt:
    """The same with what a known prompt says beside context and question.

    Args:
        match: The prompt.
        parsed: Its question and passages.
        instructions: The caller's own.
    """
    base = INSTRUCTIONS if instructions is None else instructions
    if match.template.keeps_words:
        words = match.before.strip().rstrip("-\n ")
        return replace(parsed, instructions=f"{instructions}\n\n{words}" if instructions else words)
    if answer := match.field(ANSWER):
        parsed = replace(parsed, instructions=refine_instructions(base, answer))
    if match.own_words:
        parsed = replace(parsed, instructions=f"{parsed.instructions or base}\n\n{match.own_words}")
    return parsed


def _at_open_borders(match: Match, parsed: ParsedPrompt, room: Room, base: str) -> ParsedPrompt:
    """The same where a short first or last paragraph may be an instruction that the user put there.

    Then nothing is evicted, if all of it fits; else such a paragraph is read with the instructions.
    """
    passages = parsed.passages
    borders = {0: match.template.open_start, len(passages) - 1: match.template.open_end}
    doubtful = [place for place, is_open in borders.items() if is_open and _is_short(passages, place)]
    if not doubtful:
        return parsed
    kept = replace(parsed, keeps_all=True)
    if room.holds(kept):
        return replace(kept, notes=(*parsed.notes, "a short paragraph may be an instruction: nothing was evicted"))
    words = "\n\n".join(passages[place].text for place in doubtful)
    return replace(
        parsed,
        passages=[passage for place, passage in enumerate(passages) if place not in doubtful],
        instructions=f"{parsed.instructions or base}\n\n{words}",
        notes=(*parsed.notes, f"{len(doubtful)} short paragraph(s) may be instructions: read as such"),
    )


def _is_short(passages: Sequence[Passage], place: int) -> bool:
    return 0 <= place < len(passages) and len(passages[place].text) < _SHORT


_OPENING = "system: "
_USER_LABEL = re.compile(r"\n(?:user|human): ", re.IGNORECASE)
_TURN_LABEL = re.compile(r"\n(user|human|assistant|ai): ", re.IGNORECASE)
_END_LABEL = re.compile(r"\n(?:assistant|ai): *\Z", re.IGNORECASE)


def _from_transcript(
    earlier: Sequence[Message], prompt: str, room: Room, instructions: str | None
) -> ParsedPrompt | None:
    """A conversation written out as "system: ...", "user: ...", as frameworks do for models that cannot chat."""
    label = last_match(_USER_LABEL.finditer(prompt))
    if label is None or prompt[: len(_OPENING)].lower() != _OPENING:
        return None
    match = first_match(IN_SYSTEM_MESSAGE, prompt[len(_OPENING) : label.start()])
    if match is None:
        return None
    # Turns are looked for behind the context only: the context may hold anything.
    own, *turns = _TURN_LABEL.split(f"\n{match.field(REST) or ''}")
    roles = (USER if role.lower() in ("user", "human") else ASSISTANT for role in turns[::2])
    history = [Message(role=role, content=text.strip()) for role, text in zip(roles, turns[1::2], strict=True)]
    question = _END_LABEL.sub("", prompt[label.end() :])
    return _from_match(match, question, room, instructions, [*earlier, *history], own)


def _from_task(earlier: Sequence[Message], question: str, instructions: str | None) -> ParsedPrompt | None:
    """A known task over a text that does not fit: all its words are kept."""
    if match := first_match((*TASKS, MAP_RERANK), question):
        others = list(earlier)
        words, asked = frame_of_task(match.before, match.after)
    else:
        in_system = ((place, _system_task(message)) for place, message in enumerate(earlier))
        place, match = next((found for found in in_system if found[1] is not None), (0, None))
        if match is None:
            return None
        others = [*earlier[:place], *earlier[place + 1 :]]
        words, asked = match.before.strip().rstrip("_\n "), question
    split = split_context(match.context)
    parsed = ParsedPrompt(
        asked,
        split.passages,
        match.template.name,
        instructions="\n\n".join(filter(None, (instructions, words))),
        in_own_words=True,
        notes=split.notes,
    )
    return around(others, parsed)


def _system_task(message: Message) -> Match | None:
    return first_match(TASKS_IN_SYSTEM_MESSAGE, message["content"]) if message["role"] == SYSTEM else None


def _from_unknown(whole: ParsedPrompt, room: Room, strict: bool) -> ParsedPrompt:
    """A prompt that does not fit and is of no known template; earlier turns are no part of it."""
    in_system = len(whole.system_prompt or "") > len(whole.question)
    text = (whole.system_prompt or "") if in_system else whole.question
    parts = parts_of(text, room.tokens, room.window // _ENDS)
    split = split_context(parts.middle)
    parsed = replace(
        whole,
        question=_with_system_tail(whole.question, parts) if in_system else parts.tail,
        passages=split.passages,
        parse_mode=KEPT_ENDS,
        notes=split.notes,
    )
    if in_system:
        parsed = replace(parsed, system_prompt=parts.head or None)
    else:
        parsed = replace(parsed, instructions="\n\n".join(filter(None, (whole.instructions, parts.head))))
    if not parsed.passages or not room.holds(replace(parsed, passages=[])):
        return whole  # it is not the text that is too long; who reads it says what is
    shown = " ".join((whole.question if in_system else parts.asks).split())
    shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN // 2]} ... {shown[-_SHOWN // 2 :]}"
    message = (
        f"this {'system message' if in_system else 'prompt'} of {len(text)} characters is of no known template and "
        f"does not fit into the window of {room.window} tokens: {shown!r} is taken as the question, and what stands "
        "between the text's ends may be left out; pass the passages apart to be sure"
    )
    if strict:
        raise InputError(message)
    warnings.warn(message, stacklevel=2)
    return parsed


def _with_system_tail(question: str, parts: Parts) -> str:
    """A system message's end stands behind the passages, before the question that the user's message asks."""
    return f"{parts.tail}\n\n{question}" if parts.tail else question


def around(earlier: Sequence[Message], parsed: ParsedPrompt) -> ParsedPrompt:
    """The same with what stands before the last message.

    Args:
        earlier: All messages but the last.
        parsed: What the last one asks.
    """
    texts = [message["content"].strip() for message in earlier if message["role"] == SYSTEM]
    # What says no more than Finch's own prompt gives way where Finch's own stands.
    given_way = "" if parsed.in_own_words else DEFAULT_SYSTEM_PROMPT
    own = "\n\n".join(filter(None, (text.removeprefix(given_way).strip() for text in texts)))
    history = [message for message in earlier if message["role"] != SYSTEM]
    return replace(parsed, system_prompt=own or None, history=history)
