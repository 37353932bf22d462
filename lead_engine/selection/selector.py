"""A round of selection: plan it, observe its optimizer steps, learn from it.

Shapes: N samples, K arms (clusters), S steps a round, M micro-batches a step over all ranks, B slots a micro-batch.
Sample id N is the dummy of empty slots; vectors that are indexed by planned ids have an entry for it, at their end.

What lies on the device, in bytes a sample: utility 4, visits 4, tokens 8, response tokens 4, dropped 1, cluster and task 1 each (2
where there are more than 256 of them; another 1 for what stands in for them without a bandit or without tasks). That is 23: 14 MB for
600 thousand samples, 2.3 GB for 100 million. While it plans, a round needs 3 more (masks) and, for LEAD, the scratch of `select_topk`,
which does not grow with the pool; a pass in random order needs about 40 more (keys of 8 bytes, and what computes them).

Every rank holds the same state and computes the same plan: random numbers are functions of (seed, round) or of
(seed, pass, sample id), and statistics arrive gathered in one fixed order. Between construction and `state_dict`
the host reads nothing from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lead_engine.config import Method, SelectionConfig
from lead_engine.errors import UserError
from lead_engine.pool.state import PoolState
from lead_engine.selection import counter_rng
from lead_engine.selection.bandit import Bandit, RewardScale
from lead_kernels import PackedPlan, groups_present, idu_update, pack_plan, select_topk

DRAW, SHUFFLE = 0, 1  # random streams: the bandit's draw, the order of a pass


@dataclass(frozen=True)
class Layout:
    """The static shape of a round."""

    steps: int
    """S, optimizer steps."""
    micro_batches: int
    """M, micro-batches of one optimizer step over all ranks."""
    slots: int
    """B, most samples in one micro-batch."""
    capacity: int
    """T, token places in one micro-batch."""


class Plan(NamedTuple):
    """One round's samples, packed.

    Steps are short or empty, the last ones first, where samples or budget end; a plan of 0 tokens means that nothing
    is left.
    """

    cluster: Tensor  # int64 [], the arm drawn (0 where there is but one)
    probabilities: Tensor  # fp32 [K], those it was drawn with
    sample_ids: Tensor  # int64 [S, M, B], N in empty slots; no sample twice
    tokens: Tensor  # int64 [S, M], tokens in a micro-batch
    rows: Tensor  # int64 [S, M], response tokens that count in a micro-batch
    utility: Tensor  # fp32 [S, M, B], U when planned: what the reward is measured from
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


class Selector:
    """LEAD (arXiv 2505.07437: a bandit over clusters, dynamic uncertainty inside) or a random order, in one interface.

    `lead`: the bandit draws a cluster among those with eligible samples (not dropped, visits < max_visits); inside it
    every task gets a quota in proportion to its eligible samples, the highest U first. U starts as `state.utility`.

    `random`, `full`: the whole pool, dropped samples too, in passes. Pass p is one fixed permutation, by
    order_keys(seed, p, id), so the sequence of samples and their packing are the same whatever S. To keep that, a
    round never crosses the end of a pass: its last steps are short or empty instead. U and visits are updated as for
    `lead`, for the reports.

    Args: `lengths` int64 [N], tokens, and `response_rows` int64 [N], counted response tokens, of each sample.
    Raises UserError if a sample is longer than a micro-batch.
    """

    def __init__(
        self,
        state: PoolState,
        lengths: Tensor,
        response_rows: Tensor,
        *,
        method: Method,
        config: SelectionConfig,
        layout: Layout,
        seed: int,
        device: torch.device | str,
    ) -> None:
        _check_lengths(lengths, len(state.utility), layout)
        device = torch.device(device)
        self.method, self.config, self.layout, self.seed, self.device = method, config, layout, seed, device
        self.num_samples = len(state.utility)
        self.num_tasks, self.num_clusters = len(state.task_names), state.num_clusters
        by_cluster = method == "lead" and config.bandit != "none"
        self.num_arms = state.num_clusters if by_cluster else 1

        self.lengths = lengths.to(device)
        self.rows = F.pad(response_rows.to(device, torch.int32), (0, 1))
        self.cluster = state.cluster.to(_narrowest(self.num_clusters)).to(device)
        self.task = state.task.to(_narrowest(self.num_tasks)).to(device)
        self.dropped = state.dropped.to(device)
        self.arm = self.cluster if by_cluster else torch.zeros_like(self.cluster, dtype=torch.uint8)
        self.quota_task = self.task if config.use_tasks else torch.zeros_like(self.task, dtype=torch.uint8)
        self.num_quotas = self.num_tasks if config.use_tasks else 1

        self.utility = F.pad(state.utility.to(device, torch.float32), (0, 1))
        self.visits = torch.zeros(self.num_samples + 1, dtype=torch.int32, device=device)
        self.bandit = Bandit(config, self.num_arms, device)
        self.reward_scale = RewardScale(device)

    def plan(self, round: int, max_tokens: int | Tensor) -> Plan:
        """The samples of round `round` (0, 1, ...), of at most `max_tokens` tokens together."""
        shape = self.layout
        if self.method == "lead":
            cluster, probabilities, eligible = self._draw(round)
            order = self._lead_order(eligible)
        else:
            cluster = torch.zeros((), dtype=torch.int64, device=self.device)
            probabilities, order = torch.ones(1, device=self.device), self._pass_order()
        packed = self._pack(order, max_tokens)
        ids = packed.sample_ids.view(shape.steps, shape.micro_batches, shape.slots)
        tokens = packed.tokens.view(shape.steps, shape.micro_batches)
        return Plan(cluster, probabilities, ids, tokens, self.rows[ids].sum(-1), self.utility[ids], self.visits[ids])

    def observe(self, sample_ids: Tensor, loss: Tensor, change: Tensor) -> None:
        """Update U and visits by one optimizer step: ids, losses and estimated changes of all ranks, [M, B] each."""
        ids, loss, change = sample_ids.reshape(-1), loss.reshape(-1), change.reshape(-1)
        idu_update(self.utility, self.visits, ids, loss, change, self.config.smoothing)

    def finish_round(self, plan: Plan) -> RoundStats:
        """Reward the plan's cluster by how far its samples' U has fallen, once all its steps are observed.

        Only samples whose visits rose since the plan count, so a round that was ended early is judged by what it
        trained.
        """
        ids = plan.sample_ids
        trained = (self.visits[ids] > plan.visits) & (ids < self.num_samples)
        samples = trained.sum()

        def mean(values: Tensor) -> Tensor:
            return torch.where(trained, values, 0.0).sum() / samples.clamp(min=1)

        now = self.utility[ids]
        raw = mean(plan.utility - now)
        reward = self.reward_scale.scale(raw, samples > 0)
        self.bandit.update(plan.cluster, plan.probabilities, reward, samples > 0)
        real = ids.clamp(max=self.num_samples - 1)
        per_task = _count(self.task[real], trained, self.num_tasks)
        per_cluster = _count(self.cluster[real], trained, self.num_clusters)
        return RoundStats(raw, reward, mean(plan.utility), mean(now), samples, per_task, per_cluster)

    def state_dict(self) -> dict[str, Tensor]:
        """The state itself, not a copy: all that later plans depend on besides the constructor's arguments."""
        return {
            "utility": self.utility,
            "visits": self.visits,
            "log_weights": self.bandit.log_weights,
            "reward_low": self.reward_scale.low,
            "reward_high": self.reward_scale.high,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a `state_dict`; UserError if it belongs to another pool or another number of clusters."""
        own = self.state_dict()
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise UserError(
                    f"--resume: the checkpoint's {name!r} has shape {tuple(state[name].shape)}, this run's has "
                    f"{tuple(tensor.shape)}; give the --pool, --method and --selection.bandit that the run began with"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def _draw(self, round: int) -> tuple[Tensor, Tensor, Tensor]:
        """LEAD's coarse stage: (cluster, probabilities, who is eligible in it: bool [N])."""
        open_samples = (self.visits[:-1] < self.config.max_visits) & ~self.dropped
        available = groups_present(open_samples, self.arm, self.num_arms)
        uniform = counter_rng.uniform(self.seed, self._scalar(DRAW), self._scalar(round))
        cluster, probabilities = self.bandit.draw(available, uniform)
        return cluster, probabilities, open_samples & (self.arm == cluster)

    def _lead_order(self, eligible: Tensor) -> Tensor:
        """LEAD's fine stage: int64 [S*M*B]."""
        return select_topk(self.utility[:-1], eligible, self.quota_task, self.num_quotas, self._places())

    def _pass_order(self) -> Tensor:
        """The next S*M*B ids of the current pass: those visited least, by keys of the pass and the id alone."""
        visits = self.visits[:-1]
        current = visits.amin()
        ids = torch.arange(self.num_samples, device=self.device)
        keys = counter_rng.order_keys(self.seed, self._scalar(SHUFFLE), current.long(), ids)
        keys = torch.where(visits == current, keys, torch.iinfo(torch.int64).max)
        places = min(self._places(), self.num_samples)
        keys, order = keys.topk(places, largest=False, sorted=True)
        order = torch.where(keys < 1 << counter_rng.ORDER_BITS, order, self.num_samples)
        return F.pad(order, (0, self._places() - places), value=self.num_samples)

    def _pack(self, order: Tensor, max_tokens: int | Tensor) -> PackedPlan:
        shape = self.layout
        return pack_plan(
            order,
            self.lengths,
            num_bins=shape.steps * shape.micro_batches,
            capacity=shape.capacity,
            slots=shape.slots,
            max_tokens=max_tokens,
        )

    def _places(self) -> int:
        return self.layout.steps * self.layout.micro_batches * self.layout.slots

    def _scalar(self, value: int) -> Tensor:
        """A host number on the device, by a fill: a copy from pageable memory would make the host wait."""
        return torch.full((), value, dtype=torch.int64, device=self.device)


def _check_lengths(lengths: Tensor, num_samples: int, layout: Layout) -> None:
    if lengths.shape != (num_samples,) or num_samples == 0:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)} for a pool of {num_samples} samples")
    longest = int(lengths.max())
    if longest > layout.capacity:
        raise UserError(
            f"--batch.capacity {layout.capacity}: must be at least {longest}, the tokens of the pool's longest sample; "
            "raise it, or prepare the pool with a smaller --max-length"
        )


def _narrowest(count: int) -> torch.dtype:
    """The smallest integer type that holds 0 to count - 1: planning reads clusters and tasks of the whole pool."""
    return torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32


def _count(index: Tensor, mask: Tensor, size: int) -> Tensor:
    """int64 [size]: how often each index occurs where `mask` holds. (`bincount` would make the host wait.)"""
    counts = torch.zeros(size, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index.reshape(-1).long(), mask.reshape(-1).long())
