"""Whole simulated runs of LEAD's selection against a literal, slow transcription of its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lead_engine.selection import counter_rng
from lead_engine.selection.methods.lead import DRAW
from lead_kernels.pack_plan import LOOK_AHEAD


class SlowLead:
    """Section by section what LEAD says, with loops, Python lists and EXP3's weights as they stand in its paper.

    `dtype` is the precision of U, rewards and weights: in float64 it is the truth, in float32 it shows what rounding
    alone does.
    """

    def __init__(self, selector, dtype):
        self.config, self.layout, self.seed, self.dtype = selector.config, selector.layout, selector.method.seed, dtype
        self.n = selector.samples.num_samples
        self.lengths, self.dropped = selector.samples.lengths.tolist(), selector.samples.dropped.tolist()
        one_arm = self.config.bandit == "none"
        self.arms = 1 if one_arm else selector.samples.num_clusters
        self.arm = [0] * self.n if one_arm else selector.samples.cluster.tolist()
        self.task = selector.samples.task.tolist() if self.config.use_tasks else [0] * self.n
        self.utility = selector.samples.utility[:-1].numpy().astype(dtype)
        self.visits = [0] * self.n
        self.weights = np.ones(self.arms, dtype)
        self.rewards = []

    def eligible(self):
        return [i for i in range(self.n) if not self.dropped[i] and self.visits[i] < self.config.max_visits]

    def probabilities(self):
        p = (1 - self.config.gamma) * self.weights / self.weights.sum() + self.config.gamma / self.arms
        with_samples = {self.arm[i] for i in self.eligible()}
        p = np.array([p[k] if k in with_samples else 0 for k in range(self.arms)], self.dtype)
        return p / p.sum() if p.sum() > 0 else p

    def draw(self, p, round):
        uniform = float(counter_rng.uniform(self.seed, torch.tensor(DRAW), torch.tensor(round)))
        for k in range(self.arms):
            if uniform < p[: k + 1].sum():
                return k
        return 0

    def ranking(self, cluster):
        keyed = []
        for task in set(self.task):
            members = [i for i in self.eligible() if self.arm[i] == cluster and self.task[i] == task]
            members.sort(key=lambda i: (-self.utility[i], i))
            keyed += [((rank + 0.5) / len(members), task, i) for rank, i in enumerate(members)]
        return [i for _, _, i in sorted(keyed)]

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

    def plan(self, round, max_tokens):
        p = self.probabilities()
        cluster = self.draw(p, round)
        bins = self.pack(self.ranking(cluster), max_tokens)
        self.before = {i: self.utility[i] for b in bins for i in b}
        return cluster, p, bins

    def observe(self, samples, loss, change):
        b = self.dtype(self.config.smoothing)
        for i in samples:
            self.utility[i] = (1 - b) * (self.dtype(loss[i]) + self.dtype(change[i])) + b * self.utility[i]
            self.visits[i] += 1

    def finish_round(self, cluster, p):
        if not self.before:
            return None
        raw = self.dtype(np.mean([old - self.utility[i] for i, old in self.before.items()], dtype=self.dtype))
        self.rewards.append(raw)
        low, high = min(self.rewards), max(self.rewards)
        reward = 2 * (raw - low) / (high - low) - 1 if high > low else self.dtype(0)
        gamma, arms, old = self.config.gamma, self.arms, self.weights.copy()
        if self.config.bandit in ("exp3", "exp3s"):
            self.weights[cluster] *= np.exp(gamma / arms * reward / p[cluster])
        if self.config.bandit == "exp3s":
            self.weights += np.e * self.config.exp3s_alpha / arms * old.sum()
        return raw, reward, high - low


def losses(selector, round):
    """Made-up losses and changes of every sample, which fall with its visits and differ by cluster; fp32 [N]."""
    rng = np.random.default_rng([selector.method.seed, round])
    visits = selector.samples.visits[:-1].numpy()
    pace = 0.05 + 0.2 * selector.samples.cluster.numpy()
    samples = selector.samples
    loss = (1 + samples.cluster.numpy()) * np.exp(-pace * (visits + round / 20)) * rng.uniform(0.7, 1.3, samples.num_samples)
    return loss.astype(np.float32), (-0.1 * loss * rng.uniform(0, 1, len(loss))).astype(np.float32)


def at(vector, ids):
    """vector[ids], 0 for the dummy."""
    return torch.from_numpy(np.append(vector, np.float32(0)))[ids]


def same_precision(ours, exact, rounded):
    """Our error is no more than a few times that of the same arithmetic done slowly in fp32."""
    ours, exact, rounded = (np.asarray(v, np.float64) for v in (ours, exact, rounded))
    scale = max(1.0, np.abs(exact).max())
    return np.abs(ours - exact).max() <= 4 * np.abs(rounded - exact).max() + 4 * np.finfo(np.float32).eps * scale


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"bandit": "exp3"},
        {"bandit": "exp3s", "exp3s_alpha": 0.05},
        {"bandit": "uniform"},
        {"bandit": "none"},
        {"use_tasks": False},
        {"smoothing": 0.0},
        {"gamma": 1.0, "max_visits": 1},
        {"micro_batches": 1, "steps": 1, "slots": 3},
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
        cluster, p, bins = exact.plan(round, max_tokens)
        cluster32, p32, bins32 = rounded.plan(round, max_tokens)
        assert same_precision(plan.probabilities, p, p32)
        assert int(plan.cluster) == cluster == cluster32
        ids = plan.sample_ids.flatten(0, 1).tolist()
        assert [[i for i in row if i < selector.samples.num_samples] for row in ids] == bins == bins32
        assert plan.tokens.flatten().tolist() == [sum(exact.lengths[i] for i in b) for b in bins]
        assert plan.rows.flatten().tolist() == [sum(int(selector.samples.rows[i]) for i in b) for b in bins]
        if not any(bins) and not exact.eligible():
            break
        loss, change = losses(selector, round)
        for step_ids in plan.sample_ids:
            selector.observe(step_ids, at(loss, step_ids), at(change, step_ids))
        for slow in (exact, rounded):
            slow.observe([i for b in bins for i in b], loss, change)
        stats, want, want32 = (
            selector.finish_round(plan),
            exact.finish_round(cluster, p),
            rounded.finish_round(cluster32, p32),
        )
        if want is not None:
            rewards += 1
            assert same_precision(stats.reward_raw, want[0], want32[0])
            assert abs(float(stats.reward) - want[1]) <= max(4 * abs(want32[1] - want[1]), 1e-4)
        assert same_precision(selector.samples.utility[:-1], exact.utility, rounded.utility)
        assert selector.samples.visits[:-1].tolist() == exact.visits
        round += 1
    assert rewards > 15
    assert all(v == selector.config.max_visits for v, out in zip(exact.visits, exact.dropped, strict=True) if not out)
