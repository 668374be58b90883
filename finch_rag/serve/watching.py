"""Work for a client that may go away, and that does not wait for ever."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from ..answer import Answer
from ..errors import InputError
from .answers import AnswerPieces
from .errors import client_gone, stopping, too_late
from .metrics import Metrics
from .settings import ServeSettings

log = logging.getLogger("finch_rag.serve")

Result = TypeVar("Result")

_closing: set[asyncio.Task[None]] = set()  # answers that are on their way out: the loop itself holds no task


class Watch:
    """Waits for the moment at which a client goes.

    Args:
        request: Its request, whose body was read.
        when_gone: What is called then.

    Attributes:
        gone: Whether it has gone.
    """

    def __init__(self, request: Request, when_gone: Callable[[], object]) -> None:
        self._request, self._when_gone = request, when_gone
        self.gone = False
        self._task = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._when_gone()

    def end(self) -> None:
        """Waits no longer."""
        self._task.cancel()


async def while_wanted(request: Request, work: Coroutine[Any, Any, Result], seconds: float | None) -> Result:
    """What work returns; it is cancelled when the client goes, or when it takes too long.

    Args:
        request: The client's.
        work: Is awaited here.
        seconds: The most that it may take; None for no limit.

    Raises:
        ApiError: 504 if it takes too long; 499 if the client has gone.
        Exception: What the work raises.
    """
    task = asyncio.create_task(work)
    watch = Watch(request, task.cancel)
    try:
        async with asyncio.timeout(seconds):
            return await task
    except TimeoutError:
        raise too_late("the result", seconds) from None
    except asyncio.CancelledError:
        if watch.gone:
            raise client_gone() from None
        raise
    finally:
        watch.end()
        task.cancel()


class Run:
    """An answer that is made for a client, within its time.

    It must be ended, see `end`.

    Args:
        pieces: The answer.
        request: The client's.
        settings: How long it may take.
        metrics: Where it is counted.
    """

    def __init__(self, pieces: AnswerPieces, request: Request, settings: ServeSettings, metrics: Metrics) -> None:
        self._pieces, self._metrics = pieces, metrics
        self._started = time.perf_counter()
        self._begun = self._ended = False
        self._most = settings.timeout
        self._most_to_first = min(filter(None, (settings.first_token_timeout, settings.timeout)), default=None)
        self._watch = Watch(request, pieces.cancel)

    async def next_piece(self) -> str | None:
        """The next piece of the text; None behind the last one.

        Raises:
            ApiError: 504 if it takes too long; 499 if the client has gone.
            FinchError: If the answer cannot be made.
        """
        most = self._most if self._begun else self._most_to_first
        left = None if most is None else most - (time.perf_counter() - self._started)
        try:
            async with asyncio.timeout(left):
                piece = await anext(self._pieces, None)
        except TimeoutError:
            raise too_late("the answer" if self._begun else "the first piece of the answer", most) from None
        if self._watch.gone:
            raise client_gone()
        if not self._begun:
            self._begun = True
            self._metrics.began(time.perf_counter() - self._started)
        return piece

    async def pieces(self) -> AsyncIterator[str]:
        """All pieces from here on, see `next_piece`."""
        while (piece := await self.next_piece()) is not None:
            yield piece

    def answer(self) -> Answer:
        """The whole answer, behind its last piece; it is counted here.

        Raises:
            ApiError: 503, if it was cut off: only a server that stops does that.
        """
        try:
            answer = self._pieces.answer
        except InputError:
            raise stopping() from None
        self._metrics.read(answer.report)
        return answer

    async def whole(self) -> Answer:
        """Runs to the end, see `next_piece`."""
        async for _ in self.pieces():
            pass
        return self.answer()

    def end(self) -> None:
        """Ends the answer, wherever it is; what it holds is free once the step under way is over."""
        if self._ended:
            return
        self._ended = True
        self._watch.end()
        self._pieces.cancel()
        task = asyncio.create_task(_closed(self._pieces))
        _closing.add(task)
        task.add_done_callback(_closing.discard)


async def _closed(pieces: AnswerPieces) -> None:
    try:
        await pieces.aclose()
    except Exception as error:
        log.error("an answer could not be closed: %s", type(error).__name__)
