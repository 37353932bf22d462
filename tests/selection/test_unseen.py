"""Estimates of U where no step has been, against loops over every observation in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lead_engine.base.errors import UserError
from lead_engine.selection.samples import Samples
from lead_engine.selection.unseen import KEEP_ALL, KEEP_CELL, CellEstimates
from lead_kernels import idu_update

N = 80


@pytest.fixture
def make_estimates(make_state):
    def make(kind, optimism=1.0, **options):
        samples = Samples(make_state(N, **options), torch.full((N,), 8), torch.full((N,), 4), "cpu")
        return samples, CellEstimates(kind, samples, optimism)

    return make


def weighted_sums(steps, keep):
    """Weighted sums of 1, x and x^2 over the observations x of a list of steps, the last one newest.

    An observation's weight falls by `keep` with every one that a later step makes. Those of one step share equally what
    they would have got one after the other.
    """
    total, later = [0.0, 0.0, 0.0], 0
    for step in reversed(steps):
        for value in step:
            weight = keep**later * (1 - keep ** len(step)) / len(step)
            total = [sum + weight * value**power for power, sum in enumerate(total)]
        later += len(step)
    return total


def slow_utility(samples, kind, optimism, first_visits):
    """U of all by the docstring's formulas; `first_visits`: of every step a list of (cell, loss, U0)."""
    observed = [
        [(c, loss - start if kind == "drift" else loss) for c, loss, start in step if math.isfinite(loss)]
        for step in first_visits
    ]
    weight, first, second = weighted_sums([[x for _, x in step] for step in observed], KEEP_ALL)
    mean = first / weight if weight else 0.0
    deviation = math.sqrt(max(second / weight - mean**2, 0)) if weight else 1.0
    utility = samples.utility.double()
    for i in range(N):
        if samples.visits[i] == 0:
            known, total, _ = weighted_sums(
                [[x for c, x in step if c == samples.cell[i]] for step in observed], KEEP_CELL
            )
            estimate = total + (1 - known) * mean
            utility[i] = utility[i] + estimate if kind == "drift" else estimate + optimism * deviation * (1 - known)
    return utility


@pytest.mark.parametrize(("kind", "optimism"), [("drift", 1.0), ("estimate", 0.0), ("estimate", 2.0)])
def test_estimates_are_the_weighted_means_of_first_visits(make_estimates, kind, optimism):
    """Steps of any size, repeated visits, empty slots and losses that are no numbers among them."""
    samples, estimates = make_estimates(kind, optimism)
    random, steps = torch.Generator().manual_seed(0), []
    for step in range(25):
        want = slow_utility(samples, kind, optimism, steps)
        torch.testing.assert_close(estimates.utility().double(), want, rtol=0, atol=5e-6, equal_nan=True)
        size = [0, 1, 3, 7][step % 4]
        ids = torch.cat([torch.randperm(N, generator=random)[:size], torch.full((2,), N)])[None]
        loss = torch.rand(ids.shape, generator=random) * 3 + samples.cell[samples.real(ids)] / 4
        if step in (5, 10):
            loss[0, 0] = torch.nan
        if step == 11:
            loss[0, 1] = torch.inf
        real = [(i, float(x)) for i, x in zip(ids[0].tolist(), loss[0], strict=True) if i < N]
        steps.append([(samples.cell[i], x, float(samples.utility[i])) for i, x in real if samples.visits[i] == 0])
        estimates.observe(ids, loss)
        idu_update(samples.utility, samples.visits, ids, loss, torch.zeros(ids.shape), 0.1)
    assert len({int(c) for step in steps for c, *_ in step}) > 6
    assert int((samples.visits[:-1] > 1).sum()) > 5
    assert int((samples.visits[:-1] == 0).sum()) > 5


@pytest.mark.parametrize("kind", ["drift", "estimate"])
def test_trained_samples_keep_their_own(make_estimates, kind):
    samples, estimates = make_estimates(kind)
    before = samples.utility.clone()
    ids = torch.arange(0, N, 2)
    estimates.observe(ids, torch.full(ids.shape, 9.0))
    samples.visits[ids] = 1
    now = estimates.utility()
    assert torch.equal(now[ids], before[ids])
    assert torch.equal(samples.utility, before)  # nothing is written into U itself
    assert not (now[1:N:2] == before[1:N:2]).any()
    assert float(now[N]) == 0  # the dummy


def test_nothing_seen(make_estimates):
    """Drift: what was measured. Estimate: the optimism alone, alike for all."""
    samples, estimates = make_estimates("drift")
    assert torch.equal(estimates.utility(), samples.utility)
    _, estimates = make_estimates("estimate", 0.7)
    assert estimates.utility()[:N].unique().tolist() == pytest.approx([0.7])


def test_drift_follows_a_model_that_got_better(make_estimates):
    """Every loss is 1 lower than at first in one cell and as it was in the others: unseen U moves there, and hardly
    elsewhere.
    """
    samples, estimates = make_estimates("drift", clusters=2, tasks=1)
    before = samples.utility.clone()
    for ids in torch.arange(60).view(20, 3):
        estimates.observe(ids, samples.utility[ids] - (samples.cell[ids] == 1).float())
        samples.visits[ids] = 1
    moved = (before - estimates.utility())[60:N]
    there = samples.cell[60:N] == 1
    assert there.any()
    assert not there.all()
    assert float(moved[there].min()) > 0.75
    assert float(moved[~there].max()) < 0.2


def test_too_many_cells_are_refused(make_estimates, make_state):
    with pytest.raises(UserError, match=r"--lead\.unseen estimate: 41 clusters x 100 tasks are more than 4096"):
        make_estimates("estimate", clusters=41, tasks=100)
    make_estimates("estimate", clusters=4, tasks=1024)


@pytest.mark.parametrize("kind", ["drift", "estimate"])
def test_a_first_loss_that_is_no_number_stays_with_its_sample(make_selector, make_state, kind):
    """The plan after it is the one after a round in which that sample's loss was left out of the observations."""
    state = make_state(N, clusters=2, tasks=1)
    state = replace(state, dropped=torch.zeros(N, dtype=torch.bool))
    selector = make_selector(N, state=state, unseen=kind, bandit="none")
    plan = selector.plan(0, 10**9)
    ids = plan.sample_ids[0]
    loss = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) + 1
    loss[0, 0] = torch.nan
    selector.observe(ids, loss, torch.zeros(ids.shape))
    utility = selector.method.unseen.utility()
    assert utility.isnan().nonzero().flatten().tolist() == [int(ids[0, 0])]
    assert all(bool(value.isfinite().all()) for value in selector.method.unseen.state_dict().values())
