"""Who answers: all that the HTTP layer asks of an engine, whether that runs its requests one by one or in batches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from ..answer import Answer
from ..errors import FinchError
from ..prompts.chat_template import Message
from ..prompts.passages import Passage
from ..settings import CallOptions


class BusyError(FinchError):
    """As many requests wait as may: this one was not taken.

    Args:
        message: The line for the user.
        retry_after: Seconds after which there may be a place again.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class AnswerPieces(Protocol):
    """An answer on its way, for an event loop. `aclose` must be called, whatever happened before."""

    def __aiter__(self) -> AsyncIterator[str]:
        """The pieces of its text."""

    async def __anext__(self) -> str:
        """The next piece. A task that is cancelled here ends the answer; bad input raises at the first one."""

    @property
    def answer(self) -> Answer:
        """The whole of it, behind the last piece."""

    def cancel(self) -> None:
        """Ends it within one step: a chunk or a token."""

    async def aclose(self) -> None:
        """Ends it, and gives its memory back once the step under way is over."""


class Answers(Protocol):
    """Answers questions, a bounded number of them at once."""

    @property
    def running(self) -> int:
        """Answers that are being made."""

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of the answers that are being made."""

    def ask(self, question: str, passages: Sequence[Passage], options: CallOptions) -> AnswerPieces:
        """The answer to a question, see `finch_rag.Finch.ask`.

        Args:
            question: The question.
            passages: What is read.
            options: Of the call.

        Raises:
            BusyError: At once, if too many wait.
        """

    def chat(
        self, messages: str | Sequence[Message], passages: Sequence[Passage], options: CallOptions
    ) -> AnswerPieces:
        """The answer to a conversation, see `finch_rag.Finch.chat`.

        Args:
            messages: The conversation, or a prompt.
            passages: What is read.
            options: Of the call.

        Raises:
            BusyError: At once, if too many wait.
        """

    async def close(self, timeout: float) -> None:
        """Finishes what runs and waits, and cancels what is left of it then.

        Args:
            timeout: The most seconds to wait.
        """
