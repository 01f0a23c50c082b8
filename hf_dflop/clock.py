"""Moments on the time line of the device that computes, read without stopping it.

In: a device. Out: moments that are cheap to take, and their seconds since the epoch of the system clock, later. On
CUDA a moment is an event on the current stream: when it is passed, not when it was queued.
"""

import time
from typing import Any

import torch

__all__ = ["DeviceClock"]


class DeviceClock:
    """Takes moments, and tells them in seconds; the latter waits for the device until the moment has passed."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._offset_s = time.time() - time.perf_counter()
        if self._cuda:
            torch.cuda.synchronize(device)
            self._zero = torch.cuda.Event(enable_timing=True)
            self._zero.record()
            self._zero_s = time.time()

    def now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moment: Any) -> float:
        if not self._cuda:
            return moment + self._offset_s
        moment.synchronize()
        return self._zero_s + self._zero.elapsed_time(moment) / 1e3
