"""Time that a device takes."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class Clock:
    """Marks when a device's work comes to some points, without holding the host up there.

    To wait for the device between two parts would charge the second one with what the host needs to launch it; in use
    the host does that while the device still works on the first.

    Args:
        device: Where the work runs; it starts with none.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.mark()

    def mark(self) -> None:
        """Marks the point at which all that was asked of the device so far is done."""
        if self._device.type != "cuda":
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)

    def laps(self) -> list[float]:
        """Seconds from the start to the first mark, and from each mark to the next; waits for the last one."""
        if self._device.type != "cuda":
            return [after - before for before, after in pairwise(self._times)]
        torch.cuda.synchronize(self._device)
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._events)]
