from __future__ import annotations

import time

import pytest
import torch

from finch_rag.bench.clock import Clock

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_marks_are_seconds_from_the_start(device: str) -> None:
    clock = Clock(torch.device(device))
    time.sleep(0.05)
    clock.mark()
    time.sleep(0.1)
    clock.mark()
    first, second = clock.seconds()
    assert 0.049 < first < first + 0.099 < second < 60  # a busy machine sleeps longer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_mark_does_not_wait_for_the_device() -> None:
    clock = Clock(torch.device("cuda"))
    torch.cuda._sleep(1_000_000_000)  # cycles, half a second or so
    started = time.perf_counter()
    clock.mark()
    assert time.perf_counter() - started < 0.1
    assert clock.seconds()[0] > 0.2
