"""What LEAD's options promise beside the transcription of test_selector_reference.py: chances, limits, and losses that
are no numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from lead_engine.selection.methods import lead
from lead_engine.selection.methods.lead import RANK

LOTS = 10**9


def pool(make_state, clusters, tasks=None, **vectors):
    """A pool without dropped samples; lists of labels."""
    cluster = torch.tensor(clusters)
    n = len(clusters)
    task = torch.zeros(n, dtype=torch.int64) if tasks is None else torch.tensor(tasks)
    return replace(make_state(n), cluster=cluster, task=task, dropped=torch.zeros(n, dtype=torch.bool), **vectors)


def first_of(selector, count, round=0):
    return selector.method.order(round, selector.method.draw(round)).sample_ids[:count].tolist()


def test_a_mixture_shares_a_round_as_the_bandit_says_and_small_clusters_give_all_they_have(make_state, make_selector):
    """Probabilities 0.25 each: of 40 places 10 each, but cluster 3 has 4 samples; its other 6 go to the three others, 2
    each.
    """
    state = pool(make_state, [0] * 60 + [1] * 50 + [2] * 20 + [3] * 4)
    selector = make_selector(state=state, clusters=4, draw="mixture", steps=5, slots=4, capacity=80, micro_batches=2)
    selector.method.bandit.prior.fill_(0.25)
    selector.method.bandit.log_weights.zero_()
    for round in range(20):
        assert Counter(state.cluster[first_of(selector, 40, round)].tolist()) == {0: 12, 1: 12, 2: 12, 3: 4}


def test_a_mixture_is_the_pool_in_small(make_state, make_selector):
    """Clusters of 80, 40 and 20, each of two tasks 3 : 1: of 28 places 12 + 4, 6 + 2 and 3 + 1."""
    cluster = [0] * 80 + [1] * 40 + [2] * 20
    state = pool(make_state, cluster, [int(i % 4 == 3) for i in range(140)])
    selector = make_selector(state=state, draw="mixture", steps=4, micro_batches=2, capacity=80)
    chosen = first_of(selector, 28)
    cells = zip(state.cluster[chosen].tolist(), state.task[chosen].tolist(), strict=True)
    got, want = Counter(cells), {(0, 0): 12, (0, 1): 4, (1, 0): 6, (1, 1): 2, (2, 0): 3, (2, 1): 1}
    assert all(abs(got[cell] - want[cell]) <= 1 for cell in want)  # fp32 shares: a whole quota may fall to either side


@pytest.mark.parametrize("draw", ["cluster", "mixture"])
def test_small_tasks_come_in_as_many_rounds_as_they_are_due(make_state, make_selector, draw):
    """Of 16 places a task of 3 in 160 is due 0.3: in three rounds of ten, not in none."""
    state = pool(make_state, [0] * 160, [1] * 3 + [0] * 157)
    selector = make_selector(state=state, draw=draw, bandit="none")
    places = [sum(i < 3 for i in first_of(selector, 16, round)) for round in range(300)]
    assert set(places) == {0, 1}
    assert abs(sum(places) / 300 - 0.3) < 3.3 * math.sqrt(0.3 * 0.7 / 300)  # 0.1 %


@pytest.mark.parametrize(
    ("quotas", "want"),
    [("proportional", [25.6, 5.12, 1.28]), ("sqrt", [19.15, 8.57, 4.28]), ("equal", [10.67, 10.67, 10.67])],
)
@pytest.mark.parametrize("draw", ["cluster", "mixture"])
def test_task_quotas(make_state, make_selector, draw, quotas, want):
    """Tasks of 500, 100 and 25 samples in 32 places: shares by size, its square root, or alike. A fourth task has
    none.
    """
    three = pool(make_state, [0] * 625, [0] * 500 + [1] * 100 + [2] * 25)
    state = replace(three, task=torch.tensor([0, 1, 3])[three.task], task_names=list("abcd"))
    selector = make_selector(state=state, draw=draw, task_quotas=quotas, bandit="none", steps=4)
    for round in range(5):
        got = Counter(state.task[first_of(selector, 32, round)].tolist())
        assert set(got) <= {0, 1, 3}
        assert all(abs(got[task] - share) < 1.5 for task, share in zip((0, 1, 3), want, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_soft_ranking_draws_in_proportion_to_a_power(make_state, make_selector, monkeypatch, power):
    """Who comes first, over 600 seeds: chi-squared against U ** power; and who comes second, given the first."""
    value = [1.0, 2.0, 3.0, 2.0]
    state = pool(make_state, [0] * 4, utility=torch.tensor(value))
    monkeypatch.setattr(lead, "SOFT_POWER", power)
    orders = []
    for seed in range(600):
        selector = make_selector(state=state, ranking="soft", bandit="none", seed=seed)
        selector.method.answer_share.fill_(1)
        orders.append(first_of(selector, 2))
    weight = [v**power for v in value]
    first, total = Counter(order[0] for order in orders), sum(weight)
    want = [600 * w / total for w in weight]
    assert sum((first[i] - want[i]) ** 2 / want[i] for i in range(4)) < 16.3  # 3 degrees of freedom, 0.1 %
    second = Counter(order[1] for order in orders)
    want = [
        600 * sum(weight[j] / total * weight[i] / (total - weight[j]) for j in range(4) if j != i) for i in range(4)
    ]
    assert sum((second[i] - want[i]) ** 2 / want[i] for i in range(4)) < 16.3


def test_random_ranking_does_not_look_at_utility(make_state, make_selector):
    state = make_state(80)
    one = make_selector(state=state, ranking="random")
    other = make_selector(state=replace(state, utility=torch.rand(80)), ranking="random")
    hard = make_selector(state=state)
    assert first_of(one, 16) == first_of(other, 16) != first_of(hard, 16)


@pytest.mark.parametrize("ranking", ["soft", "random"])
def test_a_sample_keeps_its_place_until_it_is_trained(make_state, make_selector, ranking):
    """Untrained samples follow each other in the same order in every round; one that was trained gets another place."""
    selector = make_selector(
        state=pool(make_state, [0] * 40), ranking=ranking, bandit="none", task_quotas="none", steps=10, capacity=80
    )
    first = first_of(selector, 40)
    assert first_of(selector, 40, round=1) == first
    for i in first[::2]:
        selector.samples.visits[i] = 1
    now = first_of(selector, 40, round=1)
    assert [i for i in now if i in first[1::2]] == first[1::2]
    assert [i for i in now if i in first[::2]] != first[::2]


@pytest.mark.parametrize("edge", [0.0, 1 - 2.0**-24], ids=["least", "greatest"])
def test_the_ends_of_the_noise_are_finite(make_state, make_selector, monkeypatch, edge):
    """The least and the greatest number that `uniform` gives; U of 0, below 0 and far above it as well."""
    state = pool(make_state, [0] * 5, utility=torch.tensor([0.0, -1.0, 1e-30, 3.0, 1e30]))
    method = make_selector(state=state, ranking="soft").method
    monkeypatch.setattr(method, "uniform", lambda stream, *counters: torch.full((5,) if stream == RANK else (), edge))
    rank = method._rank(method.samples.utility[:-1])
    assert rank.isfinite().all()
    assert rank[3] > rank[0] == rank[1] == rank[2]


def test_soft_ranking_is_by_what_a_token_of_the_budget_teaches(make_state, make_selector, monkeypatch):
    """U x answer tokens / tokens: a long answer to a short question is worth more than the same U in a few tokens of
    many.
    """
    state = pool(make_state, [0] * 3, utility=torch.tensor([2.0, 2.1, 0.9]))
    monkeypatch.setattr(lead, "SOFT_POWER", 1e4)  # so steep that the noise decides nothing
    selector = make_selector(state=state, ranking="soft", bandit="none")
    selector.method.answer_share = torch.ones(3)
    assert first_of(selector, 3) == [1, 0, 2]
    selector.method.answer_share = torch.tensor([0.5, 0.4, 1.0])
    assert first_of(selector, 3) == [0, 2, 1]
    lengths, rows = selector.samples.lengths, selector.samples.rows[:-1]
    fresh = make_selector(state=state, ranking="soft").method.answer_share
    assert torch.equal(fresh, torch.tensor([r / n for r, n in zip(rows.tolist(), lengths.tolist(), strict=True)]))


NAN_VARIANTS = [
    {},
    {"ranking": "soft"},
    {"draw": "mixture", "bandit": "exp3s"},
    {"ranking": "soft", "unseen": "drift"},
    {"draw": "mixture", "unseen": "estimate"},
    {"method": "rescore"},
]


@pytest.mark.parametrize("options", NAN_VARIANTS, ids=str)
def test_a_loss_that_is_no_number_stays_with_its_sample(make_selector, options):
    """Next to a run in which the same samples' losses are numbers: U elsewhere is the same, rewards and weights stay
    numbers.
    """
    bad, good = make_selector(90, max_visits=3, **options), make_selector(90, max_visits=3, **options)
    plan = bad.plan(0, LOTS)
    assert torch.equal(plan.sample_ids, good.plan(0, LOTS).sample_ids)
    broken = plan.sample_ids[:, :, 0].flatten().tolist()
    broken = [i for i in broken if i < 90]
    assert len(broken) > 2
    loss = torch.rand(91, generator=torch.Generator().manual_seed(0)) + 0.5
    spoilt = loss.clone()
    spoilt[broken] = torch.nan
    for ids in plan.sample_ids:
        bad.observe(ids, spoilt[ids], torch.zeros(ids.shape))
        good.observe(ids, loss[ids], torch.zeros(ids.shape))
    others = [i for i in range(90) if i not in broken]
    assert bad.samples.utility[broken].isnan().all()
    assert torch.equal(bad.samples.utility[others], good.samples.utility[others])
    assert torch.equal(bad.samples.visits, good.samples.visits)
    stats = bad.learn(plan)
    trained = [i for i in plan.sample_ids.flatten().tolist() if i < 90 and i not in broken]
    believed = dict(zip(plan.sample_ids.flatten().tolist(), plan.utility.flatten().tolist(), strict=True))
    fall = sum(believed[i] - float(bad.samples.utility[i]) for i in trained) / len(trained)
    assert float(stats.reward_raw) == pytest.approx(fall, rel=1e-5, abs=1e-6)

    for round in range(1, 200):  # they are still there, and come last
        order, open_ids = (
            bad.method.order(round, bad.method.draw(round)).sample_ids.tolist(),
            bad.method.open_samples().nonzero().flatten().tolist(),
        )
        cell = bad.method.cell.tolist()
        for c in {cell[i] for i in order if i < 90}:
            chosen, left = (
                [i for i in order if i < 90 and cell[i] == c],
                {i for i in open_ids if cell[i] == c and i not in broken},
            )
            sound = [i not in broken for i in chosen]
            assert sound == sorted(sound, reverse=True)
            assert all(sound) or left <= set(chosen)
        plan = bad.plan(round, LOTS)
        for ids in plan.sample_ids:
            bad.observe(ids, loss[ids] / round, torch.zeros(ids.shape))
        assert all(bool(value.isfinite().all()) for value in bad.learn(plan))
        if int(plan.tokens.sum()) == 0 and not open_ids:
            break
    assert round > 10
    assert all(bool(value.isfinite().all()) for name, value in bad.state_dict().items() if name != "utility")
    assert bad.samples.utility[broken].isnan().all()  # b U + ... of NaN is NaN: their visits end it


def test_nothing_but_bad_losses(make_selector):
    """The run ends as any other: rewards are 0, nothing is learned."""
    selector = make_selector(40, max_visits=2, draw="mixture", unseen="drift")
    before = selector.method.bandit.log_weights.tolist()
    for round in range(60):
        plan = selector.plan(round, LOTS)
        for ids in plan.sample_ids:
            selector.observe(ids, torch.full(ids.shape, torch.nan), torch.zeros(ids.shape))
        stats = selector.learn(plan)
        assert float(stats.reward) == float(stats.reward_raw) == 0
        if int(stats.samples) == 0:
            break
    assert round < 59
    assert not selector.method.open_samples().any()
    assert selector.method.bandit.log_weights.tolist() == before


def test_equal_utilities_go_by_id(make_state, make_selector):
    state = pool(make_state, [0] * 50, utility=torch.full((50,), 1.5))
    assert first_of(make_selector(state=state), 16) == list(range(16))
    zeros = torch.where(torch.arange(50) % 2 == 0, -0.0, 0.0)
    assert first_of(make_selector(state=replace(state, utility=zeros)), 16) == list(range(16))
