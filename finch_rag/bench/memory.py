"""Peak of memory while something runs."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

_SAMPLED_EVERY = 0.005  # seconds, on a CPU
_TORCH = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"  # has MKL in it where torch is made for x86


def in_use(device: torch.device) -> int:
    """Bytes in use: allocated ones on a CUDA device, the process' resident ones on a CPU.

    Args:
        device: Where the model is.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _trim()
    return _resident()


def settled(device: torch.device) -> dict[str, int]:
    """Bytes that stay in use: garbage is collected before, and what glibc and MKL keep for later is given back.

    Args:
        device: Where the model is.

    Returns:
        Resident ones of the process and, on a CUDA device, allocated ones of it.
    """
    gc.collect()
    _free_buffers()
    _trim()
    found = {"process": _resident()}
    if device.type == "cuda":
        found["device"] = torch.cuda.memory_allocated(device)
    return found


@contextmanager
def peak_memory(device: torch.device, before: int) -> Iterator[list[float]]:
    """Measures the peak of memory beyond ``before`` bytes.

    Args:
        device: Where the model is.
        before: What `in_use` said before.

    Yields:
        A list whose first element is the peak in MiB once the block has ended.
    """
    peak = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLED_EVERY):
            peak[0] = max(peak[0], (_resident() - before) / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _trim() -> None:
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # glibc keeps what was freed for later, hundreds of MiB that nothing uses


def _free_buffers() -> None:
    """Has MKL give back the buffers of all threads that have multiplied matrices: some 10 MiB a thread, or none."""
    if sys.platform == "linux" and _TORCH.is_file():
        free = getattr(ctypes.CDLL(str(_TORCH)), "mkl_serv_free_buffers", None)
        if free is not None:
            free()


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)
