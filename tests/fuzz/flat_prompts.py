"""Prompts of frameworks taken apart: any text is a prompt, and nothing of it is made up."""

from __future__ import annotations

import re

from finch_rag.prompts.chat_template import ASSISTANT, SYSTEM, USER, Message
from finch_rag.prompts.known_prompts import DEFAULT_SYSTEM_PROMPT, IN_ONE_MESSAGE, IN_SYSTEM_MESSAGE
from finch_rag.prompts.marked import CONTEXT_MARK, QUESTION_MARK, kind_of, parse_marked
from finch_rag.prompts.parsing import ParsedPrompt, parse_prompt
from finch_rag.prompts.passages import Passage
from finch_rag.prompts.task_prompts import MAP_RERANK, TASKS, TASKS_IN_SYSTEM_MESSAGE

from .support import Choices, dictionary, holds, only, text_of

_KNOWN = (*IN_ONE_MESSAGE, *IN_SYSTEM_MESSAGE, *TASKS, *TASKS_IN_SYSTEM_MESSAGE, MAP_RERANK)
_ROLES = (USER, ASSISTANT, SYSTEM)
_PARTS = re.split(r"\{\w+\}", "{x}".join(template.pattern for template in _KNOWN))
WORDS = (
    *("\n", "\n\n", " ", ". ", ": ", "---", "------------", "?", "# ", "['", "']", "\\n"),
    *("Source 1:\n", "Source 2:\n", "file_name: a.md\n", "page: 3\n", "Answer:", "Question: ", CONTEXT_MARK),
    *("system: ", "\nuser: ", "\nassistant: ", QUESTION_MARK, DEFAULT_SYSTEM_PROMPT),
    *dict.fromkeys(filter(None, _PARTS)),
)
DICTIONARY = dictionary(WORDS)


class _Words:
    """A window that is counted in words."""

    def __init__(self, window: int) -> None:
        self.window = window

    def tokens(self, text: str) -> int:
        return len(text.split())

    def holds(self, parsed: ParsedPrompt) -> bool:
        texts = [parsed.question, parsed.instructions or "", parsed.system_prompt or ""]
        texts += [passage.text for passage in parsed.passages]
        texts += [message["content"] for message in (*parsed.history, *parsed.following)]
        return self.tokens(" ".join(texts)) <= self.window


def seeds() -> list[bytes]:
    """A prompt of each known template, long and short."""
    found = []
    for template in _KNOWN:
        filled = re.sub(r"\{context\}", "Source 1:\nThe bridge is old.\n\nSource 2:\nIt is long.", template.pattern)
        filled = re.sub(r"\{(?:question|answer)\}", "Who built it?", filled)
        filled = re.sub(r"\{\w+\}", "", filled)
        found += [bytes((0, window, 0)) + filled.encode() for window in (0, 1)]
        found.append(b"\x01\x00\x01\x02" + filled.encode() + b"\x00\x00Who built it?")
    return found


def check(data: bytes) -> None:
    """Options, then a prompt, or messages with their roles."""
    choices = Choices(data)
    as_messages, window, strict = choices.number(2), choices.one_of((5, 20, 60, 200, 1000)), choices.number(2)
    given = [Passage("The bridge is old.")] if choices.number(8) == 7 else []
    instructions = "Answer." if strict and window == 20 else None
    messages: list[Message] = []
    for part in choices.rest().split(b"\0"):
        role = _ROLES[part[0] % len(_ROLES)] if part and as_messages else USER
        messages.append(Message(role=role, content=text_of(part[1:] if as_messages else part, WORDS)))
    asked = messages if as_messages else messages[0]["content"]
    with only():
        parsed = parse_prompt(asked, given, _Words(window), instructions, bool(strict))
        _check_parsed(parsed, messages, given)
    if as_messages:
        with only():
            kind_of(messages)
            parse_marked(messages, "who built it?" if strict else None, instructions, messages[0]["content"])


def _check_parsed(parsed: ParsedPrompt, messages: list[Message], given: list[Passage]) -> None:
    said = "\n".join(message["content"] for message in messages)
    if given:
        holds(parsed.passages == given, "passages that were given apart were changed")
    elif not re.search(r"""\[['"]""", said):  # a list as Python writes it, whose escapes are undone
        for passage in parsed.passages:
            for line in passage.text.split("\n"):  # several system messages are joined
                holds(line.strip() in said, f"{line!r} of a passage stands in no message")
            holds(bool(passage.text.strip()), "a passage is empty")
    if parsed.parse_mode == "whole":
        asked = (*(message["content"] for message in messages), "\n\n".join(m["content"] for m in messages))
        holds(parsed.question in asked, "the question is another one")
