"""A round of selection as numbers: its shape, its plan, and what became of it.

Shapes: N samples, K arms (clusters), S steps a round, M micro-batches a step over all ranks, B slots a micro-batch.
Sample id N marks an empty slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from lead_engine.config.bounds import Count
from lead_engine.config.options import Options


@dataclass(frozen=True)
class Layout(Options):
    """The static shape of a round. UserError for numbers below 1 or too large."""

    flags: ClassVar[str] = "Layout."

    steps: Count
    """S, optimizer steps."""
    micro_batches: Count
    """M, micro-batches of one optimizer step over all ranks."""
    slots: Count
    """B, most samples in one micro-batch."""
    capacity: Count
    """T, token places in one micro-batch."""


class Plan(NamedTuple):
    """One round's samples, packed.

    Steps are short or empty, the last ones first, where samples or budget end; a plan of 0 tokens means that nothing
    is left.
    """

    cluster: Tensor  # int64 [], the arm drawn (0 where there is but one, -1 where all are trained)
    probabilities: Tensor  # fp32 [K], those it was drawn with
    sample_ids: Tensor  # int64 [S, M, B], N in empty slots; no sample twice
    tokens: Tensor  # int64 [S, M], tokens in a micro-batch
    rows: Tensor  # int64 [S, M], response tokens that count in a micro-batch
    utility: Tensor  # fp32 [S, M, B], what U was believed to be when planned: the reward is measured from it
    visits: Tensor  # int32 [S, M, B], visits when planned


class RoundStats(NamedTuple):
    """What a round did, on the device. Means are over the samples really trained; 0 for an empty round."""

    reward_raw: Tensor  # fp32 [], mean of U before - U after
    reward: Tensor  # fp32 [], scaled to [-1, 1] by the range seen so far
    utility_before: Tensor  # fp32 [], mean U when planned
    utility_after: Tensor  # fp32 [], mean U now
    samples: Tensor  # int64 []
    samples_per_task: Tensor  # int64 [tasks of the pool]
    samples_per_cluster: Tensor  # int64 [clusters of the pool]
    barred: Tensor  # bool [S, M, B], whose own loss was not finite
