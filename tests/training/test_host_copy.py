"""HostCopy, DeviceTimer and DeviceInterval where the device is the host. (On a GPU: test_no_synchronisation.)"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lead_engine.training import device_timer
from lead_engine.training.device_timer import DeviceInterval, DeviceTimer
from lead_engine.training.host_copy import HostCopy


class Values(NamedTuple):
    loss: Tensor
    steps: list[dict[str, Tensor]]
    name: str


def test_values_are_those_of_the_time_of_the_copy() -> None:
    values = Values(torch.tensor(1.5), [{"u": torch.arange(4)}, {"u": torch.ones(2, 3)}], "round 7")
    copy = HostCopy(values)
    values.loss.fill_(-1)
    for step in values.steps:
        step["u"].zero_()
    read = copy.read()
    assert isinstance(read, Values)
    assert read.name == "round 7"
    assert read.loss == 1.5
    assert read.steps[0]["u"].tolist() == [0, 1, 2, 3]
    assert read.steps[1]["u"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert copy.read().loss == 1.5  # as often as one likes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock shows next, last to first."""
    times: list[float] = []
    monkeypatch.setattr(device_timer.time, "perf_counter", lambda: times.pop())
    return times


def test_a_timer_adds_its_intervals_and_counts_none_twice(clock: list[float]) -> None:
    clock[:] = [21.0, 20.0, 12.5, 10.0]
    timer = DeviceTimer(torch.device("cpu"))
    assert timer.take() == 0
    timer.start()
    timer.stop()
    timer.start()
    timer.stop()
    assert timer.take() == pytest.approx(3.5)
    assert timer.take() == 0


def test_pairs_of_equal_times_all_count(clock: list[float]) -> None:
    clock[:] = [2.0, 1.0] * 3
    timer = DeviceTimer(torch.device("cpu"))
    for _ in range(3):
        timer.start()
        timer.stop()
    assert timer.take() == pytest.approx(3)


def test_a_pair_that_is_open_counts_later(clock: list[float]) -> None:
    clock[:] = [9.0, 5.0, 3.0, 1.0]
    timer = DeviceTimer(torch.device("cpu"))
    timer.start()
    timer.stop()
    timer.start()
    assert timer.take() == pytest.approx(2)
    timer.stop()
    assert timer.take() == pytest.approx(4)
    assert timer.take() == 0


class Event:
    """A CUDA event that was recorded at `at`, done when the test says so."""

    def __init__(self, at: float) -> None:
        self.at, self.done = at, False

    def query(self) -> bool:
        return self.done

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


def test_what_the_device_has_still_to_do_is_taken_later(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = DeviceTimer(torch.device("cuda"))
    events = [Event(at) for at in (1.0, 2.0, 4.0, 8.0)]
    marks = iter(events)
    monkeypatch.setattr(timer, "_mark", lambda: next(marks))
    for _ in range(2):
        timer.start()
        timer.stop()
    assert timer.take() == 0
    events[1].done = True
    assert timer.take() == pytest.approx(1)
    assert timer.take() == 0
    events[3].done = True
    assert timer.take() == pytest.approx(4)


def test_an_interval_is_read_as_often_as_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [Event(1.0), Event(3.5)]
    marks = iter(events)
    monkeypatch.setattr(DeviceTimer, "_mark", lambda _: next(marks))
    lap = DeviceInterval(torch.device("cuda"))
    lap.stop()
    events[1].done = True
    assert [lap.seconds, lap.seconds] == [pytest.approx(2.5)] * 2
