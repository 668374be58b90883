"""Messages of a request as the engine takes them, and the passages among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..prompts.chat_template import ASSISTANT, SYSTEM, USER, Message
from ..prompts.passages import Passage
from .documents import passage_of_part
from .errors import refused

_ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "assistant": ASSISTANT}
_TEXT_PARTS = ("text", "input_text", "output_text")
_DOCUMENT_PARTS = ("document", "file", "input_file")


class ChatMessage(BaseModel):
    """A message.

    Attributes:
        role: "system", "developer", "user" or "assistant".
        content: Its text, or parts of type "text", "document" and "file".
    """

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is asked.

    Attributes:
        messages: System messages as they stand, others merged with neighbours of the same role.
        passages: That were found in parts.
    """

    messages: list[Message]
    passages: list[Passage]

    def apart(self) -> tuple[str, list[Message], str | None]:
        """The question, the messages before it, and the system prompt; for a call that asks a whole store.

        Raises:
            ApiError: 400, if the user's message is not the last.
        """
        system = [message["content"] for message in self.messages if message["role"] == SYSTEM]
        turns = [message for message in self.messages if message["role"] != SYSTEM]
        if not turns or turns[-1]["role"] != USER:
            raise refused("the last message is not the user's: a store is asked by the user's last message", "messages")
        return turns[-1]["content"], turns[:-1], "\n\n".join(system) or None


def conversation_of(messages: Sequence[ChatMessage]) -> Conversation:
    """Messages taken apart.

    Args:
        messages: Of a request.

    Raises:
        ApiError: 400, if one has a role or a part that cannot be read; the message has its place.
    """
    if not messages:
        raise refused("messages is empty: end the conversation with a question", "messages")
    turns: list[Message] = []
    passages: list[Passage] = []
    for place, message in enumerate(messages):
        where = f"messages.{place}"
        if message.role not in _ROLES:
            raise refused(
                f"{where}.role is {message.role[:40]!r}: use system, developer, user or assistant; what a tool found "
                "goes into documents",
                f"{where}.role",
            )
        role, (text, found) = _ROLES[message.role], _content(message.content, f"{where}.content")
        passages += found
        if not text.strip() and (found or role != USER):
            continue  # it held documents only, or nothing
        if turns and turns[-1]["role"] == role != SYSTEM:
            text = f"{turns.pop()['content']}\n\n{text}"
        turns.append(Message(role=role, content=text))
    return Conversation(turns, passages)


def _content(content: str | Sequence[dict[str, Any]] | None, where: str) -> tuple[str, list[Passage]]:
    if content is None or isinstance(content, str):
        return content or "", []
    texts: list[str] = []
    passages: list[Passage] = []
    for place, part in enumerate(content):
        own, kind = f"{where}.{place}", part.get("type")
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in _DOCUMENT_PARTS:
            passages.append(passage_of_part(part, own))
        else:
            raise refused(
                f"{own} is a part of type {str(kind)[:40]!r} that cannot be read: use text, document or file with text",
                own,
            )
    return "\n".join(texts), passages
