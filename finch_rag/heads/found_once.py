"""What the first of several calls finds and the others wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Found = TypeVar("Found")

_LOOKS_FOR_CANCELLATION = 0.05  # seconds, while another call finds it


class FoundOnce(Generic[Found]):
    """A value that is found at the first use. Safe to share between threads."""

    def __init__(self) -> None:
        self._found: list[Found] = []
        self._finding = threading.Lock()

    def get(self, find: Callable[[], Found], check: Callable[[], None]) -> Found:
        """The value, found now if nobody has.

        Args:
            find: Finds it; may raise, and then the next caller finds it.
            check: Raises where the caller does not want it any more; called again and again while another one finds it.
        """
        while not self._found:
            if not self._finding.acquire(timeout=_LOOKS_FOR_CANCELLATION):
                check()
                continue
            try:
                if not self._found:
                    check()
                    self._found.append(find())
            finally:
                self._finding.release()
        return self._found[0]
