"""Where passages come from: the field ``documents``, and parts of messages."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..prompts.passages import Passage
from .errors import refused

_TEXT_FIELDS = ("text", "snippet", "content")  # where a document has its text, the first that is there


class Document(BaseModel):
    """A passage. Its text stands in ``text`` or ``snippet``, here or in ``data``; other fields are left aside.

    Attributes:
        id: Handed back in citations.
        title: Read before the text, and handed back.
        text: The text.
        snippet: The same, as Cohere calls it.
        url: Handed back in citations.
        score: The retriever's, the higher the better.
        data: Title and text, as in Cohere's second version; or the text.
    """

    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=True)

    id: str | None = None
    title: str | None = None
    text: str | None = None
    snippet: str | None = None
    url: str | None = None
    score: float | None = Field(default=None, allow_inf_nan=False)
    data: dict[str, Any] | str | None = None


Documents = list[str | Document]


def passages_of(documents: Sequence[str | Document], where: str = "documents") -> list[Passage]:
    """Documents as passages.

    Args:
        documents: Texts or objects.
        where: What to call them in messages.

    Raises:
        ApiError: 400, if one has no text; the message has its place.
    """
    return [passage_of(document, f"{where}.{place}") for place, document in enumerate(documents)]


def passage_of(document: str | Document, where: str) -> Passage:
    """A document as a passage.

    Args:
        document: A text or an object.
        where: What to call it in messages.

    Raises:
        ApiError: 400, if it has no text.
    """
    if isinstance(document, str):
        return Passage(document)
    fields = document.model_dump(exclude={"data"}, exclude_none=True)
    fields |= document.data if isinstance(document.data, dict) else {"text": document.data} if document.data else {}
    text = next((fields[name] for name in _TEXT_FIELDS if isinstance(fields.get(name), str)), None)
    if text is None:
        raise refused(f"{where} has no text: pass a str, or an object with id, title and text", where)
    title, url = (fields[name] if isinstance(fields.get(name), str) else None for name in ("title", "url"))
    return Passage(text, document.id, title, {"url": url} if url else {}, document.score)


def passage_of_part(part: Mapping[str, Any], where: str) -> Passage:
    """A part of a message of type "document" or "file" as a passage.

    A document has its fields in the part itself, in ``document``, or in ``source`` with ``data``; a file has them in
    ``file``, with ``file_data`` as a data URL of text, or its ``text``.

    Args:
        part: The part.
        where: What to call it in messages.

    Raises:
        ApiError: 400, if it has no text.
    """
    inner = part.get(str(part.get("type")))
    fields = {**part, **inner} if isinstance(inner, Mapping) else dict(part)
    source = fields.get("source")
    if isinstance(source, Mapping) and source.get("type") == "text":
        fields["text"] = source.get("data")
    if isinstance(file_data := fields.get("file_data"), str):
        fields["text"] = _text_of_file(file_data, where)
    known = {name: fields.get(name) for name in ("id", "title", "url", "text", "snippet")}
    known["id"] = known["id"] or fields.get("filename")
    if wrong := [name for name, value in known.items() if value is not None and not isinstance(value, str)]:
        raise refused(f"{where}.{wrong[0]} is {type(known[wrong[0]]).__name__}, not text: pass a str", where)
    data = fields.get("data")
    return passage_of(Document(**known, data=data if isinstance(data, (str, dict)) else None), where)


def _text_of_file(file_data: str, where: str) -> str:
    head, comma, encoded = file_data.partition(",")
    if not comma or not head.startswith("data:text/") or not head.endswith(";base64"):
        raise refused(f"{where} is no text file: pass file_data as data:text/plain;base64,... or its text", where)
    try:
        return base64.b64decode(encoded, validate=True).decode("utf-8")
    except ValueError:  # no base64, no ASCII, or no UTF-8
        raise refused(f"{where} is not base64 of UTF-8 text: encode it so, or pass its text", where) from None
