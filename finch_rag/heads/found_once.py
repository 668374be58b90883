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
        self._finder: object = None  # the call that finds it
        self._changed = threading.Condition()

    def get(self, find: Callable[[], Found], check: Callable[[], None]) -> Found:
        """The value, found now if nobody has.

        Args:
            find: Finds it; may raise, and then the next caller finds it.
            check: Raises where the caller does not want it any more; called again and again while another one finds it.
        """
        own = object()
        try:  # around all of it: Ctrl-C may come between any two lines, and nobody may wait for this call then
            while not self._found:
                check()
                with self._changed:
                    if self._finder is None:
                        self._finder = own
                    elif self._finder is not own:
                        self._changed.wait(_LOOKS_FOR_CANCELLATION)
                if self._finder is own and not self._found:
                    self._found.append(find())
        finally:
            with self._changed:
                if self._finder is own:
                    self._finder = None
                    self._changed.notify_all()
        return self._found[0]
