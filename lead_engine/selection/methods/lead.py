"""`lead`: a bandit over difficulty clusters, dynamic uncertainty inside them (arXiv 2505.07437), every part on a switch."""

from __future__ import annotations

import torch
from torch import Tensor

from lead_engine.config import SelectionConfig
from lead_engine.pool.state import PoolState
from lead_engine.selection.bandit import Bandit, RewardScale
from lead_engine.selection.methods.base import Draw, Method, Order
from lead_engine.selection.plan import Plan
from lead_engine.selection.samples import Samples, count
from lead_engine.selection.unseen import CellEstimates
from lead_kernels import select_topk
from lead_kernels.select_topk import OFFSETS

DRAW, RANK, ROUND_OFF = 0, 2, 3  # random streams
LEAST = 1e-6  # nats; a logarithm is taken of U
UNIT = 2.0**18
"""Cells' shares of a round as whole numbers, for `select_topk`."""


class Lead(Method):
    """Eligible are samples that were trained less than max_visits times, are not barred and, with drop_misaligned, not dropped.

    Coarse stage: the bandit's probabilities p over the clusters with eligible samples. `draw=cluster`: a round trains the one cluster that
    is drawn. `draw=mixture`: it trains all of them, cluster k's share of the samples being p_k.
    Fine stage: inside a cluster every task gets a quota by its eligible samples (task_power); in it, `ranking` by the rank value. Quotas
    are rounded up or down at random, since a round has few samples for many cells: rounded to the nearest, small tasks would never be
    trained.
    """

    uses_loss_change = True

    def __init__(
        self, samples: Samples, state: PoolState, config: SelectionConfig, order_length: int, seed: int
    ) -> None:
        super().__init__(samples, state, config, order_length, seed)
        self._num_arms = 1 if config.bandit == "none" else samples.num_clusters
        self._tasks = samples.num_tasks if config.use_tasks else 1
        self.arm = samples.cluster if self._num_arms > 1 else torch.zeros_like(samples.cluster, dtype=torch.uint8)
        self.cell = (
            self.arm if self._tasks == 1 else samples.task if self._num_arms == 1 else samples.cell
        )  # an arm's part of a task
        self.size = torch.zeros(self._num_arms * self._tasks, dtype=torch.int64, device=samples.device)
        self.count_open()
        sizes = self._arm_sizes().float()
        prior = (
            sizes / sizes.sum().clamp(min=1) if config.prior == "size" else torch.full_like(sizes, 1 / self._num_arms)
        )
        self.bandit = Bandit(config, prior)
        self.reward_scale = RewardScale(samples.device)
        self.answer_share = samples.rows[:-1] / samples.lengths if config.rank_by != "utility" else None
        self.unseen = CellEstimates(config, samples) if config.unseen != "initial" else None

    @property
    def num_arms(self) -> int:
        return self._num_arms

    def open_samples(self) -> Tensor:
        """Who is eligible: bool [N]."""
        unspent = (self.samples.visits[:-1] < self.config.max_visits) & ~self.samples.barred[:-1]
        return unspent & ~self.samples.dropped if self.config.drop_misaligned else unspent

    def draw(self, round: int) -> Draw:
        uniform = self.uniform(DRAW, self.samples.scalar(round))
        cluster, probabilities = self.bandit.draw(self._arm_sizes() > 0, uniform)
        if self.config.draw == "mixture":
            cluster = torch.full_like(cluster, -1)
        return Draw(cluster, probabilities)

    def order(self, round: int, drawn: Draw) -> Order:
        utility = self.samples.utility if self.unseen is None else self.unseen.utility()
        eligible, parts = self.open_samples(), drawn.probabilities
        if self.config.draw == "cluster":  # the mixture in which one arm has all
            parts = (torch.arange(self._num_arms, device=parts.device) == drawn.cluster).to(parts.dtype)
            eligible &= self.arm == drawn.cluster  # its shares leave the others out already; this is faster
        rank = self._rank(utility[:-1])
        cells = self.size.shape[0]
        offset = (
            self.uniform(ROUND_OFF, self.samples.scalar(round), torch.arange(cells, device=rank.device)) * OFFSETS
        ).long()
        order = select_topk(rank, eligible, self.cell, cells, self.order_length, self._shares(parts), offset)
        return Order(order, utility)

    def observe(self, sample_ids: Tensor, loss: Tensor, loss_change: Tensor) -> None:
        if self.unseen is not None:
            self.unseen.observe(sample_ids, loss)

    def learn(self, plan: Plan, trained: Tensor, loss_drop: Tensor) -> Tensor:
        """The reward of an arm is the mean fall of U of its samples that were trained; those whose loss is not a number do not count."""
        ids = self.samples.real(plan.sample_ids)
        closed = trained & (self.samples.visits[plan.sample_ids] == self.config.max_visits)
        closed |= self.samples.barred[plan.sample_ids]  # in this round: none of these would have been planned
        self.size -= count(self.cell[ids], closed, self.size.shape[0])

        counts = trained & loss_drop.isfinite()
        arm = torch.where(counts, self.arm[ids].long(), -1).reshape(-1)
        member_KP = (
            arm == torch.arange(self._num_arms, device=arm.device)[:, None]
        )  # a sum for each arm, in a fixed order
        number = member_KP.sum(1)
        raw = torch.where(member_KP, loss_drop.reshape(-1), 0.0).sum(1) / number.clamp(min=1)
        seen = number > 0
        scaled = self.reward_scale.scale(raw, seen)
        if self.config.draw == "mixture":
            self.bandit.update_all(scaled, seen)
        else:
            one = plan.cluster.view(1)
            self.bandit.update(plan.cluster, plan.probabilities, scaled.gather(0, one)[0], seen.gather(0, one)[0])
        return (number * scaled).sum() / number.sum().clamp(min=1)

    def state_dict(self) -> dict[str, Tensor]:
        rewards = {"reward_low": self.reward_scale.low, "reward_high": self.reward_scale.high}
        state = {"open": self.size, "log_weights": self.bandit.log_weights, **rewards}
        return state | (self.unseen.state_dict() if self.unseen is not None else {})

    def count_open(self) -> None:
        """Eligible samples of every cell, by their visits; from then on they are counted down, at the end of every round. In the middle of
        one the count is therefore not what the visits say: it is part of the state.
        """
        self.size.copy_(count(self.cell, self.open_samples(), self.size.shape[0]))

    def _arm_sizes(self) -> Tensor:
        """Eligible samples of each arm: int64 [K]."""
        return self.size.view(self._num_arms, -1).sum(1)

    def _shares(self, parts: Tensor) -> Tensor:
        """The cells' shares of a round, parts_k n_kj^a / sum_j n_kj^a for arm k's task j and a = task_power, in whole numbers: int64 [K J].

        At least 1 where anyone is left and the arm has a part.
        """
        size_KJ = self.size.view(self._num_arms, -1)
        claim_KJ = torch.where(size_KJ > 0, size_KJ.float() ** self.config.task_power, 0.0)
        share_KJ = parts[:, None] * claim_KJ / claim_KJ.sum(1, keepdim=True).clamp(min=1)
        return torch.where(share_KJ > 0, (share_KJ * UNIT).long().clamp(min=1), 0).view(-1)

    def _rank(self, utility: Tensor) -> Tensor:
        """What the highest of comes first: fp32 [N].

        soft: by log(value^power) + Gumbel noise; the order is then that of draws without replacement with probabilities in proportion to
        value^power (Gumbel top-k: Kool, van Hoof, Welling, "Stochastic Beams and Where to Find Them", ICML 2019).

        A sample keeps its noise until it is trained. With new noise every round, a sample that did not fit into a round's last micro-batch
        would not come first in the next, and long samples, which fit more seldom, would be trained less often than they are drawn.
        """
        if self.config.ranking == "hard":
            return self._value(utility)
        ids = torch.arange(self.samples.num_samples, device=utility.device)
        noise = self.uniform(RANK, self.samples.visits[:-1].long(), ids)
        if self.config.ranking == "random":
            return noise
        noise = noise.add_(2.0**-25).clamp_(max=1 - 2.0**-24)  # in (0, 1): both logarithms are finite
        return (
            self._value(utility).clamp_(min=LEAST).log_().mul_(self.config.soft_power).sub_(noise.log_().neg_().log_())
        )

    def _value(self, utility: Tensor) -> Tensor:
        """The rank value: fp32 [N], not a view of anything."""
        if self.answer_share is None:
            return utility.clone()
        return self.answer_share.clone() if self.config.rank_by == "answers" else utility * self.answer_share
