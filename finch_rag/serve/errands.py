"""Work of an engine that is no answer: ranking, and reading, searching and opening stores."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

from ..request import Cancellation
from ..streaming import in_thread
from .places import Places

Result = TypeVar("Result")


class Errands:
    """Runs work in threads, a bounded number of it at once.

    Args:
        running: The most at once.
        waiting: The most that wait.
    """

    def __init__(self, *, running: int, waiting: int) -> None:
        self._places = Places(running, waiting, "rankings and store requests")

    @property
    def places(self) -> Places:
        """How many run and wait."""
        return self._places

    async def close(self, timeout: float) -> None:
        """Waits for what runs and waits.

        Args:
            timeout: The most seconds.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._places.emptied()

    async def run(self, work: Callable[[Cancellation], Result]) -> Result:
        """What work returns. A cancelled task cancels it, and its place is free when the thread is done.

        Args:
            work: Run in a thread; should end soon where its cancellation says so.

        Raises:
            BusyError: If too many wait.
            Exception: What the work raises.
        """
        loop, cancellation = asyncio.get_running_loop(), Cancellation()
        place = self._places.admit()

        def in_its_place() -> Result:
            try:
                cancellation.check()
                return work(cancellation)
            finally:
                with contextlib.suppress(RuntimeError):  # the loop is gone, and nobody waits
                    loop.call_soon_threadsafe(place.leave)

        try:
            await place.turn()
        except asyncio.CancelledError:
            place.leave()
            raise
        return await in_thread(in_its_place, cancellation.cancel)
