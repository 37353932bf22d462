"""IterIT's greedy choice: lazily (`choose`), and scoring everybody again for every choice.

    python bench/greedy_tfidf.py [--pool FILE.jsonl] [--out FILE]

At each size: so many random answers of the pool, 2.5 % of them chosen, quality drawn from [0.3, 1) (IFD differs from model to model, and no
model is at hand here). The times are of the choice alone; that of the TF-IDF, which all share, stands beside them.

- lazy: `lead_engine.selection.greedy_tfidf.choose`.
- re-sum: one sparse product of the whole matrix with the weights for every choice. What a plain vectorised program would do.
- as published: scales the used columns of a CSC matrix in place, empties the chosen row entry by entry, and sums all rows for every choice.
  Timed for a few choices and scaled up to all of them ("estimated": true), since every choice costs about the same.

All must choose the same rows, or the script stops.
"""
from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from machine import write

from lead_engine.pool.records import read_records
from lead_engine.selection.greedy_tfidf import answer_tfidf, choose

SIZES, SHARE, DECAY = (1_000, 5_000, 15_000, 50_000), 0.025, 0.1
REPEATS = 3
RESUM_SECONDS, PUBLISHED_CHOICES = 60.0, 10
"""Most seconds for one re-sum, and the choices timed of the published form."""


def resum(tfidf: sp.csr_matrix, quality: np.ndarray, count: int) -> list[int]:
    """`count` choices, each by the scores of all rows."""
    weight, open_quality, chosen = np.ones(tfidf.shape[1]), quality.copy(), []
    for _ in range(count):
        best = int(np.argmax(open_quality * (tfidf @ weight)))
        chosen.append(best)
        open_quality[best] = -1
        weight[tfidf.indices[tfidf.indptr[best] : tfidf.indptr[best + 1]]] *= DECAY
    return chosen


def as_published(tfidf: sp.csr_matrix, quality: np.ndarray, count: int) -> list[int]:
    """`count` choices with the operations of the published code: the weights are kept in the matrix, column by column."""
    matrix, chosen = tfidf.tocsc(), []
    for _ in range(count):
        best = int(np.argmax(quality * np.asarray(matrix.sum(axis=1)).ravel()))
        chosen.append(best)
        for column in sp.find(matrix[best, :])[1]:
            matrix.data[matrix.indptr[column] : matrix.indptr[column + 1]] *= DECAY
            matrix[best, column] = 0.0
    return chosen


def timed(run: Callable[[], list[int] | np.ndarray], repeats: int) -> tuple[float, list[int]]:
    """(seconds of the quickest, rows chosen)."""
    seconds, chosen = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        chosen = [int(row) for row in run()]
        seconds.append(time.perf_counter() - start)
    return min(seconds), chosen


def agree(name: str, got: list[int], expected: list[int]) -> None:
    if got != expected[: len(got)]:
        sys.exit(f"{name} and lazy choose different rows")


def measure(texts: list[str]) -> dict[str, object]:
    start = time.perf_counter()
    tfidf = answer_tfidf(texts)
    tfidf_seconds = time.perf_counter() - start
    quality = np.random.default_rng(1).uniform(0.3, 1, len(texts))
    count = int(SHARE * len(texts))
    lazy, chosen = timed(lambda: choose(tfidf, quality, np.ones(len(texts)), count, DECAY), REPEATS)

    first, rows = timed(lambda: resum(tfidf, quality, min(10, count)), 1)
    whole = first / len(rows) * count < RESUM_SECONDS
    if whole:
        first, rows = timed(lambda: resum(tfidf, quality, count), 1)
    agree("re-sum", rows, chosen)
    summed = first / len(rows) * count

    few = min(PUBLISHED_CHOICES, count)
    published, rows = timed(lambda: as_published(tfidf, quality, few), 1)
    agree("as published", rows, chosen)
    published *= count / few
    return {
        "answers": len(texts), "chosen": count, "columns": tfidf.shape[1], "entries": tfidf.nnz, "tfidf_seconds": tfidf_seconds,
        "lazy_seconds": lazy,
        "resum_seconds": summed, "resum_estimated": not whole, "resum_over_lazy": summed / lazy,
        "published_seconds": published, "published_estimated": few < count, "published_over_lazy": published / lazy,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", default="../shared/data/pool.jsonl", help="pool file")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/greedy_tfidf.json")
    options = parser.parse_args()
    if not Path(options.pool).exists():
        sys.exit(f"SKIPPED, nothing measured: {options.pool} is not there; name a pool file with --pool")
    records, _ = read_records([options.pool], skip_bad=True)
    answers = [record.messages[-1].content for record in records]
    order = np.random.default_rng(0).permutation(len(answers))
    warnings.simplefilter("error")
    sizes = [size for size in SIZES if size <= len(answers)]
    measured = [measure([answers[i] for i in order[:size]]) for size in sizes]
    write("greedy_tfidf", {"share": SHARE, "decay": DECAY, "sizes": measured}, options.out)


if __name__ == "__main__":
    main()
