"""Timers of the device's own work. Reading them never makes the host wait for a GPU."""

from __future__ import annotations

import time
from typing import Any

import torch

Mark = Any
"""A point in time: the host clock's seconds, or a torch.cuda.Event in a GPU's stream."""


class DeviceTimer:
    """Seconds of device time between `start` and `stop`, summed over any number of pairs.

    On a CPU, the host's clock.

    `with timer:` starts and stops it.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._started: Mark | None = None
        self._intervals: list[tuple[Mark, Mark]] = []

    def start(self) -> None:
        self._started = self._mark()

    def stop(self) -> None:
        """ValueError unless `start` came before."""
        if self._started is None:
            raise ValueError("DeviceTimer.stop: the timer was not started")
        self._intervals.append((self._started, self._mark()))

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def take(self) -> float:
        """Seconds of the intervals that are over and were not taken yet.

        What a GPU has not finished is left for a later call.
        """
        finished = [interval for interval in self._intervals if not self._cuda or interval[1].query()]
        self._intervals = [interval for interval in self._intervals if interval not in finished]
        if self._cuda:
            return float(sum(start.elapsed_time(end) / 1e3 for start, end in finished))
        return float(sum(end - start for start, end in finished))

    def _mark(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class DeviceInterval:
    """One interval of device time, from construction to `stop`. Read `seconds` once the device has passed its end."""

    def __init__(self, device: torch.device) -> None:
        self._timer, self._seconds = DeviceTimer(device), 0.0
        self._timer.start()

    def stop(self) -> None:
        self._timer.stop()

    @property
    def seconds(self) -> float:
        self._seconds = self._seconds or self._timer.take()
        return self._seconds
