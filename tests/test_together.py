"""Calls of several threads, carried out together."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from finch_rag.store.together import Together


class Counted:
    """Squares numbers; refuses negative ones, waits at the first call until it may go on."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.calls.append(list(numbers))
        if len(self.calls) == 1:
            self.begun.set()
            assert self.go_on.wait(10)
        if min(numbers) < 0:
            raise ValueError(f"{min(numbers)} is negative")
        return [number * number for number in numbers]


def asked_at_once(counted: Counted, numbers: Sequence[int]) -> list[object]:
    """What comes of calls that all wait while the first one is carried out."""
    together = Together(threading.RLock(), counted)

    def ask(number: int) -> object:
        try:
            return together(number)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(len(numbers)) as pool:
        first = pool.submit(ask, numbers[0])
        assert counted.begun.wait(10)
        others = [pool.submit(ask, number) for number in numbers[1:]]
        while len(together._waiting) < len(numbers):
            threading.Event().wait(0.01)
        counted.go_on.set()
        return [future.result() for future in (first, *others)]


def test_calls_that_wait_are_carried_out_at_once() -> None:
    counted = Counted()
    assert asked_at_once(counted, [1, 2, 3, 4, 5]) == [1, 4, 9, 16, 25]
    assert [sorted(call) for call in counted.calls] == [[1], [2, 3, 4, 5]]


def test_one_that_fails_leaves_the_others_alone() -> None:
    counted = Counted()
    assert asked_at_once(counted, [1, 2, -3, 4]) == [1, 4, "-3 is negative", 16]


def test_not_more_than_some_at_once() -> None:
    counted = Counted()
    numbers = range(40)
    assert asked_at_once(counted, numbers) == [number * number for number in numbers]
    assert max(map(len, counted.calls)) == 32


def test_a_call_alone_raises_its_own_error() -> None:
    counted = Counted()
    counted.go_on.set()
    with pytest.raises(ValueError, match="-1 is negative"):
        Together(threading.Lock(), counted)(-1)
