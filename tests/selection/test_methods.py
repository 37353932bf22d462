"""The methods that have no bandit, and `rescore`, each against its definition in plain loops."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from lead_engine.base.errors import UserError
from lead_engine.selection import counter_rng
from lead_engine.selection.methods.random import SHUFFLE
from lead_engine.selection.plan import Layout
from lead_engine.selection.selector import Selector
from lead_kernels import reference

N, ROUNDS = 60, 14


def rounds_of(selector, count=ROUNDS, max_tokens=10**9, scorer=None):
    """Train `count` rounds with losses that grow with the round; yields the bins of every round, samples only, empty
    ones left out.
    """
    for round in range(count):
        if scorer is not None:
            selector.refresh(round, round / count, scorer(round))
        plan = selector.plan(round, max_tokens)
        for ids in plan.sample_ids:
            selector.observe(ids, torch.full(ids.shape, 1.0 + round), torch.zeros(ids.shape))
        selector.learn(plan)
        bins = plan.sample_ids.flatten(0, 1).tolist()
        yield [
            [i for i in row if i < selector.samples.num_samples]
            for row in bins
            if min(row) < selector.samples.num_samples
        ]


def expected(selector, order_of, count=ROUNDS, max_tokens=10**9):
    """The same from `order_of(visits)`, a list of sample ids, best first."""
    shape, visits = selector.layout, [0] * selector.samples.num_samples
    for _ in range(count):
        order = order_of(visits)[: shape.steps * shape.micro_batches * shape.slots]
        packed = reference.pack_plan(
            torch.tensor(order, dtype=torch.int64),
            selector.samples.lengths,
            num_bins=shape.steps * shape.micro_batches,
            capacity=shape.capacity,
            slots=shape.slots,
            max_tokens=max_tokens,
        )
        bins = [[i for i in row if i < len(visits)] for row in packed.sample_ids.tolist()]
        for i in chain.from_iterable(bins):
            visits[i] += 1
        yield [row for row in bins if row]


def least_often_first(candidates, score):
    """Those of the candidates trained least often, by score; NaN last; ties by id."""

    def order(visits):
        least = min((visits[i] for i in candidates), default=0)
        current = [i for i in candidates if visits[i] == least]
        return sorted(current, key=lambda i: (math.isnan(score[i]), -score[i] if not math.isnan(score[i]) else 0, i))

    return order


@pytest.mark.parametrize("max_tokens", [10**9, 60])
def test_loss_ranks_by_the_first_loss_for_good(make_selector, make_state, max_tokens):
    """Ties and NaN among them; dropped samples too. What training makes of U changes nothing."""
    state = make_state(N)
    state.utility[[3, 30, 50]] = float(state.utility[7])
    state.utility[[11, 12]] = torch.nan
    selector = make_selector(N, method="loss", state=state)
    order = least_often_first(range(N), state.utility.tolist())
    got = list(rounds_of(selector, max_tokens=max_tokens))
    assert got == list(expected(selector, order, max_tokens=max_tokens))
    assert sum(map(len, chain.from_iterable(got))) > (2 * N if max_tokens > 60 else 40)  # several passes


def test_ifd_ranks_those_that_the_instruction_helps(make_selector, make_state):
    """exp(NLL given - NLL alone), by its definition; never one that is 1 or more, and nobody where all are."""
    state = make_state(N)
    random = torch.Generator().manual_seed(1)
    state = replace(
        state, answer_nll=torch.rand(N, generator=random) * 4 + 1, difficulty=torch.rand(N, generator=random) * 1.6
    )
    state.difficulty[[4, 5]] = torch.nan
    selector = make_selector(N, method="ifd", state=state)
    given = state.difficulty.double() * state.answer_nll.double()
    ifd = torch.exp(given - state.answer_nll.double()).tolist()
    candidates = [i for i in range(N) if ifd[i] < 1]
    assert 10 < len(candidates) < N - 10
    got = list(rounds_of(selector))
    assert got == list(expected(selector, least_often_first(candidates, ifd)))
    assert {i for row in chain.from_iterable(got) for i in row} == set(candidates)
    hopeless = make_selector(N, method="ifd", state=replace(state, difficulty=torch.full((N,), 1.5)))
    assert list(rounds_of(hopeless, 2)) == [[], []]


@pytest.mark.parametrize("method", ["random", "full"])
def test_random_is_a_pass_after_the_other_in_the_order_of_hashes(make_selector, method):
    selector = make_selector(N, method=method, seed=3)

    def order(visits):
        current = min(visits)
        counters = {i: [torch.tensor(c) for c in (SHUFFLE, current, i)] for i in range(N) if visits[i] == current}
        return sorted(counters, key=lambda i: int(counter_rng.order_keys(3, *counters[i])))

    assert list(rounds_of(selector)) == list(expected(selector, order))


# --- rescore ---


@pytest.mark.parametrize(
    "options", [{}, {"draw": "mixture", "ranking": "soft"}, {"unseen": "drift"}, {"unseen": "estimate"}], ids=str
)
def test_rescore_ranks_by_what_was_measured_for_everybody_eligible(make_selector, made_up_losses, options):
    """U of the eligible is the losses measured, and no estimate stands in for them; the others keep what they had."""
    selector = make_selector(N, method="rescore", max_visits=2, **options)
    ids = torch.arange(N)
    for round in range(ROUNDS):
        before, scorer = selector.samples.utility.clone(), made_up_losses(round)
        eligible = ~selector.samples.dropped & (selector.samples.visits[:-1] < 2)
        selector.refresh(round, 0.0, scorer)
        if round == 0:
            assert scorer.asked == []  # `prepare` has measured the base model
            want = before
        else:
            assert scorer.asked == ids[eligible].tolist()
            want = torch.where(
                torch.cat([eligible, torch.tensor([False])]), made_up_losses(round).given(torch.arange(N + 1)), before
            )
        assert torch.equal(selector.samples.utility, want)
        plan = selector.plan(round, 10**9)
        assert torch.equal(plan.utility, want[plan.sample_ids])
        for step in plan.sample_ids:
            selector.observe(step, torch.full(step.shape, 0.5), torch.zeros(step.shape))
        selector.learn(plan)
    assert scorer.asked == []  # at last nobody is eligible, and nobody is measured
    assert not eligible.any()


def test_rescore_measures_in_the_first_round_too_once_something_was_trained(make_selector, made_up_losses):
    selector = make_selector(N, method="rescore")
    selector.samples.visits[5] = 1
    scorer = made_up_losses(0)
    selector.refresh(0, 0.0, scorer)
    assert len(scorer.asked) == int((~selector.samples.dropped).sum())


# --- random-matched ---


def matched(make_selector, run, **options):
    return make_selector(options.pop("samples", N), method="random-matched", match=run, **options)


def sequence(selector, count=40):
    """Everything trained, in the order in which it was, one sample a step."""
    return [i for row in rounds_of(selector, count) for samples in row for i in samples]


@pytest.fixture
def picks():
    """Rounds of samples, some of them several times."""
    random = np.random.default_rng(0)
    return [random.permutation(N)[:12].tolist() for _ in range(6)]


ONE_BY_ONE = {
    "steps": 4,
    "micro_batches": 1,
    "slots": 1,
}  # a micro-batch of several samples may be packed in another order


def test_matched_follows_the_run_under_other_names(make_selector, make_state, finished_run, picks):
    """One renaming, of one sample to one other, of the same task and of like length: visits and order are the run's."""
    state = make_state(N)
    selector = matched(make_selector, finished_run(N, picks), state=state, **ONE_BY_ONE)
    theirs, ours = list(chain.from_iterable(picks)), sequence(selector)
    assert len(ours) == len(theirs) == 72
    renamed = dict(zip(theirs, ours, strict=True))
    assert [renamed[i] for i in theirs] == ours
    assert len(set(renamed.values())) == len(renamed)
    assert sorted(Counter(theirs).values()) == sorted(Counter(ours).values()) != [1] * len(renamed)
    assert sum(i != renamed[i] for i in renamed) > len(renamed) / 2
    for i, other in renamed.items():
        assert state.task[i] == state.task[other]
        assert state.dropped[i] == state.dropped[other]
        assert not state.dropped[i] or i == other
    assert selector.samples.visits.sum() == 72
    assert list(rounds_of(selector, 2)) == [[], []]  # the run's end


def test_matched_samples_are_of_like_length(make_selector, make_state, finished_run, make_lengths):
    """Within a task, no two of a pair are further apart than 16 places by answer tokens, in steps of an eighth, and
    then tokens.
    """
    n = 2000
    state = make_state(n)
    run = finished_run(n, [list(range(n))])
    shape = {"steps": 50, "micro_batches": 10, "slots": 10, "capacity": 400, "longest": 300}
    selector = matched(make_selector, run, samples=n, state=state, **shape)
    other = selector.method.sequence.tolist()
    assert sorted(other) == list(range(n))
    rows, lengths = selector.samples.rows.tolist(), selector.samples.lengths.tolist()
    for task in range(3):
        members = [i for i in range(n) if state.task[i] == task and not state.dropped[i]]
        members.sort(key=lambda i: (round(8 * math.log2(max(rows[i], 1))), lengths[i], i))
        place = {i: p for p, i in enumerate(members)}
        assert max(abs(place[i] - place[other[i]]) for i in members) < 16
    assert np.mean([abs(math.log(rows[i] / rows[other[i]])) for i in range(n)]) < 0.05
    control = [abs(math.log(rows[i] / rows[(i * 7 + 1) % n])) for i in range(n)]
    assert np.mean(control) > 0.5  # what any other sample would be


def test_matched_depends_on_the_seed_alone(make_selector, make_state, make_lengths, finished_run, picks):
    """Rounds of another length train the same. Where they hold more than the run's, a sample's second visit waits for
    the next round.
    """
    run, state = finished_run(N, picks), make_state(N)
    runs = [sequence(matched(make_selector, run, state=state, **{**ONE_BY_ONE, "steps": s})) for s in (1, 4, 9)]
    assert runs[0] == runs[1][: len(runs[0])]
    assert Counter(runs[1]) == Counter(runs[2])
    lengths = make_lengths(N, 20)
    options = {"method": "random-matched", "layout": Layout(4, 1, 1, 40), "seed": 1, "device": "cpu"}
    chosen = matched(make_selector, run, state=state).method.options
    other = Selector(state, lengths, (lengths // 2).clamp(min=1), options=chosen, **options)
    assert sequence(other) != runs[1]


def test_matched_says_what_is_wrong_with_the_run(make_selector, finished_run, picks, tmp_path):
    with pytest.raises(UserError, match=r"--random-matched\.match.*needs the folder"):
        matched(make_selector, None)
    with pytest.raises(UserError, match=r"--random-matched\.match.*nothing: not a finished run \(no summary\.json"):
        matched(make_selector, tmp_path / "nothing")
    with pytest.raises(UserError, match=r"a pool of 70 samples, this one has 60"):
        matched(make_selector, finished_run(70, picks))
    run = finished_run(N, picks)
    (run / "summary.json").write_text(json.dumps({"pool": str(tmp_path / "moved")}), encoding="utf-8")
    with pytest.raises(UserError, match=r"trained on the pool .*moved, which has no records\.parquet"):
        matched(make_selector, run)
    (run / "selection.jsonl").unlink()
    with pytest.raises(UserError, match=r"not a finished run \(no selection\.jsonl"):
        matched(make_selector, run)
