"""What a selection method is: it orders the pool's samples once a round, and learns from the round.

A method says who comes next, best first. How many of them fit into the round's micro-batches and the budget, and the
keeping of U and visits, is the selector's. See docs/METHODS.md for a method added step by step.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from lead_engine.config.methods import MethodOptions
from lead_engine.pool.state import PoolState
from lead_engine.pool.store import TokenStore
from lead_engine.selection import counter_rng
from lead_engine.selection.loss_change import LossChange
from lead_engine.selection.plan import Plan
from lead_engine.selection.samples import Samples
from lead_kernels import select_topk


class Scorer(Protocol):
    """Measures losses under the model as it is now, on all ranks; model and optimizer do not change."""

    store: TokenStore
    """The pool's tokens."""

    def given(self, ids: Tensor) -> Tensor:
        """Mean NLL of the answers given their instructions: fp32 [n], on the device, for ids int64 [n] on the host."""
        ...

    def alone(self, ids: Tensor) -> Tensor:
        """Mean NLL of the answers without their instructions, likewise."""
        ...


class Draw(NamedTuple):
    """Where a round's samples come from. Tensors are on the training device."""

    cluster: Tensor
    """int64 [], the arm drawn; -1 where a round is drawn from all."""
    probabilities: Tensor
    """fp32 [K] of the arms."""


class Order(NamedTuple):
    """Who comes next. Tensors are on the training device."""

    sample_ids: Tensor
    """int64 [order_length], distinct, best first; N where there are no more."""
    utility: Tensor
    """fp32 [N+1], the U that this order believes in; rewards are measured from it."""


class Method:
    """Base of the methods: nothing is learned, nothing is kept.

    `order_length`: how many samples an order may name, at least as many as a round can train. Randomness is a function
    of `seed` and of counters (round, pass, sample id), so that every rank finds the same order and a resumed run goes
    on with it.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    """The class of its own options: `--NAME.*`."""
    needs_scores: ClassVar[bool] = True
    """Whether `prepare` must have measured the pool's losses."""
    smoothing: float = 0.1
    """b of U <- (1 - b) (loss + change) + b U, by which the selector keeps U."""

    def __init__(self, samples: Samples, state: PoolState, options: Any, order_length: int, seed: int) -> None:
        self.samples, self.options, self.order_length, self.seed = samples, options, order_length, seed

    @classmethod
    def describe(cls, options: Any) -> str:
        """The method and its options in a line, for a run's first screen."""
        return (cls.__doc__ or cls.__name__).strip().splitlines()[0]

    @classmethod
    def budget(cls, options: Any, share: float, pool_tokens: int) -> int:
        """Tokens to train; `share` is `--budget`."""
        return round(share * pool_tokens)

    @property
    def num_arms(self) -> int:
        """Clusters that a round's draw is among."""
        return 1

    def loss_change(self, hidden_size: int) -> LossChange:
        """The estimator of what a step does to its own samples (dL); this one says 0 and costs nothing."""
        return LossChange()

    def refresh(self, round: int, spent: float, scorer: Scorer) -> None:
        """Before a round is planned; `spent` is the share of the budget that is trained.

        The only place where losses may be measured anew, and where the host may wait for the device.
        """

    def draw(self, round: int) -> Draw:
        """The arm of round `round` (0, 1, ...), for methods that have several. Nothing here reads the device."""
        device = self.samples.device
        return Draw(torch.zeros((), dtype=torch.int64, device=device), torch.ones(1, device=device))

    def order(self, round: int, drawn: Draw) -> Order:
        """Who comes next in round `round`, given its draw. Nothing here reads the device."""
        raise NotImplementedError

    def observe(self, sample_ids: Tensor, loss: Tensor, loss_change: Tensor) -> None:
        """One optimizer step, before U and visits are updated: its samples (int64, N for none), the losses that it
        computed (fp32) and what it is estimated to have changed in them (fp32).
        """

    def learn(self, plan: Plan, trained: Tensor, loss_drop: Tensor) -> Tensor:
        """After a round's last step: the reward in [-1, 1] that the method makes of it, fp32 []; 0 for methods that do
        not learn.

        `trained` bool [S, M, B]: which planned samples were trained; `loss_drop` fp32 [S, M, B]: how far their U fell
        since they were planned.
        """
        return torch.zeros((), device=self.samples.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, of fixed shapes and not copied, on which later orders depend, besides U and visits."""
        return {}

    def loaded(self) -> None:
        """Called after the tensors of `state_dict`, U and visits were filled in from a checkpoint."""

    # --- what several methods share ---

    def plain(self, sample_ids: Tensor) -> Order:
        """An order that believes in U as it stands."""
        return Order(sample_ids, self.samples.utility)

    def best_by(self, score: Tensor, candidates: Tensor) -> Tensor:
        """The candidates (bool [N]) with the highest score (fp32 [N]; NaN last), those trained least often first: int64
        [order_length].
        """
        visits = self.samples.visits[:-1]
        candidates = candidates & ~self.samples.barred[:-1]
        least = torch.where(candidates, visits, torch.iinfo(torch.int32).max).amin()
        one_task = torch.zeros_like(self.samples.task, dtype=torch.uint8)
        return select_topk(score, candidates & (visits == least), one_task, 1, self.order_length)

    def uniform(self, stream: int, *counters: Tensor) -> Tensor:
        """fp32 in [0, 1), a function of (seed, stream, counters)."""
        return counter_rng.uniform(self.seed, self.samples.scalar(stream), *counters)
