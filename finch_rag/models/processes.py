"""Processes and threads: what a fork does not have, what is not sent to others, and a Python that is not supported.

In a process that was forked after a model had computed, a product of two matrices waits for ever for threads that only
the parent has, and CUDA refuses all work. What would hang is refused in one line instead.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn, Self

import torch

from ..errors import InputError, SettingsError

_computes: int | None = None  # the process that was the first to compute, of this one and those that it was forked from


def check_not_forked(device: torch.device) -> None:
    """Raises in a process that was forked from one that had computed, where that cannot work.

    Args:
        device: On which is computed.

    Raises:
        InputError: If torch computes with threads that are not there, or on a GPU.
    """
    global _computes
    here = os.getpid()
    _computes = _computes or here
    if _computes == here:
        return
    forked = f"this process {here} was forked after process {_computes} had computed"
    if device.type != "cpu":
        raise InputError(
            f"{forked}, and {device} works only there: start processes by spawn, and load the model in each"
        )
    threads = torch.get_num_threads()
    if threads > 1:
        raise InputError(
            f"{forked} by {threads} threads, which only that one has: call torch.set_num_threads(1) here first, or "
            "start processes by spawn, and load the model in each"
        )


def check_gil() -> None:
    """Raises in a free-threaded Python.

    Raises:
        SettingsError: If it runs without its global interpreter lock.
    """
    has_gil = getattr(sys, "_is_gil_enabled", None)
    if has_gil is not None and not has_gil():
        raise SettingsError(
            "this Python runs without its global interpreter lock, which finch-rag is not tested with: set "
            "PYTHON_GIL=1, or use the usual build"
        )


class Uncopied:
    """A part of a program that its threads share: a copy of what holds one holds the same, and it cannot be pickled."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise InputError(
            f"{type(self).__name__} cannot be pickled, as a model is not sent to other processes: make it in each of "
            "them, or let them ask `finch-rag serve`"
        )
