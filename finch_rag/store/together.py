"""Calls of several threads, carried out together.

While one call has the lock others come and wait for it. The first of them to get it carries out all that wait: a GPU
reads sixteen questions in the time of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Asked = TypeVar("Asked")
Found = TypeVar("Found")

_MOST = 32  # calls at once: what they need of memory is bounded


@dataclass(eq=False, slots=True)
class _Call(Generic[Asked]):
    """A call that waits.

    Attributes:
        asked: What it asks.
        found: What was found for it; nothing before that.
        error: What it failed with.
    """

    asked: Asked
    found: Sequence[Any] = ()
    error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether it has been carried out."""
        return bool(self.found) or self.error is not None


class Together(Generic[Asked, Found]):
    """Calls that are carried out together with those of other threads.

    Args:
        lock: Is held while they are carried out.
        carry_out: What was found for each of some calls, in their order.
    """

    def __init__(self, lock: AbstractContextManager[Any], carry_out: Callable[[Sequence[Asked]], list[Found]]) -> None:
        self._lock, self._carry_out = lock, carry_out
        self._waiting: list[_Call[Asked]] = []

    def __call__(self, asked: Asked) -> Found:
        """What is found for a call.

        Args:
            asked: What it asks.

        Raises:
            Exception: What carrying it out by itself raises.
        """
        own: _Call[Asked] = _Call(asked)
        self._waiting.append(own)
        try:
            with self._lock:
                if not own.done:
                    others = [call for call in list(self._waiting) if call is not own and not call.done]
                    self._carry_out_all([own, *others[: _MOST - 1]])
        finally:
            self._waiting.remove(own)
        if own.error is not None:
            raise own.error
        found: Found = own.found[0]
        return found

    def _carry_out_all(self, calls: Sequence[_Call[Asked]]) -> None:
        """Where this fails for several, each is carried out alone, so that only those fail that do by themselves."""
        try:
            for call, found in zip(calls, self._carry_out([call.asked for call in calls]), strict=True):
                call.found = (found,)
        except Exception as error:
            if len(calls) == 1:
                calls[0].error = error
            else:
                for call in calls:
                    self._carry_out_all([call])
