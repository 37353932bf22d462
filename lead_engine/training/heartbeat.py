"""What this rank is doing now: a name and two counters that the watchdog's threads read.

`enter_phase` is a tuple assigned, nothing more, so the training loop may call it before every wait.
"""

from __future__ import annotations

import time
from typing import NamedTuple


class Phase(NamedTuple):
    """What a rank is doing."""

    number: int = 0
    """Phases entered so far: the rank with the greater number is further along."""
    name: str = "starting up"
    round: int | None = None
    step: int | None = None
    limited: bool = False
    """Whether the time-out counts here."""

    def __str__(self) -> str:
        counters = (("round", self.round), ("step", self.step))
        parts = [f"{name} {value}" for name, value in counters if value is not None]
        return f"{', '.join(parts)} ({self.name})" if parts else self.name


_phase, _since = Phase(), time.monotonic()


def enter_phase(name: str, round: int | None = None, step: int | None = None, *, limited: bool = True) -> None:
    """Note what this rank does from now on. All ranks enter the same phases in the same order."""
    global _phase, _since
    _phase, _since = Phase(_phase.number + 1, name, round, step, limited), time.monotonic()


def enter_step_phase(name: str, step: int | None = None) -> None:
    """The same for the next phase of the round that this rank is in."""
    enter_phase(name, _phase.round, step)


def current_phase() -> Phase:
    """What this rank is doing."""
    return _phase


def seconds_in_phase() -> float:
    """How long it has been doing that."""
    return time.monotonic() - _since
