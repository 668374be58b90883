"""An answer that arrives in pieces, to a thread or to an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import closing
from types import TracebackType
from typing import TypeVar

from .answer import Answer
from .answering import Begun
from .errors import InputError
from .models.forward import memory_guard
from .models.kept_cache import KeptCache
from .models.processes import Uncopied
from .prompts.passages import Passage
from .quotes.support import finished
from .reading import read_request
from .request import Cancelled, Request
from .runtime import Runtime

Result = TypeVar("Result")


class AnswerStream(Uncopied, Iterator[str]):
    """Text deltas of an answer; afterwards ``answer`` has the whole of it with citations and report.

    Closing it, leaving its ``with`` block or dropping it ends the generation and frees the cache. Threads may share it:
    one of them reads at a time.

    Args:
        runtime: Executes the request.
        request: What is asked.
        cache: Holds the passages; they are read when the first delta is asked for when None.

    Attributes:
        request: What is asked.
        passages: What is read; a citation's ``index`` is a place in it.
    """

    def __init__(self, runtime: Runtime, request: Request, cache: KeptCache | None = None) -> None:
        self.request = request
        self.passages: Sequence[Passage] = request.passages
        self._cancellation = request.cancellation
        self._lock = threading.RLock()
        self._answers: list[Answer] = []  # the generator holds this list and not the stream, so no cycle keeps a cache
        self._deltas = _answer(runtime, request, cache, self._answers)

    def __next__(self) -> str:
        with self._lock:
            if _is_running(self._deltas):  # by this thread, which holds the lock
                raise InputError("the stream is asked for a piece by a callback of its own reading: ask outside of it")
            return next(self._deltas)

    def read(self) -> Answer:
        """Runs to the end and returns the answer."""
        for _ in self:
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
        """Ends the generation and frees the cache; waits for the chunk or token that another thread reads."""
        self.cancel()
        with self._lock:
            if not _is_running(self._deltas):  # else a callback of the reading closes it, and the cancellation ends it
                self._deltas.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _is_running(deltas: Generator[str, None, None]) -> bool:
    return inspect.getgeneratorstate(deltas) == inspect.GEN_RUNNING


def _answer(
    runtime: Runtime, request: Request, cache: KeptCache | None, answers: list[Answer]
) -> Generator[str, None, None]:
    """The deltas of an answer; at the end the answer is put into ``answers``."""
    with memory_guard(runtime.model, f"the answer to {len(request.prompt.question)} tokens of question"):
        yield from _deltas(runtime, request, cache, answers)


def _deltas(
    runtime: Runtime, request: Request, cache: KeptCache | None, answers: list[Answer]
) -> Generator[str, None, None]:
    try:
        cache = read_request(runtime, request, ahead=True) if cache is None else cache
    except Cancelled:
        return
    started = time.perf_counter()
    seconds = 0.0
    begun = Begun.of(request, cache)
    del cache  # frees the room that reading needed
    running = runtime.decoder(begun.cache, request)
    held_back = request.min_support is not None  # what may have to be withheld is handed out at the end
    text = ""
    with closing(iter(running)) as deltas:
        for delta in deltas:
            text += delta
            if held_back:
                continue
            seconds += time.perf_counter() - started  # not the reader's own time between two deltas
            yield delta
            started = time.perf_counter()
    if running.cancelled:
        return
    seconds += time.perf_counter() - started
    answers.extend(finished(runtime, [begun.written(text, running.writer, seconds)]))
    if held_back and answers[0].text:
        yield answers[0].text


async def in_thread(work: Callable[[], Result], cancel: Callable[[], None]) -> Result:
    """Runs work in a thread, so that the event loop is never blocked.

    Args:
        work: What to run.
        cancel: Called when the waiting task is cancelled; it should end the work soon.
    """
    running = asyncio.get_running_loop().run_in_executor(None, contextvars.copy_context().run, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        cancel()
        running.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody waits for it any more
        raise


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
        delta = await in_thread(self._step, self.cancel)
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
