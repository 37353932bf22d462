"""Confidence intervals: paired t over seeds, paired bootstrap over held-out samples, Wilson for shares.

The first two answer different questions. The interval over *seeds* says how far the difference between two methods
moves when training is repeated: it is the one that a claim about a method needs, and it exists from two seeds on. The
interval over held-out *samples* takes the trained models as given and says how far the difference moves with the choice
of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

BOOTSTRAP_BLOCK = 4_000_000  # most numbers drawn at once, to bound memory


class Interval(NamedTuple):
    """An estimate with its confidence interval; `low` and `high` are nan where `n` observations cannot give one."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def known(self) -> bool:
        return not math.isnan(self.low)

    def to_json(self) -> dict[str, float | int | None]:
        """As a dictionary of plain JSON types, nan as null."""
        plain = {"mean": self.mean, "low": self.low, "high": self.high}
        return {name: None if math.isnan(value) else value for name, value in plain.items()} | {"n": self.n}


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent observations: mean +- t_{n-1} s / sqrt(n).

    One observation gives its value and no bounds. Raises ValueError without observations.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"expected a list of at least one number, got shape {x.shape}")
    if x.size == 1:
        return Interval(float(x[0]), math.nan, math.nan, 1)
    half = stats.t.ppf(0.5 + confidence / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), int(x.size))


def paired_interval(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """t interval of the mean of a_j - b_j, where j is a seed that both methods were run with.

    Pairing removes what the two runs of a seed share (initial adapters, order of draws), so that fewer seeds do.
    """
    if len(a) != len(b):
        raise ValueError(f"pairs need equally many observations, got {len(a)} and {len(b)}")
    return mean_interval(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), confidence)


def paired_bootstrap(
    differences: NDArray[np.float64],
    weights: NDArray[np.float64],
    strata: Sequence[object],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap of the weighted mean difference between two models on the same held-out samples.

    differences [n]: loss of one method minus loss of the other on each sample, each averaged over its seeds first.
    weights [n]: the samples' response tokens; the statistic is sum(w d) / sum(w), the difference of token-weighted
    losses.
    strata [n]: the samples' tasks; each task is resampled by itself, so that every resample has the original number of
    samples of every task (Efron & Tibshirani 1993, ch. 8 and 13). Strata of one sample do not vary.
    The interval counts held-out sampling only: the models are taken as given.
    """
    d, w = np.asarray(differences, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if not (d.shape == w.shape == (len(strata),)) or d.size == 0:
        raise ValueError(f"expected three lists of the same length, got {d.shape}, {w.shape} and {len(strata)}")
    if not w.sum() > 0:
        raise ValueError("the weights sum to 0")
    numerator, denominator = _resampled_sums(d, w, strata, resamples, seed)
    # A resample may consist of samples without weight (no response tokens); it says nothing about the ratio.
    ratios = numerator[denominator > 0] / denominator[denominator > 0]
    low, high = np.quantile(ratios, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float((w * d).sum() / w.sum()), float(low), float(high), int(d.size))


def _resampled_sums(
    d: NDArray[np.float64], w: NDArray[np.float64], strata: Sequence[object], resamples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """sum(w d) and sum(w) of every resample, each fp64 [resamples]."""
    labels = np.unique(np.asarray([str(label) for label in strata]), return_inverse=True)[1]
    generator = np.random.default_rng(seed)
    numerator, denominator = np.zeros(resamples), np.zeros(resamples)
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        rows = max(1, BOOTSTRAP_BLOCK // members.size)  # resamples drawn at once
        for start in range(0, resamples, rows):
            stop = min(start + rows, resamples)
            drawn = members[generator.integers(members.size, size=(stop - start, members.size))]
            numerator[start:stop] += (w[drawn] * d[drawn]).sum(axis=1)
            denominator[start:stop] += w[drawn].sum(axis=1)
    return numerator, denominator


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927); it stays inside [0, 1] and is not a point at 0 or 1.

    `mean` is the plain share; no trials give nan throughout.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials")
    if trials == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    share, z2n = successes / trials, z * z / trials
    centre = (share + z2n / 2) / (1 + z2n)
    half = z / (1 + z2n) * math.sqrt(share * (1 - share) / trials + z2n / (4 * trials))
    # At the ends the bound is the share itself; rounding must not push it past.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Interval(share, low, high, trials)
