from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from lead_engine.base.statistics import mean_interval, paired_bootstrap, paired_interval, wilson_interval


def test_mean_interval_against_a_textbook_value() -> None:
    # t_{4, 0.975} = 2.776445 (tables); mean 3, s = sqrt(2.5), s / sqrt(5) = 0.7071068.
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.mean == 3.0
    assert interval.low == pytest.approx(3 - 2.776445 * math.sqrt(0.5), abs=1e-6)
    assert interval.high == pytest.approx(3 + 2.776445 * math.sqrt(0.5), abs=1e-6)
    assert interval.n == 5


def test_one_observation_has_no_bounds_and_none_is_refused() -> None:
    interval = mean_interval([2.5])
    assert interval.mean == 2.5
    assert not interval.known
    assert interval.to_json() == {"mean": 2.5, "low": None, "high": None, "n": 1}
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_pairing_removes_what_the_seeds_share() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 10, 8)
    a, b = shared + rng.normal(0.5, 0.1, 8), shared + rng.normal(0, 0.1, 8)
    paired = paired_interval(a, b)
    reference = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (paired.low, paired.high) == pytest.approx((reference.low, reference.high), rel=1e-12)
    assert paired.high - paired.low < 0.5
    unpaired = mean_interval(a)
    assert unpaired.high - unpaired.low > 5
    mirrored = paired_interval(b, a)
    assert (mirrored.mean, mirrored.low, mirrored.high) == pytest.approx((-paired.mean, -paired.high, -paired.low))
    with pytest.raises(ValueError, match="equally many"):
        paired_interval(a, b[:-1])


def test_t_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    draws = rng.normal(0.3, 1.0, size=(2000, 4))
    hits = sum(interval.low <= 0.3 <= interval.high for interval in map(mean_interval, draws))
    # 2000 trials at 0.95: standard deviation of the share 0.0049.
    assert 0.935 <= hits / 2000 <= 0.965


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    """Two tasks of different size and mean; the truth is the token-weighted mean under the same task sizes."""
    rng = np.random.default_rng(2)
    sizes, means, trials = (120, 40), (0.2, -0.5), 400
    strata = ["a"] * sizes[0] + ["b"] * sizes[1]
    truth = (sizes[0] * means[0] + sizes[1] * means[1]) / sum(sizes)
    hits = 0
    for trial in range(trials):
        differences = np.concatenate([rng.normal(m, 1.0, n) for m, n in zip(means, sizes, strict=True)])
        weights = rng.integers(5, 60, sum(sizes)).astype(float)
        interval = paired_bootstrap(differences, weights, strata, resamples=400, seed=trial)
        hits += interval.low <= truth <= interval.high
    # Standard deviation of the share 0.011; the percentile bootstrap is known to be a little narrow.
    assert 0.91 <= hits / trials <= 0.98


def test_bootstrap_keeps_the_strata() -> None:
    """Between-task differences are no noise: constant differences within tasks give an interval of width 0."""
    differences, strata = np.array([1.0] * 5 + [-3.0] * 15), ["a"] * 5 + ["b"] * 15
    interval = paired_bootstrap(differences, np.ones(20), strata, resamples=200)
    assert interval.low == pytest.approx(interval.high) == pytest.approx(interval.mean) == pytest.approx(-2.0)
    spread = paired_bootstrap(differences, np.ones(20), ["one"] * 20, resamples=200)
    assert spread.high - spread.low > 0.5


def test_bootstrap_weighs_by_tokens_and_is_repeatable() -> None:
    rng = np.random.default_rng(3)
    d, w = rng.normal(size=50), rng.integers(1, 100, 50).astype(float)
    first = paired_bootstrap(d, w, ["x"] * 50, resamples=500, seed=7)
    assert first.mean == pytest.approx((d * w).sum() / w.sum())
    assert first == paired_bootstrap(d, w, ["x"] * 50, resamples=500, seed=7)
    assert first != paired_bootstrap(d, w, ["x"] * 50, resamples=500, seed=8)


def test_bootstrap_does_not_depend_on_the_memory_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    d, w = rng.normal(size=30), np.ones(30)
    whole = paired_bootstrap(d, w, ["x"] * 30, resamples=300)
    monkeypatch.setattr("lead_engine.base.statistics.BOOTSTRAP_BLOCK", 1000)
    assert paired_bootstrap(d, w, ["x"] * 30, resamples=300) == whole


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, table I, method 3.
    published = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
    for successes, trials, low, high in published:
        interval = wilson_interval(successes, trials)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(20, 20).high == 1.0
    assert wilson_interval(0, 0).to_json() == {"mean": None, "low": None, "high": None, "n": 0}
    with pytest.raises(ValueError):
        wilson_interval(3, 2)
