"""What a selector promises for every pool, method and layout."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from lead_engine.base.errors import UserError
from lead_engine.selection.plan import Layout
from lead_engine.selection.selector import Selector
from lead_kernels import backend

LOTS = 10**9


def train(selector, plan, loss=1.0, change=0.0, steps=None):
    """Observe the plan's first `steps` steps (all by default) with a constant loss and change; then the round's end."""
    for ids in plan.sample_ids[:steps]:
        selector.observe(ids, torch.full(ids.shape, loss), torch.full(ids.shape, change))
    return selector.learn(plan)


def real(selector, plan):
    return [i for i in plan.sample_ids.flatten().tolist() if i < selector.samples.num_samples]


def sequence(selector, rounds, max_tokens=LOTS):
    """Ids in the order in which they are trained."""
    ids = []
    for round in range(rounds):
        plan = selector.plan(round, max_tokens)
        ids += real(selector, plan)
        train(selector, plan)
    return ids


VARIANTS = [
    {},
    {"bandit": "exp3s"},
    {"bandit": "none", "task_quotas": "none"},
    {"max_visits": 1, "drop_misaligned": False},
    {"ranking": "soft"},
    {"ranking": "random", "bandit": "uniform"},
    {"unseen": "drift"},
    {"unseen": "estimate", "task_quotas": "none"},
    {"draw": "mixture"},
    {"draw": "mixture", "bandit": "none", "max_visits": 1, "ranking": "soft", "unseen": "estimate"},
    {"draw": "mixture", "bandit": "exp3s", "ranking": "soft", "unseen": "drift"},
    {"method": "rescore", "draw": "mixture"},
    {"method": "loss"},
    {"method": "ifd"},
    {"method": "random"},
    {"method": "random-matched"},
    {"method": "full"},
]
"""Every method, and every value of every option."""


@pytest.fixture
def make_variant(make_selector, finished_run):
    """A selector of VARIANTS; `random-matched` imitates a run that trained samples 0 to 119 in steps of 7, then every
    third.
    """

    def make(samples=120, **options):
        if options.get("method") == "random-matched":
            imitated = [[i * 7 % samples for i in range(samples)], list(range(0, samples, 3))]
            options["match"] = finished_run(samples, imitated)
        return make_selector(samples, **options)

    return make


def arms(selector):
    """Every sample's arm."""
    return (
        [0] * selector.samples.num_samples
        if selector.method.options.bandit == "none"
        else selector.samples.cluster.tolist()
    )


def follows_quotas(selector, ids, eligible, plan):
    """Whether there is a level x such that every arm's every task has min(all it has, x share) samples among `ids`, to
    within 1.

    Shares are p_k n_kj / n_k in a mixture, n_kj in a round of one cluster; whole numbers round them.
    """
    task = selector.samples.task.tolist()
    if selector.method.options.task_quotas == "none":
        task = [0] * selector.samples.num_samples
    cell = dict(enumerate(zip(arms(selector), task, strict=True)))
    have, got, in_arm = (
        Counter(found)
        for found in ([cell[i] for i in eligible], [cell[i] for i in ids], [cell[i][0] for i in eligible])
    )
    mixture, low, high = selector.method.options.draw == "mixture", 0.0, float("inf")
    for c in have if mixture else (c for c in have if c[0] == int(plan.cluster)):
        share = float(plan.probabilities[c[0]]) * have[c] / in_arm[c[0]] if mixture else have[c] / in_arm[c[0]]
        low = max(low, (got[c] - 1) / share)
        high = min(high, (got[c] + 1) / share) if got[c] < have[c] else high
    return low <= high * (1 + 1e-3)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_promises_for_any_pool_and_layout(make_selector, make_state, finished_run, made_up_losses, data):
    def whole(low, high):
        return data.draw(st.integers(low, high))

    def one_of(*values):
        return data.draw(st.sampled_from(values))

    capacity, max_visits, n, clusters, tasks = whole(4, 30), whole(1, 3), whole(1, 40), whole(1, 5), whole(1, 4)
    method = one_of("lead", "lead", "lead", "lead", "rescore", "loss", "ifd", "random", "random-matched", "full")
    seed, lead = whole(0, 10**6), method in ("lead", "rescore")
    state = make_state(n, seed=seed, clusters=clusters, tasks=tasks)
    pool = one_of("as it is", "as it is", "one-sample clusters", "an empty cluster", "all dropped")
    if pool == "one-sample clusters":
        state = replace(state, cluster=torch.arange(n).clamp(max=clusters - 1))
    elif pool == "an empty cluster":
        state = replace(state, cluster=state.cluster.clamp(max=max(clusters - 2, 0)))
    elif pool == "all dropped":
        state = replace(state, dropped=torch.ones(n, dtype=torch.bool))
    picks = data.draw(st.lists(st.lists(st.integers(0, n - 1), unique=True, max_size=n), max_size=4))
    selector = make_selector(
        n,
        method=method,
        seed=seed,
        state=state,
        steps=whole(1, 3),
        micro_batches=whole(1, 3),
        slots=whole(1, 5),
        capacity=capacity,
        longest=whole(2, capacity),
        max_visits=max_visits,
        bandit=one_of("exp3", "exp3s", "uniform", "none"),
        task_quotas=one_of("proportional", "none"),
        draw=one_of("cluster", "mixture"),
        ranking=one_of("hard", "soft", "random"),
        unseen=one_of("initial", "drift", "estimate"),
        drop_misaligned=one_of(True, True, False),
        match=finished_run(n, picks) if method == "random-matched" else None,
    )
    shape, visits, generator = selector.layout, Counter(), torch.Generator().manual_seed(seed)
    bad_losses, arm = one_of(0.0, 0.0, 0.3, 1.0), torch.tensor(arms(selector) if lead else [0])
    for round in range(10):
        max_tokens = one_of(LOTS, LOTS, 2 * capacity, 5)
        selector.refresh(round, round / 10, made_up_losses(round))
        plan = selector.plan(round, max_tokens)
        assert plan.sample_ids.shape == (shape.steps, shape.micro_batches, shape.slots)
        assert plan.tokens.shape == plan.rows.shape == (shape.steps, shape.micro_batches)
        ids = real(selector, plan)
        assert len(ids) == len(set(ids))
        lengths = torch.cat([selector.samples.lengths, torch.zeros(1, dtype=torch.int64)])[plan.sample_ids]
        assert torch.equal(lengths.sum(-1), plan.tokens)
        assert int(plan.tokens.max()) <= capacity
        assert int(plan.tokens.sum()) <= max_tokens
        assert torch.equal(plan.rows, selector.samples.rows[plan.sample_ids].sum(-1))
        filled = (plan.tokens > 0).flatten().tolist()
        assert filled == sorted(filled, reverse=True)  # empty micro-batches come last
        left = torch.ones(n, dtype=torch.bool)
        if lead:
            left = selector.samples.visits[:-1] < max_visits
            if selector.method.options.drop_misaligned:
                left &= ~state.dropped
            assert bool(left[ids].all())
            per_arm = torch.stack([(left & (arm == k)).any() for k in range(selector.method.num_arms)])
            assert torch.equal(plan.probabilities > 0, per_arm)
            assert float(plan.probabilities.sum()) == pytest.approx(1 if per_arm.any() else 0)
            if selector.method.options.draw == "cluster":
                assert all(arm[i] == plan.cluster for i in ids)
            else:
                assert int(plan.cluster) == -1
            order = [i for i in selector.method.order(round, selector.method.draw(round)).sample_ids.tolist() if i < n]
            eligible = left.nonzero().flatten().tolist()
            assert all(follows_quotas(selector, order[:m], eligible, plan) for m in {1, len(order) // 2, len(order)})
        elif method == "random-matched":
            left[:] = sum(visits.values()) < sum(map(len, picks))
        elif method == "ifd":
            left = state.ifd < 1
        if max_tokens >= capacity:
            assert bool(ids) == bool(left.any())
        visits.update(ids)
        loss = torch.rand(n + 1, generator=generator) * 3
        loss[torch.rand(n + 1, generator=generator) < bad_losses] = torch.nan
        for step in plan.sample_ids:
            selector.observe(step, loss[step], -0.1 * loss[step])
        stats = selector.learn(plan)
        assert (
            int(stats.samples) == len(ids) == int(stats.samples_per_task.sum()) == int(stats.samples_per_cluster.sum())
        )
        samples = selector.samples
        assert stats.samples_per_task.tolist() == [
            sum(int(samples.task[i]) == t for i in ids) for t in range(samples.num_tasks)
        ]
        assert selector.samples.visits[:-1].tolist() == [visits[i] for i in range(n)]
        assert all(bool(torch.isfinite(value).all()) for value in stats)
        assert -1 <= float(stats.reward) <= 1
        finite = {"log_weights", "cell_sum", "cell_weight", "all_first_visits"}
        assert all(bool(torch.isfinite(value).all()) for name, value in selector.state_dict().items() if name in finite)
    if lead:
        assert max(visits.values(), default=0) <= max_visits


def test_every_task_gets_its_share_of_the_cluster(make_state, make_selector):
    """A cluster of 100 + 50 + 10 samples, of which a round takes 32: 20, 10 and 2, the highest U of each."""
    task = torch.repeat_interleave(torch.arange(3), torch.tensor([100, 50, 10]))
    state = replace(make_state(160), task=task, cluster=torch.zeros_like(task), dropped=torch.zeros_like(task).bool())
    selector = make_selector(state=state, clusters=4, steps=2, micro_batches=2, slots=8, capacity=400)
    plan = selector.plan(0, LOTS)
    assert train(selector, plan).samples_per_task.tolist() == [20, 10, 2]
    chosen = set(real(selector, plan))
    for t, count in enumerate([20, 10, 2]):
        members = (task == t).nonzero().flatten()
        assert set(members[state.utility[members].argsort(descending=True)[:count]].tolist()) <= chosen


def test_exhausted_clusters_leave_the_draw_and_an_exhausted_pool_gives_an_empty_plan(make_selector):
    selector = make_selector(60, clusters=3, max_visits=2)
    closed, round = set(), 0
    while True:
        left = ~selector.samples.dropped & (selector.samples.visits[:-1] < 2)
        open_arms = {k for k in range(3) if bool((left & (selector.samples.cluster == k)).any())}
        closed |= set(range(3)) - open_arms
        plan = selector.plan(round, LOTS)
        if not open_arms:
            break
        p = plan.probabilities
        assert {k for k in range(3) if p[k] > 0} == open_arms
        full = 0.9 * selector.method.bandit.log_weights.softmax(0) + 0.1 / 3
        torch.testing.assert_close(p[p > 0], (full / full[p > 0].sum())[p > 0])
        assert int(plan.cluster) in open_arms
        train(selector, plan, loss=1 / (1 + round))
        round += 1
    assert closed == {0, 1, 2}
    assert round > 10
    for _ in range(3):  # stays empty, and an empty round changes nothing
        state = {name: value.clone() for name, value in selector.state_dict().items()}
        assert int(plan.tokens.sum()) == int(plan.rows.sum()) == 0
        assert real(selector, plan) == []
        stats = train(selector, plan)
        assert [float(v.sum()) for v in stats] == [0] * len(stats)
        assert all(torch.equal(state[name], value) for name, value in selector.state_dict().items())
        plan = selector.plan(round, LOTS)


@pytest.mark.parametrize("method", ["random", "full"])
def test_passes_are_fixed_permutations_whatever_the_layout_of_rounds(make_selector, method):
    """Two and a half passes: the same samples in the same order for any S; every pass holds every sample once."""
    n = 50
    runs = [sequence(make_selector(n, method=method, steps=s), 60)[: 5 * n // 2] for s in (1, 2, 3, 7)]
    assert all(run == runs[0] for run in runs)
    first, second = runs[0][:n], runs[0][n : 2 * n]
    assert sorted(first) == sorted(second) == list(range(n))
    assert first != second
    assert sequence(make_selector(n, method=method, seed=1), 60)[:n] != first


def test_packing_of_a_pass_is_the_same_whatever_the_steps_of_a_round(make_selector):
    def micro_batches(steps):
        selector = make_selector(50, method="full", steps=steps, micro_batches=1)
        bins = []
        for round in range(30):
            plan = selector.plan(round, LOTS)
            bins += [row for row in plan.sample_ids.flatten(0, 1).tolist() if min(row) < 50]
            train(selector, plan)
        return bins

    longest = micro_batches(5)
    for steps in (1, 2):
        bins = micro_batches(steps)
        assert len(bins) >= 20
        assert bins == longest[: len(bins)]


def test_a_pass_is_spread_evenly(make_selector):
    """Over many seeds every sample is as likely first as last: chi-squared on who opens the pass."""
    opened = Counter(
        real(s, s.plan(0, LOTS))[0] for s in (make_selector(10, method="random", seed=k) for k in range(500))
    )
    assert sum((opened[i] - 50) ** 2 / 50 for i in range(10)) < 27.9  # 9 degrees of freedom, 0.1 %


def test_only_what_was_trained_counts(make_selector):
    """A round that ends after its first step is judged by that step's samples."""
    selector = make_selector(smoothing=0.0)
    plan = selector.plan(0, LOTS)
    ids = [i for i in plan.sample_ids[0].flatten().tolist() if i < selector.samples.num_samples]
    before = selector.samples.utility[ids].double().mean()
    stats = train(selector, plan, loss=2.0, change=-0.5, steps=1)
    assert int(stats.samples) == len(ids) < len(real(selector, plan))
    assert float(stats.utility_before) == pytest.approx(float(before), rel=1e-6)
    assert float(stats.utility_after) == 1.5
    assert float(stats.reward_raw) == pytest.approx(float(before) - 1.5, rel=1e-5)
    assert float(stats.reward) == 0  # the first reward


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_restored_selector_goes_on_alike(make_variant, made_up_losses, options):
    """State saved in the middle of a round, loaded into a new selector: the same plans and statistics, bit by bit."""

    def observe(selector, plan, round, steps):
        for ids in plan.sample_ids[steps]:
            loss = torch.rand(121, generator=torch.Generator().manual_seed(round))[ids]
            selector.observe(ids, loss, -0.2 * loss)

    def play(selector, round):
        selector.refresh(round, round / 12, made_up_losses(round))
        plan = selector.plan(round, LOTS if round < 6 else 100)
        observe(selector, plan, round, slice(None))
        return [*plan, *selector.learn(plan)]

    def go_on(selector, plan):
        observe(selector, plan, 5, slice(1, None))
        everything = [*selector.learn(plan), selector.fingerprint()]
        for round in range(6, 12):
            everything += [*play(selector, round), selector.fingerprint()]
        return [*everything, *selector.state_dict().values()]

    first, second = make_variant(**options), make_variant(**options)
    for round in range(5):
        play(first, round)
    first.refresh(5, 5 / 12, made_up_losses(5))
    plan = first.plan(5, LOTS)
    assert real(first, plan)
    observe(first, plan, 5, slice(1))
    assert first.fingerprint() != second.fingerprint()
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert first.fingerprint() == second.fingerprint()
    assert all(torch.equal(a, b) for a, b in zip(go_on(first, plan), go_on(second, plan), strict=True))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_fingerprint_sees_every_bit(make_variant, options):
    """One bit turned, lowest or highest, at the first, the last or a middle place of any tensor: another hash; turned
    back: the same.
    """
    selector = make_variant(30, **options)
    train(selector, selector.plan(0, LOTS))
    seen = {int(selector.fingerprint())}
    for tensor in selector.state_dict().values():
        bits = tensor.view({1: torch.int8, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).view(-1)
        for place in sorted({0, len(bits) // 2, len(bits) - 1}):
            for bit in (0, 8 * tensor.element_size() - 1):
                turn = 1 << bit if bit < 8 * tensor.element_size() - 1 else torch.iinfo(bits.dtype).min
                bits[place] ^= turn
                found = int(selector.fingerprint())
                assert found not in seen
                seen.add(found)
                bits[place] ^= turn
    assert int(selector.fingerprint()) in seen
    a, b = selector.samples.utility[:2].tolist()
    selector.samples.utility[:2] = torch.tensor([b, a])
    assert a != b
    assert int(selector.fingerprint()) not in seen  # places count, not only values


def test_state_of_another_pool_is_refused_and_changes_nothing(make_selector):
    selector, other = make_selector(30), make_selector(31)
    before = {name: value.clone() for name, value in selector.state_dict().items()}
    with pytest.raises(UserError, match=r"--resume.*utility.*32.*31"):
        selector.load_state_dict(other.state_dict())
    with pytest.raises(UserError, match=r"--lead\.bandit"):
        selector.load_state_dict(make_selector(30, bandit="none").state_dict())
    assert all(torch.equal(before[name], value) for name, value in selector.state_dict().items())


def test_a_sample_longer_than_a_micro_batch_is_refused(make_state):
    lengths = torch.tensor([3, 17, 16])
    with pytest.raises(UserError, match=r"--batch\.capacity 16: must be at least 17"):
        Selector(
            make_state(3),
            lengths,
            lengths,
            method="lead",
            layout=Layout(1, 1, 4, 16),
            seed=0,
            device="cpu",
        )


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_rounds_never_look_at_the_device(make_variant, blind, options):
    """But for `refresh`, where `rescore` has losses measured: its rounds are those of `lead`."""
    selector = make_variant(**options)
    with blind.mode():
        blind.convert(selector)
        for round in range(3):
            max_tokens = torch.zeros((), dtype=torch.int64, device=blind.device) if round == 1 else 500
            plan = selector.plan(round, max_tokens)
            for ids in plan.sample_ids.unbind():
                selector.observe(
                    ids, torch.ones(ids.shape, device=blind.device), torch.zeros(ids.shape, device=blind.device)
                )
            stats = selector.learn(plan)
            values = (*plan, *stats, *selector.state_dict().values(), selector.fingerprint())
            assert {value.device.type for value in values} == {blind.device}
        for read in (
            lambda: stats.reward.item(),
            lambda: bool(stats.samples > 0),
            lambda: plan.sample_ids[plan.sample_ids < 3],
        ):
            with pytest.raises(
                (DataDependentOutputException, DynamicOutputShapeException, RuntimeError, NotImplementedError)
            ):
                read()  # so that the test can fail


@pytest.mark.parametrize(
    ("clusters", "tasks", "dtypes"),
    [
        (4, 256, (torch.uint8, torch.uint8)),
        (4, 257, (torch.uint8, torch.int16)),
        (300, 200, (torch.int16, torch.uint8)),
        (2, 40_000, (torch.uint8, torch.int32)),
    ],
)
def test_narrow_types_hold_every_cluster_and_task(make_selector, clusters, tasks, dtypes):
    """The same plans and counts as with int64, where the numbers reach the ends of the types."""
    narrow, wide = (make_selector(400, clusters=clusters, tasks=tasks, steps=1) for _ in range(2))
    for selector in (narrow, wide):
        ends = torch.arange(400) % 2 == 0
        selector.samples.task = torch.where(ends, tasks - 1, selector.samples.task.long()).to(
            selector.samples.task.dtype
        )
        selector.samples.cluster = torch.where(ends, clusters - 1, selector.samples.cluster.long()).to(
            selector.samples.cluster.dtype
        )
    assert (narrow.samples.cluster.dtype, narrow.samples.task.dtype) == dtypes
    wide.samples.cluster, wide.samples.task, wide.samples.cell = (
        getattr(wide.samples, v).long() for v in ("cluster", "task", "cell")
    )
    for selector in (narrow, wide):
        selector.samples.cell = (selector.samples.cluster.long() * tasks + selector.samples.task).to(
            selector.samples.cell.dtype
        )
        selector.method.arm, selector.method.cell = selector.samples.cluster, selector.samples.cell
        selector.method.count_open()  # counts the eligible anew
    for round in range(4):
        plans = narrow.plan(round, LOTS), wide.plan(round, LOTS)
        assert real(narrow, plans[0])
        stats = [
            train(selector, plan, loss=1 / (1 + round)) for selector, plan in zip((narrow, wide), plans, strict=True)
        ]
        assert all(torch.equal(a, b) for a, b in zip((*plans[0], *stats[0]), (*plans[1], *stats[1]), strict=True))


@pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET"), reason="CPU tensors reach the kernels in Triton's interpreter only"
)
@pytest.mark.parametrize(
    "options", [{}, {"bandit": "none", "task_quotas": "none"}, {"max_visits": 1, "steps": 1}], ids=str
)
def test_plans_of_the_kernels_are_those_of_the_host(make_selector, monkeypatch, options):
    """Bit by bit: the state after training too, so that no later plan can differ."""

    def rounds(selector):
        seen = []
        for round in range(3):
            plan = selector.plan(round, 150)
            seen += [*plan, *train(selector, plan, loss=1 / (1 + round), change=-0.1)]
        return [*seen, *selector.state_dict().values()]

    host = rounds(make_selector(**options))
    monkeypatch.setattr(backend, "_kernels_on_cpu", True)
    assert all(torch.equal(a, b) for a, b in zip(host, rounds(make_selector(**options)), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["lead", "random"])
def test_plans_on_cuda_are_those_of_the_cpu_and_no_round_waits(make_selector, method):
    host, device = make_selector(method=method), make_selector(method=method, device="cuda")
    for round in range(6):
        plan, loss = host.plan(round, 200), 1 / (1 + round)
        train(host, plan, loss=loss)
        torch.cuda.set_sync_debug_mode("error")
        try:
            theirs = device.plan(round, 200)
            for ids in theirs.sample_ids.unbind():
                device.observe(ids, torch.full(ids.shape, loss, device="cuda"), torch.zeros(ids.shape, device="cuda"))
            device.learn(theirs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(plan.sample_ids, theirs.sample_ids.cpu())
    torch.testing.assert_close(host.utility, device.utility.cpu())
