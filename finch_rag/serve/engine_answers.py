"""Answers of an engine, each a stream of its own."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Sequence

from ..answer import Answer
from ..engine import Finch
from ..prompts.chat_template import Message
from ..prompts.passages import Passage
from ..settings import CallOptions
from ..streaming import AnswerStream, AsyncAnswerStream
from .places import Place, Places

_LAST_STEP = 5.0  # seconds that cancelled answers get to end their step


class EngineAnswers:
    """Runs streams of an engine side by side; see `finch_rag.serve.answers.Answers`.

    Args:
        finch: The engine.
        running: The most answers at once.
        waiting: The most requests that wait.
    """

    def __init__(self, finch: Finch, *, running: int, waiting: int) -> None:
        self._finch = finch
        self._places = Places(running, waiting, "answers")
        self._alive: weakref.WeakSet[EnginePieces] = weakref.WeakSet()

    @property
    def running(self) -> int:
        """Answers that are being made."""
        return self._places.running

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return self._places.waiting

    def ask(self, question: str, passages: Sequence[Passage], options: CallOptions) -> EnginePieces:
        """The answer to a question.

        Args:
            question: The question.
            passages: What is read.
            options: Of the call.

        Raises:
            BusyError: If too many wait.
        """
        return self._pieces(lambda: self._finch.stream(question, passages, **options))

    def chat(
        self, messages: str | Sequence[Message], passages: Sequence[Passage], options: CallOptions
    ) -> EnginePieces:
        """The answer to a conversation.

        Args:
            messages: The conversation, or a prompt.
            passages: What is read.
            options: Of the call.

        Raises:
            BusyError: If too many wait.
        """
        return self._pieces(lambda: self._finch.stream_chat(messages, passages, **options))

    def _pieces(self, open_stream: Callable[[], AnswerStream]) -> EnginePieces:
        pieces = EnginePieces(self._places.admit(), AsyncAnswerStream(open_stream))
        self._alive.add(pieces)
        return pieces

    async def close(self, timeout: float) -> None:
        """Finishes what runs and waits, and cancels what is left of it then.

        Args:
            timeout: The most seconds to wait.
        """
        for seconds in (timeout, _LAST_STEP):
            try:
                async with asyncio.timeout(seconds):
                    await self._places.emptied()
                return
            except TimeoutError:
                for pieces in list(self._alive):
                    pieces.cancel()


class EnginePieces(AsyncIterator[str]):
    """A stream that begins when its turn comes; see `finch_rag.serve.answers.AnswerPieces`.

    Args:
        place: Where it waits and runs.
        stream: The answer, not yet begun.
    """

    def __init__(self, place: Place, stream: AsyncAnswerStream) -> None:
        self._place, self._stream = place, stream

    async def __anext__(self) -> str:
        if not await self._place.turn():
            raise StopAsyncIteration
        return await anext(self._stream)

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            InputError: If it has not come to its end.
        """
        return self._stream.answer

    def cancel(self) -> None:
        """Ends it within one step; at once where it waits."""
        self._stream.cancel()
        if self._place.started is None:
            self._place.leave()

    async def aclose(self) -> None:
        """Ends it, and leaves its place once the step under way is over."""
        try:
            await self._stream.aclose()
        finally:
            self._place.leave()
