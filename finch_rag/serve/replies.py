"""Answers as OpenAI's responses: whole, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from ..answer import Answer, CompressionReport
from ..prompts.passages import Passage
from .citations import Cited


def usage_of(answer: Answer, cited: Cited, report: bool) -> dict[str, Any]:
    """Tokens of a call; ``finch`` has what OpenAI has no words for.

    Args:
        answer: The answer.
        cited: Its citations.
        report: Whether to add the report.
    """
    figures = answer.report
    read = prompt_tokens(figures)
    finch = {
        "context_tokens": figures.context_tokens,
        "kept_tokens": figures.kept_tokens,
        "stop_reason": figures.stop_reason,
        "support": answer.support,
        "documents": cited.documents(),
        "citations": cited.citations(),
        **({"report": figures.to_dict()} if report else {}),
    }
    return {
        "prompt_tokens": read,
        "completion_tokens": figures.new_tokens,
        "total_tokens": read + figures.new_tokens,
        "prompt_tokens_details": {"cached_tokens": figures.known_tokens},
        "finch": finch,
    }


def prompt_tokens(figures: CompressionReport) -> int:
    """All tokens that a call read.

    Args:
        figures: Of the call.
    """
    return figures.prefix_tokens + figures.context_tokens + figures.question_tokens


class Reply(ABC):
    """How one answer is told, whole or in the chunks of a stream.

    Args:
        model: The model's name.
        passages: That the request brought.
        report: Whether the usage has the report.

    Attributes:
        last_event: What ends a stream, behind the last chunk.
    """

    prefix: str
    last_event = "[DONE]"

    def __init__(self, model: str, passages: Sequence[Passage], report: bool) -> None:
        self._model, self._passages, self._report = model, passages, report
        self._id, self._created = f"{self.prefix}{uuid.uuid4().hex}", int(time.time())

    @abstractmethod
    def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer in one piece.

        Args:
            answer: The answer.
        """

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the text."""

    @abstractmethod
    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of the text.

        Args:
            text: The piece.
        """

    @abstractmethod
    def ending(self, answer: Answer, include_usage: bool) -> list[dict[str, Any]]:
        """The chunks behind the text: why it ended, its citations, and its tokens.

        Args:
            answer: The whole answer.
            include_usage: Whether the tokens are asked for.
        """

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        """The chunk that says what went wrong on the way.

        Args:
            error: The body of the error.
        """
        return error

    def _cited(self, answer: Answer) -> Cited:
        return Cited(answer, self._passages)


class CompletionReply(Reply):
    """An answer as the one choice of a completion."""

    whole_kind: str
    chunk_kind: str

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer in one piece.

        Args:
            answer: The answer.
        """
        cited = self._cited(answer)
        choice = {**_ended(answer), **self._whole(answer.text, _cites(cited))}
        return {**self._about(self.whole_kind, [choice]), "usage": usage_of(answer, cited, self._report)}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the text."""
        return []

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of the text.

        Args:
            text: The piece.
        """
        return self._chunk(self._piece(text))

    def ending(self, answer: Answer, include_usage: bool) -> list[dict[str, Any]]:
        """The last chunk with a choice, and one with the tokens.

        Args:
            answer: The whole answer.
            include_usage: Whether the tokens are asked for.
        """
        cited = self._cited(answer)
        chunks = [self._chunk({**self._last(_cites(cited)), **_ended(answer)})]
        if include_usage:
            chunks.append({**self._about(self.chunk_kind, []), "usage": usage_of(answer, cited, self._report)})
        return chunks

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._about(self.chunk_kind, [{"index": 0, "logprobs": None, "finish_reason": None, **choice}])

    def _about(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return {**about, "system_fingerprint": None, "choices": choices}

    @abstractmethod
    def _whole(self, text: str, cites: dict[str, Any]) -> dict[str, Any]: ...

    @abstractmethod
    def _piece(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _last(self, cites: dict[str, Any]) -> dict[str, Any]: ...


class ChatReply(CompletionReply):
    """A message of the assistant; citations are part of it, or of the last delta."""

    whole_kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def opening(self) -> list[dict[str, Any]]:
        """The chunk that names the role."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})]

    def _whole(self, text: str, cites: dict[str, Any]) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None, **cites}}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _last(self, cites: dict[str, Any]) -> dict[str, Any]:
        return {"delta": cites}


class TextReply(CompletionReply):
    """A text; citations stand beside it."""

    whole_kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def _whole(self, text: str, cites: dict[str, Any]) -> dict[str, Any]:
        return {"text": text, **cites}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _last(self, cites: dict[str, Any]) -> dict[str, Any]:
        return {"text": "", **cites}


def _cites(cited: Cited) -> dict[str, Any]:
    return {"annotations": cited.annotations(), "citations": cited.citations()}


def _ended(answer: Answer) -> dict[str, Any]:
    reason = "length" if answer.report.stop_reason == "length" else "stop"
    return {"index": 0, "logprobs": None, "finish_reason": reason}
