"""The values that pass between the training loop and what surrounds it: progress, a plan's sizes, a finished round.

S = optimizer steps of a round, M = micro-batches of a step over all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lead_engine.model.attention import Held
from lead_engine.selection.plan import Plan, RoundStats
from lead_engine.selection.selector import Selector
from lead_engine.training.device_timer import DeviceInterval
from lead_engine.training.host_copy import HostCopy

ROW_QUANTUM = 128
"""Row counts are rounded up to a multiple of this, so that the head sees few different shapes."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two rounds."""

    round: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Of the clock, over all rounds."""
    selection_seconds: float = 0.0
    """Of these, for ordering, planning, U and rewards."""
    scoring_seconds: float = 0.0
    """And for forward passes over the pool that a method asked for."""


class Header(NamedTuple):
    """A plan's sizes on the host."""

    tokens: list[int]
    """Tokens of each step; 0 marks a step that the budget or the pool left empty."""
    rows: list[list[int]]
    """Rows (response tokens) of each step's micro-batches, rounded up."""
    held: list[list[Held]]
    """What each step's micro-batches hold."""

    @property
    def steps(self) -> list[int]:
        """The steps that have samples: their places in the plan, in order."""
        return [step for step, tokens in enumerate(self.tokens) if tokens]


def read_header(plan: Plan, selector: Selector) -> Header:
    """Copy a plan's sizes to the host: S x M x 4 integers.

    This is the one point of a round where the host waits for the device.
    """
    tokens, rows, slots, longest = selector.sizes(plan).cpu().tolist()
    held = [[Held(*sizes) for sizes in zip(*step, strict=True)] for step in zip(slots, tokens, longest, strict=True)]
    return Header([sum(step) for step in tokens], [[_round_up(count) for count in step] for step in rows], held)


def _round_up(rows: int) -> int:
    return -(-max(rows, 1) // ROW_QUANTUM) * ROW_QUANTUM


class StepStats(NamedTuple):
    """What an optimizer step tells the logs: 0-d fp32 tensors on the device."""

    loss: Tensor
    grad_norm: Tensor
    mean_change: Tensor
    first_order: Tensor
    skipped: Tensor
    """1 if the step changed nothing, because its loss or gradient was not finite; else 0."""


class RoundValues(NamedTuple):
    """What a round tells the logs."""

    steps: list[StepStats]
    stats: RoundStats
    plan: Plan


@dataclass
class Round:
    """A round whose steps were launched. Read its values after the next round's header: by then they have arrived."""

    values: HostCopy[RoundValues]
    header: Header
    rates: list[float]
    """The learning rate of each step that was trained."""
    dummy: int
    """The id that marks an empty slot: N."""
    before: Progress
    after: Progress
    device_time: DeviceInterval
    """From its planning to its end. The host's time, in `after`, may be ahead of it by up to a round."""
