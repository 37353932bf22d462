"""Whole simulated runs of LEAD's selection against a literal, slow transcription of its definition."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lead_engine.selection import counter_rng
from lead_engine.selection.methods.lead import DRAW, RANK, ROUND_OFF
from lead_kernels.pack_plan import LOOK_AHEAD

pytestmark = pytest.mark.slow


class SlowLead:
    """Section by section what LEAD says, with loops, Python lists and EXP3's weights as they stand in its paper; and
    its variants.

    `dtype` is the precision of U, rewards and weights: in float64 it is the truth, in float32 it shows what rounding
    alone does.
    """

    def __init__(self, selector, dtype):
        self.config, self.layout, self.seed, self.dtype = (
            selector.method.options,
            selector.layout,
            selector.method.seed,
            dtype,
        )
        with_tasks = self.config.task_quotas != "none"
        self.n, self.tasks = selector.samples.num_samples, selector.samples.num_tasks if with_tasks else 1
        self.lengths, self.rows = selector.samples.lengths.tolist(), selector.samples.rows.tolist()
        self.dropped = selector.samples.dropped.tolist() if self.config.drop_misaligned else [False] * self.n
        one_arm = self.config.bandit == "none"
        self.arms = 1 if one_arm else selector.samples.num_clusters
        self.arm = [0] * self.n if one_arm else selector.samples.cluster.tolist()
        self.task = selector.samples.task.tolist() if with_tasks else [0] * self.n
        self.cell = list(zip(selector.samples.cluster.tolist(), selector.samples.task.tolist(), strict=True))
        self.utility = selector.samples.utility[:-1].numpy().astype(dtype)
        self.visits = [0] * self.n
        sizes = np.array([sum(self.arm[i] == k for i in self.eligible()) for k in range(self.arms)], dtype)
        self.prior = sizes / sizes.sum() if self.config.draw == "mixture" else np.full(self.arms, 1 / self.arms, dtype)
        self.weights = self.prior.copy()
        self.rewards, self.first_visits = [], []

    def eligible(self):
        return [i for i in range(self.n) if not self.dropped[i] and self.visits[i] < self.config.max_visits]

    def probabilities(self):
        p = (1 - self.config.gamma) * self.weights / self.weights.sum() + self.config.gamma * self.prior
        with_samples = {self.arm[i] for i in self.eligible()}
        p = np.array([p[k] if k in with_samples else 0 for k in range(self.arms)], self.dtype)
        return p / p.sum() if p.sum() > 0 else p

    def draw(self, p, round):
        if self.config.draw == "mixture":
            return -1
        uniform = self.uniform(DRAW, round)
        for k in range(self.arms):
            if uniform < p[: k + 1].sum():
                return k
        return 0

    def uniform(self, *counters):
        return float(counter_rng.uniform(self.seed, *(torch.tensor(c) for c in counters)))

    def weighted(self, history, keep):
        """(sum of weights, weighted sum) of the values in `history`, a list of a list a step, oldest first.

        A value's weight falls by `keep` with every later one; those of one step share theirs, as they are seen at once.
        """
        weights, total, left = 0.0, 0.0, 1.0
        for values in reversed(history):
            share = left * (1 - keep ** len(values)) / max(len(values), 1)
            for value in values:
                weights += share
                total += share * value
            left *= keep ** len(values)
        return weights, total

    def believed(self):
        """U of every sample, estimated where it was not trained yet."""
        if self.config.unseen == "initial":
            return self.utility
        everybody = [[value for _, value in step] for step in self.first_visits]
        weight, total = self.weighted(everybody, 0.99)
        mean = total / weight if weight else 0.0
        square = self.weighted([[v**2 for v in step] for step in everybody], 0.99)[1] / weight if weight else 1.0
        deviation = math.sqrt(max(square - mean**2, 0))
        utility, estimate = self.utility.copy(), {}
        for cell in set(self.cell):
            weight, total = self.weighted([[v for c, v in step if c == cell] for step in self.first_visits], 0.95)
            estimate[cell] = total + (1 - weight) * mean
            if self.config.unseen == "estimate":
                estimate[cell] += deviation * (1 - weight)
        for i in range(self.n):
            if self.visits[i] == 0:
                utility[i] = estimate[self.cell[i]] + (self.utility[i] if self.config.unseen == "drift" else 0)
        return utility

    def rank(self, i, utility):
        value = utility[i] * self.rows[i] / self.lengths[i] if self.config.ranking == "soft" else utility[i]
        if self.config.ranking == "hard":
            return value
        noise = self.uniform(RANK, self.visits[i], i)
        if self.config.ranking == "random":
            return noise
        return 2 * math.log(max(value, 1e-6)) - math.log(-math.log(noise + 2.0**-25))

    def ranking(self, cluster, p, round):
        """The next place goes to the cell c with the least (places so far + u_c) / share_c, u_c drawn anew each
        round.
        """
        utility, eligible, cells, shares, first = self.believed(), self.eligible(), {}, {}, {}
        for k in range(self.arms) if cluster < 0 else [cluster]:
            arm = [i for i in eligible if self.arm[i] == k]
            for task in range(self.tasks):
                members = [i for i in arm if self.task[i] == task]
                rank = {i: self.rank(i, utility) for i in members}
                cells[k, task] = sorted(members, key=lambda i: (-rank[i], i))
                # Shares p_k n_kj / n_k are rounded to whole numbers, and fp32 goes before: the same here.
                share = np.float32(p[k] if cluster < 0 else 1) * np.float32(len(members)) / np.float32(max(len(arm), 1))
                shares[k, task] = max(int(share * np.float32(2**18)), 1)
                first[k, task] = int(self.uniform(ROUND_OFF, round, k * self.tasks + task) * 4096)
        order, places = [], dict.fromkeys(cells, 0)
        while open_cells := [c for c in cells if places[c] < len(cells[c])]:
            best = min(open_cells, key=lambda c: (Fraction(4096 * places[c] + first[c], shares[c]), c))
            order.append(cells[best][places[best]])
            places[best] += 1
        return order

    def pack(self, order, max_tokens):
        total, left = 0, []
        for i in order:
            total += self.lengths[i]
            if total > max_tokens:
                break
            left.append(i)
        bins = [[] for _ in range(self.layout.steps * self.layout.micro_batches)]
        for samples in bins:
            free = self.layout.capacity
            while left and len(samples) < self.layout.slots and self.lengths[left[0]] <= free:
                samples.append(left.pop(0))
                free -= self.lengths[samples[-1]]
            ahead = left[: min(LOOK_AHEAD, self.layout.slots - len(samples))]
            while fitting := [i for i in ahead if i in left and self.lengths[i] <= free]:
                samples.append(max(fitting, key=lambda i: self.lengths[i]))
                left.remove(samples[-1])
                free -= self.lengths[samples[-1]]
        return bins

    def plan(self, round, max_tokens, probabilities):
        """`probabilities`: those of the selector; where they were rounded is not what a mixture's shares shall differ
        by.
        """
        p = self.probabilities()
        cluster, utility = self.draw(p, round), self.believed()
        bins = self.pack(self.ranking(cluster, probabilities, round), max_tokens)
        self.before = {i: utility[i] for b in bins for i in b}
        return cluster, p, bins

    def observe(self, samples, loss, change):
        b = self.dtype(self.config.smoothing)
        first = [i for i in samples if self.visits[i] == 0]
        start = self.utility if self.config.unseen == "drift" else np.zeros(self.n, self.dtype)
        self.first_visits.append([(self.cell[i], self.dtype(loss[i]) - start[i]) for i in first])
        for i in samples:
            self.utility[i] = (1 - b) * (self.dtype(loss[i]) + self.dtype(change[i])) + b * self.utility[i]
            self.visits[i] += 1

    def learn(self, cluster, p):
        """(mean fall of U, reward, range of the rewards seen)."""
        if not self.before:
            return None
        fall = {i: old - self.utility[i] for i, old in self.before.items()}
        trained = {k: [i for i in fall if self.arm[i] == k] for k in range(self.arms)}
        raw = {k: self.dtype(np.mean([fall[i] for i in ids], dtype=self.dtype)) for k, ids in trained.items() if ids}
        self.rewards += raw.values()
        low, high = min(self.rewards), max(self.rewards)
        reward = {k: 2 * (r - low) / (high - low) - 1 if high > low else self.dtype(0) for k, r in raw.items()}
        gamma, old = self.config.gamma, self.weights.copy()
        for k in raw if self.config.bandit in ("exp3", "exp3s") else ():
            self.weights[k] *= np.exp(gamma * reward[k] * (1 if cluster < 0 else self.prior[k] / p[k]))
        if self.config.bandit == "exp3s":
            self.weights += np.e * 0.01 * self.prior * old.sum()
        mean_reward = sum(len(trained[k]) * reward[k] for k in reward) / len(fall)
        return np.mean(list(fall.values()), dtype=self.dtype), mean_reward, high - low


def losses(selector, round):
    """Made-up losses and changes of every sample, which fall with its visits and differ by cluster; fp32 [N]."""
    rng = np.random.default_rng([selector.method.seed, round])
    visits = selector.samples.visits[:-1].numpy()
    pace = 0.05 + 0.2 * selector.samples.cluster.numpy()
    samples = selector.samples
    loss = (
        (1 + samples.cluster.numpy())
        * np.exp(-pace * (visits + round / 20))
        * rng.uniform(0.7, 1.3, samples.num_samples)
    )
    return loss.astype(np.float32), (-0.1 * loss * rng.uniform(0, 1, len(loss))).astype(np.float32)


def at(vector, ids):
    """vector[ids], 0 for the dummy."""
    return torch.from_numpy(np.append(vector, np.float32(0)))[ids]


def same_precision(ours, exact, rounded, size=1.0):
    """Our error is no more than a few times that of the same arithmetic done slowly in fp32.

    size: of the numbers that the result is a difference of, which is larger than the result.
    """
    ours, exact, rounded = (np.asarray(v, np.float64) for v in (ours, exact, rounded))
    scale = max(size, np.abs(exact).max())
    return np.abs(ours - exact).max() <= 4 * np.abs(rounded - exact).max() + 4 * np.finfo(np.float32).eps * scale


@pytest.fixture(autouse=True)
def fp32_stays_fp32():
    """NumPy 1 makes float64 of an fp32 scalar and a Python number, and so hides the rounding that is looked for."""
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        yield
        return
    before = np._get_promotion_state()
    np._set_promotion_state("weak")
    yield
    np._set_promotion_state(before)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"bandit": "exp3"},
        {"bandit": "exp3s"},
        {"bandit": "uniform"},
        {"bandit": "none"},
        {"task_quotas": "none"},
        {"smoothing": 0.0},
        {"gamma": 1.0, "max_visits": 1},
        {"micro_batches": 1, "steps": 1, "slots": 3},
        {"drop_misaligned": False, "max_visits": 2},
        {"ranking": "soft"},
        {"ranking": "random", "bandit": "uniform"},
        {"unseen": "drift"},
        {"unseen": "estimate"},
        {"draw": "mixture"},
        {"draw": "mixture", "bandit": "exp3s"},
        {"draw": "mixture", "ranking": "soft", "unseen": "drift"},
        {"draw": "mixture", "ranking": "random", "task_quotas": "none", "max_visits": 2},
        {"draw": "mixture", "bandit": "none", "unseen": "estimate"},
    ],
    ids=str,
)
def test_runs_equal_the_transcription_until_nothing_is_left(make_selector, options, seed):
    selector = make_selector(150, seed=seed, clusters=5, **options)
    exact, rounded = SlowLead(selector, np.float64), SlowLead(selector, np.float32)
    round, rewards = 0, 0
    while True:
        max_tokens = [10**9, 90, 25][round % 3]
        plan = selector.plan(round, max_tokens)
        cluster, p, bins = exact.plan(round, max_tokens, plan.probabilities)
        cluster32, p32, bins32 = rounded.plan(round, max_tokens, plan.probabilities)
        assert same_precision(plan.probabilities, p, p32)
        assert int(plan.cluster) == cluster == cluster32
        ids = plan.sample_ids.flatten(0, 1).tolist()
        assert [[i for i in row if i < selector.samples.num_samples] for row in ids] == bins == bins32
        assert plan.tokens.flatten().tolist() == [sum(exact.lengths[i] for i in b) for b in bins]
        assert plan.rows.flatten().tolist() == [sum(int(selector.samples.rows[i]) for i in b) for b in bins]
        if not any(bins) and not exact.eligible():
            break
        loss, change = losses(selector, round)
        believed = [
            [slow.before[i] for i in plan.sample_ids.flatten().tolist() if i < exact.n] for slow in (exact, rounded)
        ]
        for step_ids in plan.sample_ids:
            selector.observe(step_ids, at(loss, step_ids), at(change, step_ids))
            step = [i for i in step_ids.flatten().tolist() if i < selector.samples.num_samples]
            for slow in (exact, rounded):
                slow.observe(step, loss, change)
        assert same_precision(plan.utility.flatten()[plan.sample_ids.flatten() < exact.n], *believed)
        stats, want, want32 = (
            selector.learn(plan),
            exact.learn(cluster, p),
            rounded.learn(cluster32, p32),
        )
        if want is not None:
            rewards += 1
            # The reward is a mean of differences of U.
            assert same_precision(stats.reward_raw, want[0], want32[0], size=np.abs(believed[0]).max())
            assert abs(float(stats.reward) - want[1]) <= max(4 * abs(want32[1] - want[1]), 1e-4)
        assert same_precision(selector.samples.utility[:-1], exact.utility, rounded.utility)
        assert selector.samples.visits[:-1].tolist() == exact.visits
        round += 1
    assert rewards > 15
    assert all(
        v == selector.method.options.max_visits for v, out in zip(exact.visits, exact.dropped, strict=True) if not out
    )
