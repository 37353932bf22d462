"""The lazy greedy choice against re-summing everything for every choice."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.sparse as sp

from lead_engine.selection import greedy_tfidf
from lead_engine.selection.greedy_tfidf import answer_tfidf, choose, token_tfidf


def slow(tfidf: np.ndarray, quality: np.ndarray, costs: np.ndarray, budget: float, decay: float) -> list[int]:
    """The definition, on a dense matrix [n, V]."""
    weight = [1.0] * tfidf.shape[1]
    left, chosen, spent = list(range(len(tfidf))), [], 0
    while left and spent < budget:
        scores = {i: quality[i] * math.fsum(value * w for value, w in zip(tfidf[i], weight, strict=True)) for i in left}
        best = min(left, key=lambda i: (-scores[i], i))
        left.remove(best)
        chosen.append(best)
        spent += costs[best]
        weight = [w * decay if value else w for value, w in zip(tfidf[best], weight, strict=True)]
    return chosen


def dyadic(random: np.random.Generator, rows: int, columns: int, filled: float) -> np.ndarray:
    """Multiples of 1/8: with a decay of 1/2 every sum is exact, so that equal scores are equal in any order of
    summation.
    """
    return random.integers(1, 9, (rows, columns)) / 8 * (random.random((rows, columns)) < filled)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("batches", [(8, 512), (1, 1), (2, 4)])
def test_equals_the_slow_reference(seed: int, batches: tuple[int, int], monkeypatch) -> None:
    monkeypatch.setattr(greedy_tfidf, "LEAST_BATCH", batches[0])
    monkeypatch.setattr(greedy_tfidf, "MOST_BATCH", batches[1])
    random = np.random.default_rng(seed)
    rows, columns = int(random.integers(1, 60)), int(random.integers(1, 40))
    matrix = random.random((rows, columns)) * (random.random((rows, columns)) < random.random())
    quality, costs = random.random(rows), random.integers(1, 50, rows)
    for budget in (1, int(costs.sum() // 3), int(costs.sum()) + 1):
        got = choose(sp.csr_matrix(matrix), quality, costs, budget, 0.1)
        assert got.dtype == np.int64
        assert got.tolist() == slow(matrix, quality, costs, budget, 0.1)


@pytest.mark.parametrize("seed", range(20))
def test_ties_duplicates_empty_rows_and_quality_zero(seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix = dyadic(random, 10, 6, 0.5)
    matrix = matrix[random.integers(0, 10, 30)]  # every row about three times
    matrix[random.random(30) < 0.2] = 0
    quality = random.integers(0, 4, 30) / 4
    costs = np.ones(30, dtype=np.int64)
    assert choose(sp.csr_matrix(matrix), quality, costs, 30, 0.5).tolist() == slow(matrix, quality, costs, 30, 0.5)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_all_rows_alike_are_taken_in_order(decay: float) -> None:
    matrix = sp.csr_matrix(np.full((20, 3), 0.5))
    assert choose(matrix, np.ones(20), np.ones(20), 20, decay).tolist() == list(range(20))


def test_a_common_column_makes_every_bound_stale() -> None:
    """All rows share one heavy column, and differ in light ones: after the first choice no bound is near its score."""
    matrix = np.concatenate([np.full((40, 1), 64.0), np.eye(40) * np.arange(1, 41) / 8], axis=1)
    quality = np.where(np.arange(40) % 2, 1.0, 0.5)
    costs = np.ones(40, dtype=np.int64)
    assert choose(sp.csr_matrix(matrix), quality, costs, 25, 0.5).tolist() == slow(matrix, quality, costs, 25, 0.5)


def test_stored_zeros_and_repeated_entries_are_what_they_add_up_to() -> None:
    """A zero that is stored is no use of its column: the second row's weight must not fall by the first's."""
    stored = sp.csr_matrix((3, 3))
    stored.data, stored.indices, stored.indptr = (
        np.array([1.0, 1.0, 0.0, 1.5, 1.0]),
        np.array([0, 0, 1, 1, 2]),
        np.array([0, 3, 4, 5]),
    )
    dense = np.array([[2.0, 0, 0], [0, 1.5, 0], [0, 0, 1.0]])
    assert (
        choose(stored, np.ones(3), np.ones(3), 3, 0.5).tolist()
        == slow(dense, np.ones(3), np.ones(3), 3, 0.5)
        == [0, 1, 2]
    )
    assert stored.nnz == 5, "the caller's matrix is left as it was"


def test_stops_when_the_costs_reach_the_budget() -> None:
    matrix, costs = sp.csr_matrix(np.diag([4.0, 3, 2, 1])), np.array([10, 10, 10, 10])
    assert choose(matrix, np.ones(4), costs, 20).tolist() == [0, 1]
    assert choose(matrix, np.ones(4), costs, 21).tolist() == [0, 1, 2]
    assert choose(matrix, np.ones(4), costs, 0).tolist() == []
    assert choose(matrix[:0], np.ones(0), costs[:0], 5).tolist() == []


def test_most_rows_are_never_scored_again(monkeypatch) -> None:
    """What it is for: 20 choices among 2,000 rows of few columns in common need far fewer than 20 x 2,000 scores."""
    random = np.random.default_rng(0)
    matrix = sp.random(2000, 5000, density=0.002, random_state=random, format="csr")
    scored = []
    score = greedy_tfidf._Scores.__call__
    monkeypatch.setattr(
        greedy_tfidf._Scores, "__call__", lambda self, rows: scored.append(len(rows)) or score(self, rows)
    )
    assert len(choose(matrix, random.random(2000), np.ones(2000), 20)) == 20
    assert 2000 <= sum(scored) < 3000


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tfidf", {"tfidf": sp.csr_matrix([[1.0, -1], [1, 1]])}),
        ("tfidf", {"tfidf": sp.csr_matrix([[1.0, np.nan], [1, 1]])}),
        ("quality", {"quality": np.array([1.0, np.nan])}),
        ("quality", {"quality": np.array([1.0, -0.1])}),
        ("costs", {"costs": np.array([1, 0])}),
        ("decay", {"decay": 1.5}),
        ("1 costs", {"costs": np.array([1])}),
    ],
)
def test_refuses_what_breaks_the_bound(name: str, change: dict) -> None:
    arguments = {
        "tfidf": sp.csr_matrix(np.eye(2)),
        "quality": np.ones(2),
        "costs": np.ones(2),
        "budget": 1,
        "decay": 0.1,
    }
    with pytest.raises(ValueError, match=name):
        choose(**{**arguments, **change})


def test_answer_tfidf_by_hand() -> None:
    """Two answers; "red" in both: idf ln(3/3) + 1 = 1, all else ln(3/2) + 1; lower case, words of two letters and
    more.
    """
    matrix = answer_tfidf(["Red a fox", "red"])
    rare = math.log(1.5) + 1
    length = math.sqrt(1 + 2 * rare**2)  # red, fox, "red fox"
    assert sorted(matrix[0].data) == pytest.approx([1 / length, rare / length, rare / length])
    assert matrix[1].data.tolist() == [1.0]


def test_answer_tfidf_without_any_word() -> None:
    assert answer_tfidf(["", "?!"]).shape == (2, 0)
    assert choose(answer_tfidf(["", "?!"]), np.ones(2), np.ones(2), 2).tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_token_tfidf_is_answer_tfidf_with_tokens_for_words(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 30, 25)
    lengths[:5] = [0, 1, 2, 3, 0]
    tokens = random.integers(0, 12, lengths.sum()) * 7919
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    got = token_tfidf(tokens, offsets)
    words = answer_tfidf([" ".join(f"t{t}" for t in tokens[a:b]) for a, b in itertools.pairwise(offsets)])
    assert got.shape == words.shape
    np.testing.assert_allclose(
        (got @ got.T).toarray(), (words @ words.T).toarray(), atol=1e-12
    )  # columns are numbered differently
    np.testing.assert_allclose(np.sort(got.toarray(), axis=1), np.sort(words.toarray(), axis=1), atol=1e-12)


def test_token_tfidf_of_nothing() -> None:
    assert token_tfidf(np.zeros(0, dtype=np.int32), np.zeros(4, dtype=np.int64)).shape == (3, 0)
    assert token_tfidf(np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64)).shape == (0, 0)
