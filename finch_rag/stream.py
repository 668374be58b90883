"""An answer that arrives in pieces, to a thread or to an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from .errors import InputError
from .report import Answer, citations, report

if TYPE_CHECKING:
    from .cache import CompressedCache
    from .decode import Decoder
    from .prompt import Passage


class Cancelled(Exception):  # noqa: N818 - not an error: it ends a reading whose answer nobody wants any more
    """The answer was cancelled while the passages were read."""


class Cancellation:
    """Whether an answer is still wanted; any thread may ask and say."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Says that the answer is not wanted any more."""
        self._event.set()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raises `Cancelled` if the answer is not wanted any more."""
        if self:
            raise Cancelled


class AnswerStream(Iterator[str]):
    """Text deltas of an answer; afterwards ``answer`` has the whole of it with citations and report.

    Closing it, leaving its ``with`` block or dropping it ends the generation and frees the cache.

    Args:
        open_cache: Gives the cache that holds the passages; called when the first delta is asked for.
        decoder: Starts the generation on a copy of that cache.
        prompt_tokens: Tokens that the decoder reads before the answer.
        max_new_tokens: The most tokens of the answer.
        cancellation: What ``open_cache`` and ``decoder`` ask at each step.
        passages: What is read.
        parse_mode: How the call's prompt was taken apart, for the report.

    Attributes:
        passages: What is read; a citation's ``index`` is a place in it.
    """

    def __init__(
        self,
        open_cache: Callable[[], CompressedCache],
        decoder: Callable[[CompressedCache], Decoder],
        prompt_tokens: int,
        max_new_tokens: int,
        cancellation: Cancellation,
        passages: Sequence[Passage],
        parse_mode: str,
    ) -> None:
        self.passages = passages
        self._cancellation = cancellation
        self._answers: list[Answer] = []  # the generator holds this list and not the stream, so no cycle keeps a cache
        self._deltas = _answer(open_cache, decoder, prompt_tokens, max_new_tokens, parse_mode, self._answers)

    def __next__(self) -> str:
        return next(self._deltas)

    def read(self) -> Answer:
        """Runs to the end and returns the answer."""
        for _ in self._deltas:
            pass
        return self.answer

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            InputError: If the stream has not come to its end.
        """
        if not self._answers:
            raise InputError("the stream has no answer yet: iterate it to its end first")
        return self._answers[0]

    def cancel(self) -> None:
        """Ends the stream after the chunk or token under way; from any thread, also while another one reads it."""
        self._cancellation.cancel()

    def close(self) -> None:
        """Ends the generation and frees the cache."""
        self._deltas.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _answer(
    open_cache: Callable[[], CompressedCache],
    decoder: Callable[[CompressedCache], Decoder],
    prompt_tokens: int,
    max_new_tokens: int,
    parse_mode: str,
    answers: list[Answer],
) -> Generator[str, None, None]:
    """The deltas of an answer; at the end the answer is put into ``answers``."""
    try:
        cache = open_cache()
    except Cancelled:
        return
    cited = citations(cache, kept_only=True)
    read = replace(report(cache, prompt_tokens), parse_mode=parse_mode)
    started = time.perf_counter()
    seconds = 0.0
    cache = cache.fork(prompt_tokens + max_new_tokens)  # frees the room that reading needed
    running = decoder(cache)
    text = ""
    with closing(iter(running)) as deltas:
        for delta in deltas:
            text += delta
            seconds += time.perf_counter() - started  # not the reader's own time between two deltas
            yield delta
            started = time.perf_counter()
    if running.cancelled:
        return
    seconds += time.perf_counter() - started
    new, reason = len(running.writer.token_ids), running.writer.stop_reason
    answers.append(Answer(text, cited, replace(read, decode_seconds=seconds, new_tokens=new, stop_reason=reason)))


class AsyncAnswerStream(AsyncIterator[str]):
    """An `AnswerStream` for an event loop: each piece is made in a thread, so the loop is never blocked.

    A task that is cancelled while it waits for a piece ends the generation and frees the cache.

    Args:
        open_stream: Starts the answer; called in a thread when the first delta is asked for.
    """

    def __init__(self, open_stream: Callable[[], AnswerStream]) -> None:
        self._open = open_stream
        self._stream: AnswerStream | None = None
        self._cancelled = False
        self._lock = threading.Lock()  # a cancelled task's step may still be under way when the next one begins

    async def __anext__(self) -> str:
        step = asyncio.get_running_loop().run_in_executor(None, contextvars.copy_context().run, self._step)
        try:
            delta = await asyncio.shield(step)
        except asyncio.CancelledError:
            self.cancel()
            step.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody waits for it any more
            raise
        if delta is None:
            raise StopAsyncIteration
        return delta

    def _step(self) -> str | None:
        with self._lock:
            if self._stream is None:
                self._stream = self._open()
                if self._cancelled:  # while it was opened
                    self._stream.cancel()
            return next(self._stream, None)

    async def read(self) -> Answer:
        """Runs to the end and returns the answer."""
        async for _ in self:
            pass
        return self.answer

    @property
    def answer(self) -> Answer:
        """See `AnswerStream.answer`."""
        if self._stream is None:
            raise InputError("the stream has no answer yet: iterate it to its end first")
        return self._stream.answer

    @property
    def passages(self) -> Sequence[Passage]:
        """See `AnswerStream`; empty before the first delta."""
        return self._stream.passages if self._stream is not None else ()

    def cancel(self) -> None:
        """See `AnswerStream.cancel`."""
        self._cancelled = True
        if self._stream is not None:
            self._stream.cancel()

    async def aclose(self) -> None:
        """Ends the generation and frees the cache."""
        self.cancel()
        if self._stream is not None:
            async for _ in self:
                pass
