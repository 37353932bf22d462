"""IterIT's epochs on small pools, against its definition on dense matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor

from lead_engine.pool.store import TokenStore
from lead_engine.selection.greedy_tfidf import token_tfidf
from lead_engine.selection.methods.iterit import Iterit, IteritOptions, answer_tokens
from lead_engine.selection.samples import Samples

PLACES = 3


def joined(rounds: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(rounds))


class FakeScorer:
    """Losses from a table; remembers what it was asked."""

    def __init__(self, store: TokenStore, given: Tensor, alone: Tensor) -> None:
        self.store, self.table, self.asked = store, (given, alone), []

    def given(self, ids: Tensor) -> Tensor:
        self.asked.append(("given", ids.tolist()))
        return self.table[0][ids]

    def alone(self, ids: Tensor) -> Tensor:
        self.asked.append(("alone", ids.tolist()))
        return self.table[1][ids]


class Run:
    """A method, its pool, and what is trained with it."""

    def __init__(self, folder, state, pairs, seed: int, **options) -> None:
        TokenStore.write(folder / "store", pairs)
        self.pairs, self.state = pairs, state
        self.store = TokenStore.open(folder / "store")
        random = torch.Generator().manual_seed(seed)
        n = len(pairs)
        self.scorer = FakeScorer(
            self.store, torch.rand(n, generator=random) * 5, torch.rand(n, generator=random) * 5 + 1
        )
        self.options = options
        self.method = self.fresh()

    def fresh(self) -> Iterit:
        samples = Samples(self.state, self.store.lengths, self.store.response_rows, "cpu")
        return Iterit(samples, self.state, IteritOptions(**self.options), PLACES, seed=0)

    def round(self, spent: float, count: int = PLACES, method: Iterit | None = None) -> list[int]:
        """Refresh, and train the first `count` of the order."""
        method = method or self.method
        method.refresh(0, spent, self.scorer)
        ids = method.order(0, method.draw(0)).sample_ids
        assert ids.shape == (PLACES,)
        ids = [i for i in ids.tolist() if i < len(self.pairs)][:count]
        assert len(ids) == len(set(ids)), "a sample twice in a round"
        method.samples.visits[ids] += 1
        return ids

    def greedy(self, candidates: list[int], ifd: Tensor, decay: float = 0.1) -> list[int]:
        """IterIT's order of the candidates, on a dense matrix."""
        candidates = [i for i in sorted(candidates) if float(ifd[i]) < 1]
        answers = [[t for t, m in list(zip(*self.pairs[i], strict=True))[1:] if m] for i in candidates]
        offsets = np.cumsum([0, *map(len, answers)])
        matrix = token_tfidf(np.array(joined(answers), dtype=np.int64), offsets).toarray()
        left, weight, chosen = list(range(len(candidates))), np.ones(matrix.shape[1]), []
        while left:
            best = max(left, key=lambda r: (float(ifd[candidates[r]]) * math.fsum(matrix[r] * weight), -r))
            left.remove(best)
            chosen.append(candidates[best])
            weight[matrix[best] > 0] *= decay
        return chosen


@pytest.fixture
def make_run(make_state, tmp_path) -> Callable[..., Run]:
    """A run on a random pool of few different tokens; samples 0 and 1 have IFD 1.2 and NaN."""

    def make(samples: int = 40, seed: int = 0, **options) -> Run:
        random = np.random.default_rng(seed)
        pairs = []
        for _ in range(samples):
            length = int(random.integers(4, 16))
            pairs.append((random.integers(0, 30, length).tolist(), (random.random(length) < 0.6).tolist()))
        state = make_state(samples, seed=seed)
        nll = torch.rand(samples, generator=torch.Generator().manual_seed(seed)) * 3 + 1
        difficulty = state.difficulty * 0.99
        difficulty[0], difficulty[1] = 1 + math.log(1.2) / float(nll[0]), torch.nan
        return Run(tmp_path, replace(state, difficulty=difficulty, answer_nll=nll), pairs, seed, **options)

    return make


@pytest.mark.parametrize("seed", range(5))
def test_the_first_epoch_follows_what_prepare_measured(make_run, seed: int) -> None:
    """The list is lengthened on the way: it begins with 4 x PLACES of 38."""
    run = make_run(seed=seed, decay=0.3)
    expected = run.greedy(list(range(40)), run.state.ifd, decay=0.3)
    assert len(expected) == 38
    trained = []
    for _ in range(100):
        trained += run.round(0.0)
        if len(trained) >= 38:
            break
    assert trained == expected
    assert run.scorer.asked == []


def test_rounds_of_any_length_train_the_same_sequence(make_run) -> None:
    run = make_run()
    expected = run.greedy(list(range(40)), run.state.ifd)
    trained = joined(run.round(0.0, count) for count in (1, 3, 0, 2, 3, 3, 1, 1))
    assert trained == expected[:14]


def test_a_sample_trained_out_of_turn_is_passed_over(make_run) -> None:
    """Packing may take a later sample first."""
    run = make_run()
    expected = run.greedy(list(range(40)), run.state.ifd)
    run.method.refresh(0, 0.0, run.scorer)
    run.method.samples.visits[expected[1]] += 1
    assert run.method.order(0, run.method.draw(0)).sample_ids.tolist() == [expected[0], expected[2], expected[3]]


def test_a_list_that_is_used_up_begins_again(make_run) -> None:
    run = make_run(samples=9)
    expected = run.greedy(list(range(9)), run.state.ifd)
    trained = joined(run.round(0.0) for _ in range(6))
    assert trained == expected * 2 + expected[: len(trained) - 14]
    assert len(expected) == 7
    assert len(trained) == 3 + 3 + 1 + 3 + 3 + 1


def test_a_list_of_a_round_exactly_is_lengthened_before_it_begins_again(make_run) -> None:
    """As many places as the list has to offer are trained: the next must be new ones."""
    run = make_run()
    trained = joined(run.round(0.0) for _ in range(12))
    assert len(set(trained)) == 36


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_later_epochs_measure_the_best_again(make_run, seed: int, factor: float) -> None:
    run = make_run(seed=seed, epochs=2, candidates=factor)
    for _ in range(4):
        run.round(0.4)
    run.scorer.table[0][2:5] = torch.nan
    trained = run.round(0.5)
    last = {i: float(x) for i, x in enumerate(run.state.ifd) if x < 1}
    best = sorted(last, key=lambda i: (-last[i], i))[: math.ceil(factor * 12)]
    assert run.scorer.asked == [("given", best), ("alone", best)]
    ifd = torch.exp(run.scorer.table[0] - run.scorer.table[1])
    expected = run.greedy(best, ifd)
    assert 0 < len(expected) < len(best), "some are 1 or more, or NaN, now"
    for _ in range(30):
        if len(trained) >= len(expected):
            break
        trained += run.round(0.6)
    assert trained == expected
    assert len(run.scorer.asked) == 2, "measured once an epoch"


def test_the_third_epoch_goes_by_what_the_second_measured(make_run) -> None:
    """Known IFD: the second epoch's where it measured, the first's elsewhere."""
    run = make_run(epochs=3, candidates=2.0)
    run.round(0.0)
    run.round(0.34)
    known = run.state.ifd.clone()
    measured = run.scorer.asked[0][1]
    known[measured] = torch.exp(run.scorer.table[0] - run.scorer.table[1])[measured]
    assert torch.equal(run.method.ifd.nan_to_num(9), known.nan_to_num(9))
    run.round(0.67, count=1)
    last = {i: float(x) for i, x in enumerate(known) if x < 1}
    assert run.scorer.asked[2][1] == sorted(last, key=lambda i: (-last[i], i))[:6]


@pytest.mark.parametrize(
    ("epochs", "spent", "expected"),
    [
        (3, 0.0, 0),
        (3, 0.33, 0),
        (3, 1 / 3, 1),
        (3, 0.66, 1),
        (3, 2 / 3, 2),
        (3, 0.99, 2),
        (3, 1.0, 2),
        (1, 0.99, 0),
        (4, 0.8, 3),
    ],
)
def test_when_epochs_begin(make_run, epochs: int, spent: float, expected: int) -> None:
    run = make_run(epochs=epochs)
    run.round(0.0)
    run.round(spent)
    assert int(run.method.epoch) == expected


def test_no_candidate_is_an_empty_order(make_run) -> None:
    run = make_run(epochs=2)
    run.round(0.0)
    run.scorer.table[0].fill_(9)
    assert run.round(0.5) == []


@pytest.mark.parametrize("stop", range(24))
def test_a_resumed_run_goes_on_as_if_never_stopped(make_run, stop: int) -> None:
    """24 rounds, three epochs, in each of which the list is lengthened once; a checkpoint after `stop` of them."""
    run = make_run(samples=60, epochs=3, candidates=4.0)
    spent = [number / 24 for number in range(24)]
    whole = [run.round(share) for share in spent]
    run.method = run.fresh()
    before = [run.round(share) for share in spent[:stop]]
    saved = {name: tensor.clone() for name, tensor in run.method.state_dict().items()}
    visits = run.method.samples.visits.clone()
    method = run.fresh()
    run.round(0.0, count=0, method=method)  # what it has in mind is to be forgotten
    own = method.state_dict()
    assert own.keys() == saved.keys()
    for name, tensor in own.items():
        assert tensor.shape == saved[name].shape
        assert tensor.dtype == saved[name].dtype
        tensor.copy_(saved[name])
    method.samples.visits.copy_(visits)
    method.loaded()
    assert before + [run.round(share, method=method) for share in spent[stop:]] == whole
    assert len(run.scorer.asked) == 8, "each run measured at the beginning of two epochs"


def test_an_order_does_not_look_at_the_device(make_run, blind) -> None:
    run = make_run()
    run.round(0.0)
    with blind.mode():
        blind.convert(run.method)
        assert run.method.order(1, run.method.draw(1)).sample_ids.shape == (PLACES,)


def test_answer_tokens(make_run) -> None:
    run = make_run()
    ids = torch.tensor([5, 0, 39, 7])
    tokens, offsets = answer_tokens(run.store, ids)
    for place, i in enumerate(ids.tolist()):
        words, mask = run.pairs[i]
        assert tokens[offsets[place] : offsets[place + 1]].tolist() == [
            t for t, m in list(zip(words, mask, strict=True))[1:] if m
        ]
    assert answer_tokens(run.store, ids[:0])[1].tolist() == [0]
