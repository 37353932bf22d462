"""A round of selection: plan it, observe its optimizer steps, learn from it.

Shapes: N samples, K arms (clusters), S steps a round, M micro-batches a step over all ranks, B slots a micro-batch.
Sample id N is the dummy of empty slots; vectors that are indexed by planned ids have an entry for it, at their end.

The pool's vectors (samples.py) lie on the device. Every rank holds the same state and computes the same plan: random
numbers are functions of (seed, round) or of (seed, pass, sample id), and statistics arrive gathered in one fixed order.
Between construction and `state_dict` the host reads nothing from the device, but in `refresh`, where a method may have
the pool scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lead_engine.base.errors import UserError
from lead_engine.config.bounds import Seed
from lead_engine.config.methods import MethodName, MethodOptions, find_method, method_options
from lead_engine.config.options import argument, device_argument
from lead_engine.pool.state import PoolState
from lead_engine.selection.counter_rng import mix64
from lead_engine.selection.loss_change import LossChange
from lead_engine.selection.methods.base import Draw, Method, Order, Scorer
from lead_engine.selection.plan import Layout, Plan, RoundStats
from lead_engine.selection.samples import Samples
from lead_kernels import idu_update, pack_plan


class Selector:
    """Plans the rounds that a method orders, and keeps every sample's U and visits.

    Args: `method` is a name of `--method`; `options` its own, as an object or a mapping; `lengths` int64 [N], tokens,
    and `response_rows` int64 [N], counted response tokens, of each sample.
    Raises UserError if a sample is longer than a micro-batch, and for options that cannot be used.
    """

    def __init__(
        self,
        state: PoolState,
        lengths: Tensor,
        response_rows: Tensor,
        *,
        method: str,
        options: MethodOptions | Mapping[str, Any] | None = None,
        layout: Layout,
        seed: int,
        device: torch.device | str,
    ) -> None:
        method = argument(MethodName, method, "Selector(method)")
        layout = argument(Layout, layout, "Selector(layout)")
        seed, device = argument(Seed, seed, "Selector(seed)"), device_argument(device, "Selector(device)")
        _check_lengths(lengths, len(state.utility), layout)
        self.layout = layout
        self.samples = Samples(state, lengths, response_rows, device)
        order_length = layout.steps * layout.micro_batches * layout.slots
        chosen: type[Method] = find_method(method)
        self.method = chosen(self.samples, state, method_options(method, options), order_length, seed)

    def loss_change(self, hidden_size: int) -> LossChange:
        """The method's estimator of what a step does to its own samples, for a model of this hidden size."""
        return self.method.loss_change(hidden_size)

    def refresh(self, round: int, spent: float, scorer: Scorer) -> None:
        """Let the method look at the pool before round `round` is planned; `spent` is the share of the budget that is
        trained.
        """
        self.method.refresh(round, spent, scorer)

    def plan(self, round: int, max_tokens: int | Tensor) -> Plan:
        """Draw, order and pack: the samples of round `round` (0, 1, ...), of at most `max_tokens` tokens together."""
        drawn = self.method.draw(round)
        order = self.method.order(round, drawn)
        return self.pack(drawn, order, max_tokens)

    def pack(self, drawn: Draw, order: Order, max_tokens: int | Tensor) -> Plan:
        """The first samples of an order in micro-batches, of at most `max_tokens` tokens together."""
        shape, samples = self.layout, self.samples
        packed = pack_plan(
            order.sample_ids,
            samples.lengths,
            num_bins=shape.steps * shape.micro_batches,
            capacity=shape.capacity,
            slots=shape.slots,
            max_tokens=max_tokens,
        )
        ids = packed.sample_ids.view(shape.steps, shape.micro_batches, shape.slots)
        tokens = packed.tokens.view(shape.steps, shape.micro_batches)
        rows = samples.rows[ids].sum(-1)
        return Plan(drawn.cluster, drawn.probabilities, ids, tokens, rows, order.utility[ids], samples.visits[ids])

    def sizes(self, plan: Plan) -> Tensor:
        """int64 [4, S, M]: of each micro-batch its tokens, response tokens, slots up to the last sample, and tokens of
        the longest sample.
        """
        pool, ids = self.samples, plan.sample_ids
        real = ids < pool.num_samples
        slots = (real * torch.arange(1, ids.shape[-1] + 1, device=ids.device)).amax(-1)
        longest = torch.where(real, pool.lengths[pool.real(ids)], 0).amax(-1)
        return torch.stack([plan.tokens, plan.rows, slots, longest])

    def observe(self, sample_ids: Tensor, loss: Tensor, loss_change: Tensor) -> None:
        """Update U and visits by one optimizer step: ids, losses and their estimated changes of all ranks, [M, B]
        each.
        """
        ids, loss, loss_change = sample_ids.reshape(-1), loss.reshape(-1), loss_change.reshape(-1)
        self.method.observe(ids, loss, loss_change)
        idu_update(self.samples.utility, self.samples.visits, ids, loss, loss_change, self.method.smoothing)

    def bar(self, sample_ids: Tensor, loss: Tensor, skipped: Tensor) -> Tensor:
        """The ids to observe a step by, which `skipped` (0-d bool) says was not taken: then none, so that nothing is
        learned from it.

        Of a step that was not taken, samples whose own loss is not finite are never planned again.
        """
        barred = self.samples.barred
        bad = skipped & ~loss.isfinite() & (sample_ids < self.samples.num_samples)
        barred.index_put_((sample_ids.reshape(-1),), barred[sample_ids.reshape(-1)] | bad.reshape(-1))
        return torch.where(skipped, self.samples.num_samples, sample_ids)

    def learn(self, plan: Plan) -> RoundStats:
        """Let the method learn from a round, once all its steps are observed.

        Only samples whose visits rose since the plan count, so a round that was ended early is judged by what it
        trained.
        """
        pool, ids = self.samples, plan.sample_ids
        trained = (pool.visits[ids] > plan.visits) & (ids < pool.num_samples)
        now = pool.utility[ids]
        loss_drop = plan.utility - now
        reward = self.method.learn(plan, trained, loss_drop)
        counts = trained & loss_drop.isfinite()

        def mean(values: Tensor) -> Tensor:
            return torch.where(counts, values, 0.0).sum() / counts.sum().clamp(min=1)

        per_task = pool.count(pool.task, ids, trained, pool.num_tasks)
        per_cluster = pool.count(pool.cluster, ids, trained, pool.num_clusters)
        barred = pool.barred[ids]
        return RoundStats(
            mean(loss_drop), reward, mean(plan.utility), mean(now), trained.sum(), per_task, per_cluster, barred
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The state itself, not a copy: all that later plans depend on besides the constructor's arguments."""
        pool = self.samples
        return {"utility": pool.utility, "visits": pool.visits, **self.method.state_dict(), "barred": pool.barred}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a `state_dict`; UserError if it belongs to another pool or another number of clusters."""
        own = self.state_dict()
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise UserError(
                    f"--resume: the checkpoint's {name!r} has shape {tuple(state[name].shape)}, this run's has "
                    f"{tuple(tensor.shape)}; give the --pool, --method and --lead.bandit that the run began with"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.method.loaded()

    def fingerprint(self) -> Tensor:
        """int64 []: a hash of the state's bits. Replicas that agree have the same; it does not depend on device or
        rank.
        """
        total = torch.zeros((), dtype=torch.int64, device=self.samples.device)
        for place, tensor in enumerate(self.state_dict().values()):
            bits = (
                tensor.contiguous()
                .view(torch.uint8 if tensor.dtype == torch.bool else _INTEGER[tensor.element_size()])
                .long()
            )
            where = torch.arange(bits.numel(), device=bits.device).view(bits.shape)
            total = mix64(total + place + mix64(bits ^ mix64(where + 1)).sum())
        return total


_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _check_lengths(lengths: Tensor, num_samples: int, layout: Layout) -> None:
    if lengths.shape != (num_samples,) or num_samples == 0:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)} for a pool of {num_samples} samples")
    longest = int(lengths.max())
    if longest > layout.capacity:
        raise UserError(
            f"--batch.capacity {layout.capacity}: must be at least {longest}, the tokens of the pool's longest sample; "
            "raise it, or prepare the pool with a smaller --max-length"
        )
