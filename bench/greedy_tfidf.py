"""IterIT's greedy choice: lazily (`choose`), and scoring everybody again for every choice.

    python bench/greedy_tfidf.py [--pool FILE.jsonl] [--out FILE]

At each size: so many random answers of the pool, 2.5 % of them chosen, quality drawn from [0.3, 1) (IFD differs from
model to model, and no model is at hand here). The times are of the choice alone; that of the TF-IDF, which all share,
stands beside them.

- lazy: `lead_engine.selection.greedy_tfidf.choose`.
- re-sum: one sparse product of the whole matrix with the weights for every choice. What a plain vectorised program
  would do.
- as published: scales the used columns of a CSC matrix in place, empties the chosen row entry by entry, and sums all
  rows for every choice.

Seconds are the processor's. What would take more than a minute is timed for a few choices and scaled up ("estimated":
true). All must choose the same rows, or the script stops.

The re-sum reads the whole matrix for every choice, so its time depends on what else uses the machine's caches and
memory: at 50,000 answers it was 18, 23 and 28 times that of `choose` in three runs on a machine at work. The result
kept is the first, with the quickest re-sum.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy
import scipy.sparse as sp
import sklearn
from machine import write

from lead_engine.pool.records import read_records
from lead_engine.selection.greedy_tfidf import answer_tfidf, choose

SIZES, SHARE, DECAY = (1_000, 5_000, 15_000, 50_000), 0.025, 0.1
REPEATS = 3
FIRST, MOST_SECONDS = 10, 60.0


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
    """`count` choices as the published code makes them: weights live in the matrix, applied a column at a time."""
    matrix, chosen = tfidf.tocsc(), []
    for _ in range(count):
        sums = np.asarray(matrix.sum(axis=1))[:, 0]
        chosen.append(int((quality * sums).argmax()))
        used = matrix[[chosen[-1]]].tocoo()
        for column in used.col[used.data != 0].tolist():
            entries = slice(*matrix.indptr[column : column + 2])
            matrix.data[entries] *= DECAY
            matrix[chosen[-1], column] = 0
    return chosen


def timed(run: Callable[[], list[int] | np.ndarray], repeats: int) -> tuple[float, list[int]]:
    """(processor seconds of the quickest, rows chosen), on one thread: wall time would count other work."""
    seconds, chosen = [], []
    for _ in range(repeats):
        start = time.process_time()
        chosen = [int(row) for row in run()]
        seconds.append(time.process_time() - start)
    return min(seconds), chosen


def up_to_a_minute(name: str, run: Callable[[int], list[int]], expected: list[int]) -> tuple[float, bool]:
    """(seconds for all choices, whether all were made). Above a minute, the first few are timed and scaled up."""
    few = min(FIRST, len(expected))
    seconds, rows = timed(lambda: run(few), 1)
    whole = seconds / few * len(expected) < MOST_SECONDS
    if whole:
        seconds, rows = timed(lambda: run(len(expected)), REPEATS)
    if rows != expected[: len(rows)]:
        sys.exit(f"{name} and lazy choose different rows")
    return seconds / len(rows) * len(expected), whole


def measure(texts: list[str]) -> dict[str, object]:
    start = time.process_time()
    tfidf = answer_tfidf(texts)
    tfidf_seconds = time.process_time() - start
    quality = np.random.default_rng(1).uniform(0.3, 1, len(texts))
    count = int(SHARE * len(texts))
    lazy, chosen = timed(lambda: choose(tfidf, quality, np.ones(len(texts)), count, DECAY), REPEATS)

    summed, summed_whole = up_to_a_minute("re-sum", lambda k: resum(tfidf, quality, k), chosen)
    published, published_whole = up_to_a_minute("as published", lambda k: as_published(tfidf, quality, k), chosen)
    return {
        "answers": len(texts),
        "chosen": count,
        "columns": tfidf.shape[1],
        "entries": tfidf.nnz,
        "tfidf_seconds": tfidf_seconds,
        "lazy_seconds": lazy,
        "resum_seconds": summed,
        "resum_estimated": not summed_whole,
        "resum_over_lazy": summed / lazy,
        "published_seconds": published,
        "published_estimated": not published_whole,
        "published_over_lazy": published / lazy,
    }


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
    versions = {"scipy": scipy.__version__, "scikit-learn": sklearn.__version__}
    write("greedy_tfidf", {"libraries": versions, "share": SHARE, "decay": DECAY, "sizes": measured}, options.out)


if __name__ == "__main__":
    main()
