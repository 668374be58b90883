"""Time that a device takes."""

from __future__ import annotations

import time

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

    def seconds(self) -> list[float]:
        """Seconds from the start to each mark; waits for the last one."""
        if self._device.type != "cuda":
            return [time - self._times[0] for time in self._times[1:]]
        torch.cuda.synchronize(self._device)
        return [self._events[0].elapsed_time(event) / 1e3 for event in self._events[1:]]
