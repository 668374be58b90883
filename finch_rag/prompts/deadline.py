"""Work of others that may never end, within a deadline: it runs in a thread that is told to stop."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

Result = TypeVar("Result")


class _Stopped(BaseException):
    """Raised in a thread whose deadline has passed; no ``except Exception`` of the work catches it."""


class _Helper:
    """A thread that does one piece of work after another."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="finch-deadline", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still works; not in a process that was forked off."""
        return self._thread.is_alive()

    def begin(self, work: Callable[[], None]) -> None:
        """Has it do something that raises nothing."""
        self._work.put(work)

    def stop(self) -> None:
        """Ends it at the next instruction of Python."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(_Stopped))

    def _run(self) -> None:
        try:
            while True:
                self._work.get()()
        except _Stopped:
            return


_idle: list[_Helper] = []  # kept, as handing work over takes a third of the time that a new thread does


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """What some work returns or raises.

    Args:
        seconds: That it may take. A single operation that does not end, such as a power of huge numbers, cannot be
            stopped; a loop and a recursion can.
        work: What to do.

    Raises:
        TimeoutError: If it takes longer.
    """
    done: SimpleQueue[tuple[bool, object]] = SimpleQueue()

    def told() -> None:
        try:
            done.put((True, work()))
        except Exception as error:
            done.put((False, error))

    try:
        helper = _idle.pop()
    except IndexError:
        helper = _Helper()
    if not helper.alive:
        helper = _Helper()
    helper.begin(told)
    try:
        well, found = done.get(timeout=seconds)
    except Empty:
        helper.stop()
        raise TimeoutError(f"it took more than {seconds:g} s") from None
    except BaseException:  # the caller is interrupted
        helper.stop()
        raise
    _idle.append(helper)
    if not well:
        raise found  # type: ignore[misc]  # an exception
    return found  # type: ignore[return-value]
