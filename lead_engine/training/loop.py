"""The training loop: rounds of selection, and the optimizer steps on what was selected.

    per round:  the method orders the samples, the selector plans S steps of packed micro-batches   (device)
                the plan's header - its micro-batches' sizes - is read                                  (the round's one host read)
    per step:   micro-batches -> loss and backward; clip; AdamW
                what the step did to its own samples is estimated from the loss op's by-products
                all ranks' sample statistics are gathered; U and visits are updated                 (device)
    round's end: reward, bandit update                                                              (device)

Nothing between two headers waits for the device. Metrics of a round leave it by copies that are read after the next header. A step whose
loss or gradient is not finite changes nothing, on any rank (finite.py); the host learns of it with the metrics.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lead_engine.config import OptimizerConfig
from lead_engine.model.attention import Held
from lead_engine.model.dropout import draws_random_numbers, seed_dropout
from lead_engine.model.packed import PackedLM
from lead_engine.model.parallelize import end_of_step
from lead_engine.pool.store import TokenStore
from lead_engine.selection.loss_change import LossChange
from lead_engine.selection.plan import Layout, Plan, RoundStats
from lead_engine.selection.replicas import gather_statistics
from lead_engine.selection.selector import Selector
from lead_engine.training.checkpoint import Progress
from lead_engine.training.device_timer import DeviceInterval, DeviceTimer
from lead_engine.training.finite import check_can_skip, loss_gradient, step_unless
from lead_engine.training.heartbeat import current_phase, enter_phase
from lead_engine.training.host_copy import HostCopy
from lead_engine.training.optimizer import clip_gradients, inner_product, learning_rate
from lead_engine.training.scorer import PoolScorer
from lead_kernels import PackedBatch

ROW_QUANTUM = 128
"""Row counts are rounded up to a multiple of this, so that the head sees few different shapes."""


class Header(NamedTuple):
    """A plan's sizes on the host."""

    tokens: list[int]
    """Tokens of each step; 0 marks a step that the budget or the pool left empty."""
    rows: list[list[int]]
    """Rows (response tokens) of each step's micro-batches, rounded up."""
    held: list[list[Held]]
    """What each step's micro-batches hold."""


class StepStats(NamedTuple):
    """0-d fp32 tensors."""

    loss: Tensor
    grad_norm: Tensor
    mean_change: Tensor
    first_order: Tensor
    skipped: Tensor
    """1 if the step changed nothing, because its loss or gradient was not finite; else 0."""


class RoundValues(NamedTuple):
    """What a round leaves for the logs."""

    steps: list[StepStats]
    stats: RoundStats
    plan: Plan


@dataclass
class Round:
    """A round whose steps were launched. Its values are best read after the next round's header: then they have arrived."""

    values: HostCopy[RoundValues]
    header: Header
    rates: list[float]
    dummy: int
    """The id that marks an empty slot: N."""
    before: Progress
    after: Progress
    lap: DeviceInterval
    """The device's own time from its planning to its end; the host's, in `after`, is ahead of it by up to a round."""


@dataclass
class Engine:
    """Everything that a step touches. A group of one rank may pass distributed=False (no process group is needed then)."""

    model: PackedLM
    optimizer: torch.optim.Optimizer
    selector: Selector
    change: LossChange
    store: TokenStore
    layout: Layout
    options: OptimizerConfig
    rank: int = 0
    world: int = 1
    distributed: bool = True
    scorer: PoolScorer | None = None
    """For methods that measure the pool again; others never ask it."""
    seed: int = 0
    """Of what layers draw (adapters' dropout)."""

    def __post_init__(self) -> None:
        check_can_skip(self.optimizer)
        self.accumulation = self.layout.micro_batches // self.world
        self.device = self.selector.samples.device
        self.watch = DeviceTimer(self.device)
        self.draws = draws_random_numbers(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def rounds(self, progress: Progress, budget_tokens: int) -> Iterator[Round]:
        """Train until the budget is spent or no sample is left; yields every round after its last step was launched."""
        while progress.tokens < budget_tokens:
            started, lap = time.perf_counter(), DeviceInterval(self.device)
            enter_phase("planning", progress.round)
            choosing, scoring = self._refresh(progress, budget_tokens)
            self.watch.start()
            plan = self.selector.plan(progress.round, budget_tokens - progress.tokens)
            self.watch.stop()
            enter_phase("waiting for the device and the plan", progress.round)
            header = read_header(plan, self.selector)
            if sum(header.tokens) == 0:
                return
            if self.store.wants_prefetch:
                self.store.prefetch(self._local(plan, header))
            steps, rates, tokens = [], [], progress.tokens
            for step, step_tokens in enumerate(header.tokens):
                if step_tokens == 0:
                    continue
                rates.append(learning_rate(self.options, tokens / budget_tokens))
                steps.append(self.train_step(plan, header, step, progress.step + len(steps), rates[-1]))
                tokens += step_tokens
            self.watch.start()
            stats = self.selector.learn(plan)
            self.change.finish_round(plan.cluster)
            self.watch.stop()
            lap.stop()
            values = HostCopy(RoundValues(steps, stats, plan))
            before = progress
            progress = Progress(
                before.round + 1,
                before.step + len(steps),
                tokens,
                before.seconds + time.perf_counter() - started,
                before.selection_seconds + choosing + self.watch.take(),
                before.scoring_seconds + scoring,
            )
            yield Round(values, header, rates, self.selector.samples.num_samples, before, progress, lap)

    def _refresh(self, progress: Progress, budget_tokens: int) -> tuple[float, float]:
        """Let the method measure the pool again: (seconds that its choice took, seconds of forward passes)."""
        started, before = time.perf_counter(), self.scorer.seconds if self.scorer else 0.0
        self.selector.refresh(progress.round, progress.tokens / budget_tokens, self.scorer)
        scoring = (self.scorer.seconds if self.scorer else 0.0) - before
        return time.perf_counter() - started - scoring, scoring

    def train_step(self, plan: Plan, header: Header, step: int, global_step: int, rate: float) -> StepStats:
        """One optimizer step on step `step` of the plan."""
        # One denominator for the whole step: its response tokens over all ranks and micro-batches. Every rank has the whole plan.
        token_weight = 1.0 / plan.rows[step].sum().clamp(min=1).float()  # a step may have none: its loss is 0
        losses = []
        enter_phase("forward and backward", current_phase().round, global_step)
        for place in range(self.accumulation):
            batch = self._batch(plan, header, step, place)
            self._reduce_gradients(place == self.accumulation - 1)
            if self.draws:
                seed_dropout(self.seed, global_step, self.rank * self.accumulation + place)
            held = header.held[step][self.rank * self.accumulation + place]
            head = self.model(batch, token_weight=token_weight, signature=self.change.signature, held=held)
            head.loss.backward(loss_gradient(head.sample_nll))
            rows = self.model.head
            self.change.collect(
                head, head.sample_tokens * token_weight, rows.hidden_RH, rows.hidden_grad_RH, batch.row_slots
            )
            losses.append(head.sample_nll)

        enter_phase("gradient norm and optimizer", current_phase().round, global_step)
        norm, factor = clip_gradients(self.trained, self.options.max_grad_norm)
        skip = ~norm.isfinite()  # the same on every rank
        measured = self.change.wants_first_order(global_step)
        before = inner_product(self.trained) if measured else None
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        step_unless(self.optimizer, skip)
        # <G, dtheta>: gradients were scaled by `factor`, the batch loss's own were not.
        first_order = self._all_reduce((inner_product(self.trained) - before) / factor).float() if measured else None
        self.optimizer.zero_grad(set_to_none=True)
        # Of offloaded parameters, these are on the host.
        norm, skip = norm.to(self.device), skip.to(self.device)
        first_order = None if first_order is None else first_order.to(self.device)

        enter_phase("gathering the samples' losses", current_phase().round, global_step)
        self.watch.start()
        change = self.change.estimate(plan.cluster, rate, self._all_reduce, first_order, norm)
        loss, change = self._gather(torch.stack([torch.stack(losses), change]))
        change = torch.maximum(
            change, -loss
        )  # a first-order estimate may overshoot; a cross-entropy cannot fall below zero
        ids = plan.sample_ids[step]
        self.selector.observe(self.selector.bar(ids, loss, skip), loss, change)
        self.watch.stop()
        share = self.selector.samples.rows[ids] * token_weight
        none = norm.new_full((), torch.nan)
        first_order = none if first_order is None else first_order
        return StepStats(
            (share * loss).sum(), norm, torch.where(skip, 0.0, (share * change).sum()), first_order, skip.float()
        )

    def _batch(self, plan: Plan, header: Header, step: int, place: int) -> PackedBatch:
        micro = self.rank * self.accumulation + place
        return self.store.batch(
            plan.sample_ids[step, micro], capacity=self.layout.capacity, num_rows=header.rows[step][micro]
        )

    def _local(self, plan: Plan, header: Header) -> Tensor:
        """This rank's micro-batches of the plan, in the order of training, on the host: int64 [n, B]."""
        ids = plan.sample_ids.cpu()  # only for pools kept on the host: their gathering needs the ids there
        low = self.rank * self.accumulation
        used = [step for step, tokens in enumerate(header.tokens) if tokens]
        return ids[used, low : low + self.accumulation].flatten(0, 1)

    def _reduce_gradients(self, last: bool) -> None:
        if self.distributed:
            end_of_step(self.model, last)

    def _all_reduce(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def _gather(self, local: Tensor) -> Tensor:
        """[n, A, B] of every rank -> [n, M, B], ranks in order."""
        return gather_statistics(local, self.world)


def read_header(plan: Plan, selector: Selector) -> Header:
    """The round's one wait for the device: S x M x 4 integers."""
    tokens, rows, samples, longest = selector.sizes(plan).cpu().tolist()
    held = [[Held(*sizes) for sizes in zip(*step, strict=True)] for step in zip(samples, tokens, longest, strict=True)]
    rounded = [[-(-max(n, 1) // ROW_QUANTUM) * ROW_QUANTUM for n in step] for step in rows]
    return Header([sum(step) for step in tokens], rounded, held)
