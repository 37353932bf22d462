"""The training loop.

    train         rounds, until the token budget is spent or no sample is left
      train_round   draw a cluster, order its samples, pack the first of them into micro-batches;
                    train on them, step by step; let the method learn from the round
        train_step    forward and backward over the step's micro-batches; update the weights;
                      observe the loss of every sample and what the step did to it

The host waits for the device once a round, to read how large the planned micro-batches are (`read_header`). All else
stays on the device: the draw, the order, the packing, losses, utilities and rewards. Logs get copies that are read a
round later. Every rank computes the same plan, so ranks exchange nothing but gradients and the samples' losses.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lead_engine.config import OptimizerConfig
from lead_engine.model.dropout import draws_random_numbers, seed_dropout
from lead_engine.model.packed import PackedLM
from lead_engine.model.parallelize import end_of_step
from lead_engine.pool.store import TokenStore
from lead_engine.selection.loss_change import LossChange
from lead_engine.selection.observe import observe_step
from lead_engine.selection.plan import Plan
from lead_engine.selection.replicas import sum_over_ranks
from lead_engine.selection.selector import Selector
from lead_engine.training.device_timer import DeviceInterval, DeviceTimer
from lead_engine.training.finite import check_can_skip, loss_gradient, step_unless
from lead_engine.training.heartbeat import enter_phase, enter_step_phase
from lead_engine.training.host_copy import HostCopy
from lead_engine.training.optimizer import clip_gradients, inner_product, learning_rate
from lead_engine.training.rounds import Header, Progress, Round, RoundValues, StepStats, read_header
from lead_engine.training.scorer import PoolScorer


class Callbacks(Protocol):
    """What surrounds the rounds of a run: logs, signals, evaluations, checkpoints. Called alike on all ranks."""

    @property
    def stops_early(self) -> bool:
        """Whether the evaluations say that more training does not help."""

    def log(self, finished: Round) -> None:
        """Take a round whose steps were launched, and write the lines of the round before it."""

    def log_last(self) -> None:
        """Write the lines of the round that `log` was given last."""

    def stop_on_signal(self, progress: Progress) -> None:
        """If any rank got a signal to stop: write a checkpoint, and raise `Stopped`."""

    def evaluate(self, progress: Progress) -> None:
        """Measure the held-out loss, if it is time."""

    def checkpoint(self, progress: Progress) -> None:
        """Begin to write a checkpoint, if it is time."""


@dataclass
class Trainer:
    """A model, and all that it takes to train it on the samples that a method selects.

    A group of one rank may pass distributed=False; no process group is needed then.
    """

    model: PackedLM
    optimizer: torch.optim.Optimizer
    selector: Selector
    loss_change: LossChange
    store: TokenStore
    scorer: PoolScorer
    """For methods that measure the pool again; others never ask it."""
    options: OptimizerConfig
    budget: int
    """Tokens to train."""
    rank: int = 0
    world: int = 1
    distributed: bool = True
    seed: int = 0
    """Of what layers draw (adapters' dropout)."""

    def __post_init__(self) -> None:
        check_can_skip(self.optimizer)
        self.method = self.selector.method
        self.accumulation = self.selector.layout.micro_batches // self.world
        self.device = self.selector.samples.device
        self.selection_timer = DeviceTimer(self.device)
        self.has_dropout = draws_random_numbers(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def train(self, start: Progress, callbacks: Callbacks) -> Progress:
        """Train until the budget is spent, no sample is left, or evaluations stop the run.

        start: where to go on from. Returns where the run stands at the end.
        """
        done = start
        callbacks.stop_on_signal(done)
        callbacks.evaluate(done)
        while not callbacks.stops_early and (finished := self.train_round(done)) is not None:
            done = finished.after
            callbacks.log(finished)
            callbacks.stop_on_signal(done)
            callbacks.evaluate(done)
            callbacks.checkpoint(done)
        callbacks.log_last()
        return done

    def rounds(self, start: Progress) -> Iterator[Round]:
        """The same rounds one at a time, for a caller that looks at each: the Python API's Session."""
        while (finished := self.train_round(start)) is not None:
            yield finished
            start = finished.after

    def train_round(self, progress: Progress) -> Round | None:
        """One round after `progress`; None if the budget is spent or no sample is left.

        Does not wait for its last step.
        """
        if progress.tokens >= self.budget:
            return None
        started, device_time = time.perf_counter(), DeviceInterval(self.device)

        enter_phase("planning", progress.round)
        refresh_seconds, scoring_seconds = self._refresh(progress)  # some methods measure the pool again
        with self.selection_timer:
            drawn = self.method.draw(progress.round)
            order = self.method.order(progress.round, drawn)
            plan = self.selector.pack(drawn, order, self.budget - progress.tokens)

        enter_phase("waiting for the device and the plan", progress.round)
        header = read_header(plan, self.selector)
        if not header.steps:
            return None
        self._prefetch(plan, header)

        steps: list[StepStats] = []
        rates, tokens = [], progress.tokens
        for step in header.steps:
            rates.append(learning_rate(self.options, tokens / self.budget))
            steps.append(self.train_step(plan, header, step, progress.step + len(steps), rates[-1]))
            tokens += header.tokens[step]

        with self.selection_timer:
            stats = self.selector.learn(plan)
            self.loss_change.finish_round(plan.cluster)
        device_time.stop()
        values = HostCopy(RoundValues(steps, stats, plan))
        after = Progress(
            round=progress.round + 1,
            step=progress.step + len(steps),
            tokens=tokens,
            seconds=progress.seconds + time.perf_counter() - started,
            selection_seconds=progress.selection_seconds + refresh_seconds + self.selection_timer.take(),
            scoring_seconds=progress.scoring_seconds + scoring_seconds,
        )
        return Round(values, header, rates, self.selector.samples.num_samples, progress, after, device_time)

    def train_step(self, plan: Plan, header: Header, step: int, number: int, rate: float) -> StepStats:
        """One optimizer step: step `step` of the plan, the run's `number`-th, at learning rate `rate`.

        A step whose loss or gradient is not finite changes nothing, on any rank (finite.py); the logs tell the host of
        it.
        """
        # One denominator for the whole step: its response tokens over all ranks and micro-batches. Every rank has the
        # whole plan.
        token_weight = 1.0 / plan.rows[step].sum().clamp(min=1).float()  # a step may have none: its loss is 0

        enter_step_phase("forward and backward", number)
        losses = self._forward_backward(plan, header, step, number, token_weight)
        enter_step_phase("gradient norm and optimizer", number)
        norm, skipped, first_order = self._update_weights(number, rate)

        enter_step_phase("gathering the samples' losses", number)
        ids = plan.sample_ids[step]
        with self.selection_timer:
            estimate = self.loss_change.estimate(plan.cluster, rate, self._sum_over_ranks, first_order, norm)
            loss, change = observe_step(self.selector, ids, losses, estimate, world=self.world, skipped=skipped)
        share = self.selector.samples.rows[ids] * token_weight
        return StepStats(
            loss=(share * loss).sum(),
            grad_norm=norm,
            mean_change=torch.where(skipped, 0.0, (share * change).sum()),
            first_order=norm.new_full((), torch.nan) if first_order is None else first_order,
            skipped=skipped.float(),
        )

    def _forward_backward(
        self, plan: Plan, header: Header, step: int, number: int, token_weight: Tensor
    ) -> list[Tensor]:
        """Add up the step's gradients over this rank's micro-batches; the mean loss of each one's samples, fp32 [B]."""
        losses = []
        for place in range(self.accumulation):
            micro_batch = self.rank * self.accumulation + place
            ids, rows = plan.sample_ids[step, micro_batch], header.rows[step][micro_batch]
            batch = self.store.batch(ids, capacity=self.selector.layout.capacity, num_rows=rows)
            if self.distributed:  # gradients are summed over the ranks once a step, after the last micro-batch
                end_of_step(self.model, place == self.accumulation - 1)
            if self.has_dropout:
                seed_dropout(self.seed, number, micro_batch)
            head = self.model(
                batch,
                token_weight=token_weight,
                signature=self.loss_change.signature,
                held=header.held[step][micro_batch],
            )
            head.loss.backward(loss_gradient(head.sample_nll))
            kept = self.model.head
            weights = head.sample_tokens * token_weight
            self.loss_change.collect(head, weights, kept.hidden_RH, kept.hidden_grad_RH, batch.row_slots)
            losses.append(head.sample_nll)
        return losses

    def _update_weights(self, number: int, rate: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Clip the gradient and take the optimizer's step.

        Returns (gradient norm, whether the step was skipped, <gradient, update> where it is measured).

        All 0-d, the same on every rank.
        """
        norm, factor = clip_gradients(self.trained, self.options.max_grad_norm)
        skipped = ~norm.isfinite()
        before = inner_product(self.trained) if self.loss_change.wants_first_order(number) else None
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        step_unless(self.optimizer, skipped)
        first_order = None
        if before is not None:
            # <G, dtheta>: gradients were scaled by `factor`, the batch loss's own were not.
            change = (inner_product(self.trained) - before) / factor
            first_order = self._sum_over_ranks(change).float().to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        return norm.to(self.device), skipped.to(self.device), first_order  # offloaded parameters have them on the host

    def _refresh(self, progress: Progress) -> tuple[float, float]:
        """Let the method measure the pool again: (seconds that its choice took, seconds of forward passes)."""
        started, before = time.perf_counter(), self.scorer.seconds
        self.selector.refresh(progress.round, progress.tokens / self.budget, self.scorer)
        scoring = self.scorer.seconds - before
        return time.perf_counter() - started - scoring, scoring

    def _prefetch(self, plan: Plan, header: Header) -> None:
        """Tell a pool that is kept on the host which micro-batches of this rank come next."""
        if self.store.wants_prefetch:
            ids = plan.sample_ids.cpu()  # only such pools read it: their gathering needs the ids on the host
            first = self.rank * self.accumulation
            self.store.prefetch(ids[header.steps, first : first + self.accumulation].flatten(0, 1))

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return sum_over_ranks(value, self.world)
