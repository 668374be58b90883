from __future__ import annotations

import time

import pytest
import torch

from finch_rag.bench.clock import Clock

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_laps_are_seconds_between_marks(device: str) -> None:
    started = time.perf_counter()
    clock = Clock(torch.device(device))
    time.sleep(0.05)
    clock.mark()
    time.sleep(0.1)
    clock.mark()
    first, second = clock.laps()
    assert first > 0.049
    assert second > 0.099
    assert first + second < time.perf_counter() - started


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_mark_does_not_wait_for_the_device() -> None:
    clock = Clock(torch.device("cuda"))
    torch.cuda._sleep(1_000_000_000)  # cycles, half a second or so
    started = time.perf_counter()
    clock.mark()
    assert time.perf_counter() - started < 0.1
    assert clock.laps()[0] > 0.2
