"""Timers of the device's own work. Reading them never makes the host wait for a GPU."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event
"""A point in time: the host clock's seconds, or an event in a GPU's stream."""


class DeviceTimer:
    """Seconds of device time between `start` and `stop`, summed over any number of pairs; on a CPU, of the host's clock."""

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

    def take(self) -> float:
        """Seconds of the intervals that are over and were not taken yet. What a GPU has not finished is left for a later call."""
        finished = [interval for interval in self._intervals if _is_over(interval[1])]
        self._intervals = [interval for interval in self._intervals if interval not in finished]
        return sum(_seconds(start, end) for start, end in finished)

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


def _is_over(mark: Mark) -> bool:
    return isinstance(mark, float) or mark.query()


def _seconds(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)
    return start.elapsed_time(end) / 1e3
