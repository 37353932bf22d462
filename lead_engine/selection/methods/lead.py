"""`lead`: a bandit over difficulty clusters, dynamic uncertainty inside them (arXiv 2505.07437)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from lead_engine.config.bounds import Bounds
from lead_engine.config.checks import require
from lead_engine.config.methods import MethodOptions
from lead_engine.config.reads import Table, one_of
from lead_engine.pool.state import PoolState
from lead_engine.selection.bandit import Bandit, BanditKind, RewardScale
from lead_engine.selection.loss_change import LossChange, LossChangeKind, make_loss_change
from lead_engine.selection.methods.base import Draw, Method, Order
from lead_engine.selection.plan import Plan
from lead_engine.selection.samples import Samples, count
from lead_engine.selection.unseen import CellEstimates, Unseen
from lead_kernels import select_topk
from lead_kernels.select_topk import OFFSETS

DRAW, RANK, ROUND_OFF = 0, 2, 3  # random streams
LEAST = 1e-6  # nats; a logarithm is taken of U
SOFT_POWER = 2.0
"""Of soft ranking: a sample is drawn with probability ~ value ** 2."""
UNIT = 2.0**18
"""Cells' shares of a round as whole numbers, for `select_topk`."""
POWERS = {"sqrt": 0.5, "proportional": 1.0, "equal": 0.0, "none": 1.0}
"""Of a task's eligible samples, in its quota."""


@dataclass(frozen=True)
class ClusterOptions(MethodOptions):
    """Clusters, quotas and ranking, of `lead` and `rescore`."""

    read_with: ClassVar[Table] = {"gamma": {"bandit": one_of("exp3", "exp3s")}}
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "bandit": "exp3",
            "gamma": 0.1,
            "draw": "cluster",
            "ranking": "hard",
            "task_quotas": "proportional",
            "drop_misaligned": True,
            "max_visits": 4,
            "smoothing": 0.1,
        }
    }
    """`paper`: the setting of arXiv 2505.07437. The defaults are the best measured here, docs/STUDY.md."""

    bandit: BanditKind = "exp3"
    """Who sets the clusters' probabilities: EXP3, EXP3.S (rewards drift), nobody (uniform: they stay as they begin);
    none takes the pool for one cluster.
    """
    gamma: Annotated[float, Bounds(gt=0, le=1)] = 0.1
    """Exploration share of EXP3."""
    draw: Literal["cluster", "mixture"] = "mixture"
    """What a round trains: all clusters in the proportions of their probabilities, which begin as the clusters' sizes;
    or the one that is drawn, all alike at first (the paper's).
    """
    ranking: Literal["hard", "soft", "random"] = "soft"
    """Inside a cluster and task: the highest U first (the paper's); a draw with probability ~ (U x answer tokens /
    tokens) squared; or any.
    """
    task_quotas: Literal["sqrt", "proportional", "equal", "none"] = "sqrt"
    """A task's quota: the square root of its eligible samples, in proportion to them (the paper's), alike, or none."""
    drop_misaligned: bool = False
    """Never train samples whose answer the instruction does not make likelier (the paper's)."""
    max_visits: Annotated[int, Bounds(ge=1)] = 4
    """How often one sample may be trained."""
    smoothing: Annotated[float, Bounds(ge=0, lt=1)] = 0.1
    """b of U <- (1 - b) (loss + change) + b U."""


@dataclass(frozen=True)
class LeadOptions(ClusterOptions):
    """LEAD's options (arXiv 2505.07437)."""

    flags: ClassVar[str] = "--lead."
    read_with: ClassVar[Table] = {
        **ClusterOptions.read_with,
        "sketch_dim": {"loss_change": one_of("inner", "paper")},
        "calibrate_every": {"loss_change": one_of("inner")},
    }
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {**ClusterOptions.recipes["paper"], "loss_change": "paper", "unseen": "initial"}
    }

    loss_change: LossChangeKind = "inner"
    """How a step's effect on its own samples is estimated: gradient inner product at the last hidden state, the
    paper's, or not at all.
    """
    sketch_dim: Annotated[int, Bounds(ge=0, le=2**12, zero="exact")] = 64
    """q, width of the random projections of these gradients (q x q numbers a sample); 0: exact, keeps [T, H] twice."""
    calibrate_every: Annotated[int, Bounds(ge=1)] = 8
    """Optimizer steps between two measurements of the step's true first-order loss change."""
    unseen: Unseen = "initial"
    """U of samples not trained yet: what `prepare` measured; moved by how far cluster and task have come since; or an
    estimate alone.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.draw == "cluster" or self.loss_change != "paper",
            "--lead.loss-change",
            self.loss_change,
            "inner or none with --lead.draw mixture (the paper's change is that of one cluster)",
        )


class Clusters(Method):
    """A bandit over clusters, quotas for tasks, and a ranking by U: what `lead` and `rescore` share.

    Eligible are samples that were trained less than max_visits times, are not barred and, with drop_misaligned, not
    dropped. Coarse stage: the bandit's probabilities p over the clusters with eligible samples. `draw=cluster`: a round
    trains the one cluster that is drawn. `draw=mixture`: it trains all of them, cluster k's share of the samples being
    p_k. Fine stage: inside a cluster every task gets a quota by its eligible samples; in it, `ranking` by the rank
    value. Quotas are rounded up or down at random, since a round has few samples for many cells: rounded to the
    nearest, small tasks would never be trained.
    """

    options: ClusterOptions
    unseen: CellEstimates | None = None

    def __init__(
        self, samples: Samples, state: PoolState, options: ClusterOptions, order_length: int, seed: int
    ) -> None:
        super().__init__(samples, state, options, order_length, seed)
        self.smoothing = options.smoothing
        self._num_arms = 1 if options.bandit == "none" else samples.num_clusters
        self._tasks = 1 if options.task_quotas == "none" else samples.num_tasks
        self.arm = samples.cluster if self._num_arms > 1 else torch.zeros_like(samples.cluster, dtype=torch.uint8)
        self.cell = self._cells()
        self.open = torch.zeros(self._num_arms * self._tasks, dtype=torch.int64, device=samples.device)
        """Eligible samples of every cell."""
        self.count_open()
        sizes = self._arm_sizes().float()
        if options.draw == "mixture":
            prior = sizes / sizes.sum().clamp(min=1)
        else:
            prior = torch.full_like(sizes, 1 / self._num_arms)
        self.bandit = Bandit(options.bandit, options.gamma, prior)
        self.reward_scale = RewardScale(samples.device)
        self.answer_share = samples.rows[:-1] / samples.lengths if options.ranking == "soft" else None

    @classmethod
    def describe(cls, options: ClusterOptions) -> str:
        coarse = f"bandit {options.bandit} ({options.draw})"
        fine = f"ranking {options.ranking}, task quotas {options.task_quotas}, at most {options.max_visits} visits"
        return f"{coarse}; {fine}"

    @property
    def num_arms(self) -> int:
        return self._num_arms

    def open_samples(self) -> Tensor:
        """Who is eligible: bool [N]."""
        unspent = (self.samples.visits[:-1] < self.options.max_visits) & ~self.samples.barred[:-1]
        return unspent & ~self.samples.dropped if self.options.drop_misaligned else unspent

    def draw(self, round: int) -> Draw:
        uniform = self.uniform(DRAW, self.samples.scalar(round))
        cluster, probabilities = self.bandit.draw(self._arm_sizes() > 0, uniform)
        if self.options.draw == "mixture":
            cluster = torch.full_like(cluster, -1)
        return Draw(cluster, probabilities)

    def order(self, round: int, drawn: Draw) -> Order:
        utility = self.samples.utility if self.unseen is None else self.unseen.utility()
        eligible, parts = self.open_samples(), drawn.probabilities
        if self.options.draw == "cluster":  # the mixture in which one arm has all
            parts = (torch.arange(self._num_arms, device=parts.device) == drawn.cluster).to(parts.dtype)
            eligible &= self.arm == drawn.cluster  # its shares leave the others out already; this is faster
        rank = self._rank(utility[:-1])
        cells = self.open.shape[0]
        offset = (
            self.uniform(ROUND_OFF, self.samples.scalar(round), torch.arange(cells, device=rank.device)) * OFFSETS
        ).long()
        order = select_topk(rank, eligible, self.cell, cells, self.order_length, self._shares(parts), offset)
        return Order(order, utility)

    def learn(self, plan: Plan, trained: Tensor, loss_drop: Tensor) -> Tensor:
        """The reward of an arm is the mean fall of U of its samples that were trained; those whose loss is not a number
        do not count.
        """
        ids = self.samples.real(plan.sample_ids)
        closed = trained & (self.samples.visits[plan.sample_ids] == self.options.max_visits)
        closed |= self.samples.barred[plan.sample_ids]  # in this round: none of these would have been planned
        self.open -= count(self.cell[ids], closed, self.open.shape[0])

        counts = trained & loss_drop.isfinite()
        arm = torch.where(counts, self.arm[ids].long(), -1).reshape(-1)
        # One sum for each arm, in a fixed order: scatter_add_ would add in any order on a GPU.
        member_KP = arm == torch.arange(self._num_arms, device=arm.device)[:, None]
        number = member_KP.sum(1)
        raw = torch.where(member_KP, loss_drop.reshape(-1), 0.0).sum(1) / number.clamp(min=1)
        seen = number > 0
        scaled = self.reward_scale.scale(raw, seen)
        if self.options.draw == "mixture":
            self.bandit.update_all(scaled, seen)
        else:
            one = plan.cluster.view(1)
            self.bandit.update(plan.cluster, plan.probabilities, scaled.gather(0, one)[0], seen.gather(0, one)[0])
        return (number * scaled).sum() / number.sum().clamp(min=1)

    def state_dict(self) -> dict[str, Tensor]:
        rewards = {"reward_low": self.reward_scale.low, "reward_high": self.reward_scale.high}
        return {"open": self.open, "log_weights": self.bandit.log_weights, **rewards}

    def count_open(self) -> None:
        """Eligible samples of every cell, by their visits; from then on they are counted down, at the end of every
        round. In the middle of one the count is therefore not what the visits say: it is part of the state.
        """
        self.open.copy_(count(self.cell, self.open_samples(), self.open.shape[0]))

    def _cells(self) -> Tensor:
        """Every sample's cell, an arm's part of a task: [N]."""
        if self._tasks == 1:
            return self.arm
        return self.samples.task if self._num_arms == 1 else self.samples.cell

    def _arm_sizes(self) -> Tensor:
        """Eligible samples of each arm: int64 [K]."""
        return self.open.view(self._num_arms, -1).sum(1)

    def _shares(self, parts: Tensor) -> Tensor:
        """The cells' shares of a round in whole numbers: int64 [K J].

        For arm k's task j it is parts_k n_kj^a / sum_j n_kj^a, a the power of `task_quotas`; at least 1 where anyone is
        left and the arm has a part.
        """
        size_KJ = self.open.view(self._num_arms, -1)
        claim_KJ = torch.where(size_KJ > 0, size_KJ.float() ** POWERS[self.options.task_quotas], 0.0)
        share_KJ = parts[:, None] * claim_KJ / claim_KJ.sum(1, keepdim=True).clamp(min=1)
        return torch.where(share_KJ > 0, (share_KJ * UNIT).long().clamp(min=1), 0).view(-1)

    def _rank(self, utility: Tensor) -> Tensor:
        """What the highest of comes first: fp32 [N].

        soft: by log(value^power) + Gumbel noise; the order is then that of draws without replacement with probabilities
        in proportion to value^power (Gumbel top-k: Kool, van Hoof, Welling, "Stochastic Beams and Where to Find Them",
        ICML 2019).

        A sample keeps its noise until it is trained. With new noise every round, a sample that did not fit into a
        round's last micro-batch would not come first in the next, and long samples, which fit more seldom, would be
        trained less often than they are drawn.
        """
        if self.options.ranking == "hard":
            return utility.clone()
        ids = torch.arange(self.samples.num_samples, device=utility.device)
        noise = self.uniform(RANK, self.samples.visits[:-1].long(), ids)
        if self.options.ranking == "random":
            return noise
        noise = noise.add_(2.0**-25).clamp_(max=1 - 2.0**-24)  # in (0, 1): both logarithms are finite
        assert self.answer_share is not None
        value = utility * self.answer_share
        return value.clamp_(min=LEAST).log_().mul_(SOFT_POWER).sub_(noise.log_().neg_().log_())


class Lead(Clusters):
    """Clusters by a bandit, ranked by dynamic uncertainty U <- (1 - b) (loss + change) + b U."""

    Options = LeadOptions
    options: LeadOptions

    def __init__(self, samples: Samples, state: PoolState, options: LeadOptions, order_length: int, seed: int) -> None:
        super().__init__(samples, state, options, order_length, seed)
        self.unseen = None if options.unseen == "initial" else CellEstimates(options.unseen, samples)

    @classmethod
    def describe(cls, options: LeadOptions) -> str:  # type: ignore[override]
        form = f"sketch, q = {options.sketch_dim}" if options.sketch_dim else "exact"
        change = options.loss_change if options.loss_change == "none" else f"{options.loss_change} ({form})"
        utility = f"loss change {change}, b = {options.smoothing:g}, unseen: {options.unseen}"
        return f"{super().describe(options)}; U: {utility}"

    def loss_change(self, hidden_size: int) -> LossChange:
        return make_loss_change(
            self.options.loss_change,
            hidden_size,
            self.num_arms,
            self.samples.device,
            self.seed,
            sketch_dim=self.options.sketch_dim,
            calibrate_every=self.options.calibrate_every,
        )

    def observe(self, sample_ids: Tensor, loss: Tensor, loss_change: Tensor) -> None:
        if self.unseen is not None:
            self.unseen.observe(sample_ids, loss)

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | (self.unseen.state_dict() if self.unseen is not None else {})
