"""Turns: at most so many run at once, and so many wait, in the order in which they came."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque

from .answers import BusyError

_MOST_RETRY = 120  # seconds; a longer guess helps nobody
_WEIGHT = 0.2  # of the last turn in the mean of their seconds


class Places:
    """Places for what runs and for what waits, on one event loop.

    Args:
        running: The most that run at once.
        waiting: The most that wait for it.
        what: What to call them in messages.
    """

    def __init__(self, running: int, waiting: int, what: str) -> None:
        self._most_running, self._most_waiting, self._what = running, waiting, what
        self._queue: deque[Place] = deque()
        self._running = 0
        self._mean_seconds = 1.0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def running(self) -> int:
        """How many run."""
        return self._running

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._queue)

    def admit(self) -> Place:
        """A place to wait in; `Place.leave` gives it back.

        Raises:
            BusyError: If as many wait as may.
        """
        place = Place(self)
        if self._running < self._most_running:
            self._start(place)
        elif len(self._queue) < self._most_waiting:
            self._queue.append(place)
        else:
            raise BusyError(
                f"{self._running} {self._what} run and {self.waiting} wait, the most that may: try again in "
                f"{self._retry_after} s, or start the server with a larger --waiting",
                self._retry_after,
            )
        self._empty.clear()
        return place

    async def emptied(self) -> None:
        """Waits until nobody runs or waits."""
        await self._empty.wait()

    @property
    def _retry_after(self) -> int:
        seconds = self._mean_seconds * (self.waiting + 1) / self._most_running
        return min(_MOST_RETRY, max(1, math.ceil(seconds)))

    def _start(self, place: Place) -> None:
        self._running += 1
        place.start()

    def left(self, place: Place) -> None:
        """Gives a place to the next.

        Args:
            place: Which is free now.
        """
        if place.started is None:
            self._queue.remove(place)
        else:
            self._running -= 1
            self._mean_seconds += _WEIGHT * (time.monotonic() - place.started - self._mean_seconds)
            if self._queue:
                self._start(self._queue.popleft())
        if not self._running and not self._queue:
            self._empty.set()


class Place:
    """One place, see `Places`.

    Args:
        places: Where it belongs.

    Attributes:
        started: When its turn came; None before.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._turn = asyncio.Event()
        self._left = False
        self.started: float | None = None

    def start(self) -> None:
        """Says that its turn has come."""
        self.started = time.monotonic()
        self._turn.set()

    async def turn(self) -> bool:
        """Waits for its turn; False if the place was left before."""
        await self._turn.wait()
        return not self._left

    def leave(self) -> None:
        """Gives the place back; again does no harm."""
        if self._left:
            return
        self._left = True
        self._places.left(self)
        self._turn.set()  # who waits for it still learns that it will not come
