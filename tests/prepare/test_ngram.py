"""n-gram losses against counting by hand, one sample after another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lead_engine.pool.store import TokenStore
from lead_engine.prepare import ngram
from lead_engine.prepare.difficulty import difficulty
from lead_engine.prepare.ngram import Counts, fit_weights, ngram_scores

Sample = tuple[list[int], list[bool]]


def ratio(count: int, total: int, otherwise: float) -> float:
    return count / total if total else otherwise


def events(sample: Sample, response: bool) -> list[tuple[int, int]]:
    """(token before, token) of every token but the first that is (no) response."""
    ids, mask = sample
    return [(ids[p - 1], ids[p]) for p in range(1, len(ids)) if mask[p] == response]


def slow_alone(samples: list[Sample], i: int) -> list[list[float]]:
    """Rows of 1 / V, unigram and bigram probability, counted over all samples but i."""
    size = max(max(ids) for ids, _ in samples) + 1
    others = [event for j, sample in enumerate(samples) if j != i for event in events(sample, True)]
    pair, token, before = Counter(others), Counter(t for _, t in others), Counter(v for v, _ in others)
    rows = []
    for v, t in events(samples[i], True):
        one = ratio(token[t], len(others), 1 / size)
        rows.append([1 / size, one, ratio(pair[v, t], before[v], one)])
    return rows


def slow_given(sample: Sample, alone: list[float]) -> list[list[float]]:
    ids, mask = sample
    token = Counter(t for t, m in zip(ids, mask, strict=True) if not m)
    pairs = events(sample, False)
    pair, before = Counter(pairs), Counter(v for v, _ in pairs)
    rows = []
    for (v, t), p in zip(events(sample, True), alone, strict=True):
        one = ratio(token[t], token.total(), p)
        rows.append([p, one, ratio(pair[v, t], before[v], one)])
    return rows


def slow_weights(rows: list[list[float]]) -> list[float]:
    weights = [1 / 3] * 3
    for _ in range(ngram.EM_STEPS):
        sums = [0.0] * 3
        for row in rows:
            mixed = sum(w * p for w, p in zip(weights, row, strict=True))
            sums = [s + w * p / mixed for s, w, p in zip(sums, weights, row, strict=True)]
        weights = [s / len(rows) for s in sums]
    return weights


def slow_scores(samples: list[Sample], every: int = 1) -> tuple[list[float], list[float]]:
    """(given, alone) a sample; weights fitted to every `every`-th."""

    def mix(rows: list[list[float]], weights: list[float]) -> list[float]:
        return [sum(w * p for w, p in zip(weights, row, strict=True)) for row in rows]

    terms = [slow_alone(samples, i) for i in range(len(samples))]
    weights = slow_weights([row for some in terms[::every] for row in some])
    alone = [mix(some, weights) for some in terms]
    terms = [slow_given(sample, p) for sample, p in zip(samples, alone, strict=True)]
    weights = slow_weights([row for some in terms[::every] for row in some])
    given = [mix(some, weights) for some in terms]
    return tuple([-sum(map(math.log, p)) / max(1, len(p)) for p in some] for some in (given, alone))


@pytest.fixture
def make_store(tmp_path) -> Callable[[list[Sample]], TokenStore]:
    def make(samples: list[Sample]) -> TokenStore:
        TokenStore.write(tmp_path / "store", samples)
        return TokenStore.open(tmp_path / "store")

    return make


def random_samples(seed: int, count: int = 25, vocabulary: int = 9) -> list[Sample]:
    """Few tokens, so that pairs repeat; several turns; some samples without an answer, some without an instruction."""
    random = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        length = int(random.integers(1, 15))
        mask = random.random(length) < (0.0 if number == 3 else 1.0 if number == 5 else 0.5)
        samples.append(([int(t) * 1000 for t in random.integers(0, vocabulary, length)], mask.tolist()))
    samples.append(([3000, 8001, 8002], [False, True, True]))  # tokens of no other sample
    return samples


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("block", "fit"), [(1 << 20, 1 << 20), (1, 1 << 20), (40, 60)])
def test_equals_counting_by_hand(seed: int, block: int, fit: int, make_store, monkeypatch) -> None:
    monkeypatch.setattr(ngram, "BLOCK_TOKENS", block)
    monkeypatch.setattr(ngram, "FIT_TOKENS", fit)
    samples = random_samples(seed)
    store = make_store(samples)
    every = -(-store.num_tokens // fit)
    assert (every > 1) == (fit == 60)
    utility, given, alone = ngram_scores(store)
    expected_given, expected_alone = slow_scores(samples, every)
    assert given.dtype == alone.dtype == utility.dtype == torch.float32
    assert given.tolist() == pytest.approx(expected_given, rel=1e-6)
    assert alone.tolist() == pytest.approx(expected_alone, rel=1e-6)
    assert torch.equal(utility, given)
    assert given[3] == alone[3] == 0, "no answer, no loss"


def test_a_pool_of_one_sample_knows_nothing_but_its_instruction(make_store) -> None:
    """All counts but its own are none: alone is 1 / V = 1/8, whatever the sample repeats."""
    _, given, alone = ngram_scores(make_store([([7, 1, 2, 1, 2, 1, 2], [False] * 3 + [True] * 4)]))
    assert float(alone[0]) == pytest.approx(math.log(8), rel=1e-6)
    assert float(given[0]) < float(alone[0])


def test_no_answers_at_all(make_store) -> None:
    utility, given, alone = ngram_scores(make_store([([1, 2], [False, False]), ([3], [True])]))
    assert utility.tolist() == given.tolist() == alone.tolist() == [0, 0]


def test_a_copied_answer_is_easier_than_one_that_is_not(make_store) -> None:
    random = np.random.default_rng(0)
    samples = []
    for number in range(60):
        question = random.integers(0, 500, 12).tolist()
        answer = question[3:9] if number % 2 else random.integers(0, 500, 6).tolist()
        samples.append((question + answer, [False] * 12 + [True] * 6))
    _, given, alone = ngram_scores(make_store(samples))
    harder = difficulty(given, alone)
    assert harder[1::2].max() < 0.8 < 1 < harder[0::2].min()


def test_a_pool_twice_over_is_as_if_every_sample_had_been_read_before(make_store) -> None:
    """The twin predicts; the sample itself does not, or a pool without twins would look the same."""
    random = np.random.default_rng(1)
    samples = [(random.integers(0, 10_000, 10).tolist(), [False] * 4 + [True] * 6) for _ in range(20)]
    single = ngram_scores(make_store(samples))[2]
    double = ngram_scores(make_store(samples + samples))[2]
    assert double.max() < 0.5 < 8 < single.min()


def test_the_same_twice(make_store) -> None:
    store = make_store(random_samples(9))
    for first, second in zip(ngram_scores(store), ngram_scores(store), strict=True):
        assert torch.equal(first, second)


def test_weights_maximise_the_likelihood() -> None:
    random = np.random.default_rng(2)
    terms = random.random((3, 4000)) ** [[1], [2], [3]]
    weights = fit_weights(terms)
    assert weights.sum() == pytest.approx(1)
    best = np.log(weights @ terms).sum()
    for step in ([0.02, -0.02, 0], [-0.02, 0, 0.02], [0, 0.02, -0.02]):
        for sign in (1, -1):
            other = weights + sign * np.array(step)
            assert (other < 0).any() or np.log(other @ terms).sum() < best + 1e-9 * abs(best)


def test_counts_of_what_never_occurs() -> None:
    counts = Counts(np.array([2, 5, 9]), np.array([1, 7, 3]))
    assert counts.of(np.array([9, 10, 0, 5, 6])).tolist() == [3, 0, 0, 7, 0]
    assert Counts(np.zeros(0, np.int64), np.zeros(0, np.int64)).of(np.array([4])).tolist() == [0]
