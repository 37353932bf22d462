"""IterIT's greedy choice (arXiv 2412.17365): good answers whose n-grams the earlier choices have not used up."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from sklearn.feature_extraction.text import TfidfTransformer, TfidfVectorizer

LONGEST = 3
"""n of the longest n-grams."""
LEAST_BATCH, MOST_BATCH = 8, 512
"""Rows scored in one go: one costs as much as eight, and more than needed are wasted."""


def choose(
    tfidf: sp.csr_matrix, quality: np.ndarray, costs: np.ndarray, budget: float, decay: float = 0.1
) -> np.ndarray:
    """Row numbers, int64 [m], in the order chosen, until their costs reach `budget` or no row is left.

    Each choice is the row i with the greatest quality_i * sum_c tfidf[i, c] * w_c among those not chosen yet, the
    lowest of equals; then w_c *= decay for every column c that it uses. w starts as 1. tfidf: [n, V], nothing below 0;
    quality: float [n], nothing below 0 (IFD); costs: [n], above 0 (tokens). ValueError otherwise.

    Weights only fall, so scores only fall (also when rounded: every row is summed in one fixed order), so a score
    computed earlier bounds what it is now. A row whose score, computed now, is no lower than all others' bounds is
    therefore the greatest, and nobody else need be scored: the lazy greedy algorithm of Minoux (1978), "CELF" of
    Leskovec et al. (KDD 2007).
    """
    matrix = _checked(tfidf, quality, costs, decay)
    score = _Scores(matrix, quality, decay)
    first = score(np.arange(len(quality))).tolist()  # NumPy throughout: no device is waited for
    heap = [(-value, row) for row, value in enumerate(first)]  # least first: greatest, then lowest row
    heapq.heapify(heap)
    scored_at = [0] * len(heap)
    chosen: list[int] = []
    spent, batch = 0, LEAST_BATCH
    while heap and spent < budget:
        row = heap[0][1]
        if scored_at[row] == len(chosen):
            heapq.heappop(heap)
            chosen.append(row)
            spent += costs[row]
            score.use(row)
            batch = LEAST_BATCH
            continue
        stale = [heapq.heappop(heap)[1]]
        while heap and len(stale) < batch and scored_at[heap[0][1]] < len(chosen):
            stale.append(heapq.heappop(heap)[1])
        for row, value in zip(stale, score(np.array(stale)).tolist(), strict=True):
            heapq.heappush(heap, (-value, row))
            scored_at[row] = len(chosen)
        batch = min(2 * batch, MOST_BATCH)
    return np.array(chosen, dtype=np.int64)


def answer_tfidf(texts: Sequence[str]) -> sp.csr_matrix:
    """TF-IDF over words and their 2- and 3-grams, as the published code has it: float64 [n, V], rows of length 1 (0 for
    a text of no word).

    A word is two letters or more, in lower case (scikit-learn's default).
    """
    try:
        return TfidfVectorizer(ngram_range=(1, LONGEST)).fit_transform(texts).tocsr()
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        return sp.csr_matrix((len(texts), 0))


def token_tfidf(tokens: np.ndarray, offsets: np.ndarray) -> sp.csr_matrix:
    """TF-IDF over token ids and their 2- and 3-grams: float64 [n, V], rows of length 1 (0 for an empty answer).

    Answer i is tokens[offsets[i] : offsets[i + 1]]; tokens: integers of 0 and more [total], offsets: int64 [n + 1]. The
    formula is
    `answer_tfidf`'s, with tokens for words: no text need be at hand, and no dictionary of strings is built.
    """
    count = len(offsets) - 1
    answer = np.repeat(np.arange(count), np.diff(offsets))
    _, word = np.unique(tokens, return_inverse=True)
    words = int(word.max(initial=-1)) + 1
    rows, columns, width = [], [], 0
    gram = word.astype(np.int64)
    for n in range(1, LONGEST + 1):
        if n > 1:  # the (n-1)-gram that begins at a place, and the word behind it, where both lie in one answer
            inside = answer[: len(answer) - n + 1] == answer[n - 1 :]
            _, fresh = np.unique(gram[: len(inside)][inside] * words + word[n - 1 :][inside], return_inverse=True)
            gram = np.full(len(inside), -1)
            gram[inside] = fresh
        there = gram >= 0
        rows.append(answer[: len(gram)][there])
        columns.append(gram[there] + width)
        width += int(gram.max(initial=-1)) + 1
    row, column = np.concatenate(rows), np.concatenate(columns)
    counts = sp.csr_matrix((np.ones(len(row)), (row, column)), shape=(count, width))  # adds up what occurs twice
    return TfidfTransformer().fit_transform(counts).tocsr() if count and width else counts


class _Scores:
    """Scores of rows under the weights of now."""

    def __init__(self, matrix: sp.csr_matrix, quality: np.ndarray, decay: float) -> None:
        self.matrix, self.quality, self.decay = matrix, quality, decay
        self.weight = np.ones(matrix.shape[1])

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        scores: np.ndarray = self.matrix[rows] @ self.weight  # each row from left to right, however many there are
        weighted: np.ndarray = self.quality[rows] * scores
        return weighted

    def use(self, row: int) -> None:
        self.weight[self.matrix.indices[self.matrix.indptr[row] : self.matrix.indptr[row + 1]]] *= self.decay


def _checked(tfidf: sp.csr_matrix, quality: np.ndarray, costs: np.ndarray, decay: float) -> sp.csr_matrix:
    """The matrix without stored zeros, columns in ascending order."""
    matrix = sp.csr_matrix(tfidf, dtype=np.float64, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    if not len(quality) == len(costs) == matrix.shape[0]:
        raise ValueError(f"{matrix.shape[0]} rows, {len(quality)} qualities and {len(costs)} costs")
    if not (np.all(matrix.data >= 0) and np.all(np.isfinite(matrix.data))):
        raise ValueError("tfidf: must be finite and nowhere below 0")
    if not (np.all(quality >= 0) and np.all(np.isfinite(quality))):
        raise ValueError("quality: must be finite and nowhere below 0")
    if not np.all(costs > 0):
        raise ValueError("costs: must be above 0")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay {decay}: must be in [0, 1]")
    return matrix
