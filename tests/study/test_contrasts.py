from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from lead_engine.study.contrasts import compare_all, pairs_of, verdict
from lead_engine.study.results import equal_seeds, summing_up

TOKENS = np.array([10, 30, 20])


class FakeOutcome(SimpleNamespace):
    def loss(self, measure: str) -> float:
        return getattr(self, measure)


def outcome(variant: str, budget: float | None, seed: int, shift: float, trained: int = 1000) -> FakeOutcome:
    """A run whose loss is `shift` above [1, 2, 3] on every held-out sample."""
    nll = np.array([1.0, 2.0, 3.0]) + shift
    tasks = {"x": float(np.average(nll[:2], weights=TOKENS[:2])), "y": float(nll[2])}
    return FakeOutcome(
        run=SimpleNamespace(variant=variant, budget=budget, seed=seed),
        samples=SimpleNamespace(nll=nll, tokens=TOKENS, tasks=["x", "x", "y"]),
        summary={"tokens_trained": trained},
        overall=float(np.average(nll, weights=TOKENS)),
        macro=float(np.mean(list(tasks.values()))),
        per_sample=float(nll.mean()),
        tasks=tasks,
    )


def groups(shifts: dict[tuple[str, float | None], dict[int, float]], **more: int) -> dict:
    return {
        key: [outcome(*key, seed, shift, **more) for seed, shift in by_seed.items()] for key, by_seed in shifts.items()
    }


A_MINUS_B = {0.1: [-0.3, -0.1, -0.2], 0.2: [-0.5, -0.3, 0.2]}
B = {2: 0.7, 0: 0.1, 1: 0.4}
"""b's runs, in another order than a's: pairs are found by seed."""
SHIFTS = {
    ("a", budget): {seed: B[seed] + d for seed, d in enumerate(values)} for budget, values in A_MINUS_B.items()
} | {("b", budget): B for budget in A_MINUS_B}


def t_interval(values: np.ndarray) -> tuple[float, float]:
    return stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))


def test_paired_by_seed_at_each_budget_and_pooled_over_them() -> None:
    comparisons, warnings = compare_all(groups(SHIFTS), [("a", "b")])
    assert [each["budgets"] for each in comparisons] == [[0.1], [0.2], [0.1, 0.2]]
    expected = [np.array(A_MINUS_B[0.1]), np.array(A_MINUS_B[0.2]), np.mean(list(A_MINUS_B.values()), axis=0)]
    for each, differences in zip(comparisons, expected, strict=True):
        for measure in ("overall", "macro", "per_sample"):
            low, high = t_interval(differences)
            assert each[measure]["mean"] == pytest.approx(differences.mean())
            assert (each[measure]["low"], each[measure]["high"]) == pytest.approx((low, high))
            assert each[measure]["n"] == 3
        assert each["tasks"] == pytest.approx({"x": differences.mean(), "y": differences.mean()})
    assert comparisons[0]["over_samples"]["mean"] == pytest.approx(-0.2)
    assert comparisons[2]["over_samples"] is None
    assert warnings == []
    assert summing_up(comparisons) == comparisons[2:]


def test_the_three_measures_are_not_the_same() -> None:
    """A gain on the short answers alone moves the mean over samples most."""
    one, two = groups({("a", 0.1): {0: 0.0}, ("b", 0.1): {0: 0.0}}).values()
    one[0].samples.nll = np.array([0.4, 2.0, 3.0])
    one[0].overall, one[0].per_sample = two[0].overall - 0.1, two[0].per_sample - 0.2
    (each,), _ = compare_all({("a", 0.1): one, ("b", 0.1): two}, [("a", "b")])
    assert (each["overall"]["mean"], each["macro"]["mean"], each["per_sample"]["mean"]) == pytest.approx(
        (-0.1, 0.0, -0.2)
    )


def test_only_common_seeds_and_budgets_count_and_full_has_none() -> None:
    shifts = {
        ("a", 0.1): {0: 1.0, 5: 2.0},
        ("a", 0.3): {0: 9.0},
        ("b", 0.1): {5: 0.0, 7: 0.0},
        ("b", 0.2): {0: 0.0},
        ("full", None): {0: 0.0},
    }
    (each,), _ = compare_all(groups(shifts), [("a", "b"), ("full", "b"), ("a", "full")])
    assert (each["budgets"], each["seeds"]) == ([0.1], [5])
    assert each["overall"]["mean"] == pytest.approx(2.0)
    assert each["verdicts"]["overall"] == "no verdict from one seed"
    assert each["sentence"].endswith("1 seed; run more seeds")


def test_pooling_takes_the_seeds_that_every_budget_has() -> None:
    shifts = {
        ("a", 0.1): {0: 1.0, 1: 2.0},
        ("a", 0.2): {1: 4.0},
        ("b", 0.1): {0: 0.0, 1: 0.0},
        ("b", 0.2): {0: 0.0, 1: 0.0},
    }
    pooled = compare_all(groups(shifts), [("a", "b")])[0][-1]
    assert (pooled["pooled"], pooled["seeds"]) == (True, [1])
    assert pooled["overall"]["mean"] == pytest.approx(3.0)
    del shifts["a", 0.2][1]
    shifts["a", 0.2][7] = 1.0
    shifts["b", 0.2] = {7: 0.0}
    assert [each["pooled"] for each in compare_all(groups(shifts), [("a", "b")])[0]] == [False, False]


def test_unequal_tokens_are_told() -> None:
    both = groups({("a", 0.1): {0: 1.0}}, trained=1030) | groups({("b", 0.1): {0: 0.0}})
    assert compare_all(both, [("a", "b")])[1][0].startswith(
        "a trained 1,030 tokens at 10 %, b 1,000: the budgets are not equal"
    )


def test_seeds_that_change_nothing_are_told_and_give_no_verdict() -> None:
    both = groups({("a", 0.1): dict.fromkeys(range(3), 0.2), ("b", 0.1): dict.fromkeys(range(3), 0.0)})
    (each,), _ = compare_all(both, [("a", "b")])
    assert each["verdicts"]["overall"] == "no verdict from equal runs"
    told = equal_seeds(both)
    assert [line.partition(":")[0] for line in told] == ["a at 10 %", "b at 10 %"]
    assert equal_seeds(groups(SHIFTS)) == []


def test_pairs_are_all_against_the_reference_and_then_the_contrasts_each_once() -> None:
    names = ["a", "random", "b"]
    assert pairs_of(names, "random", [("a", "b"), ("a", "random")]) == [("a", "random"), ("b", "random"), ("a", "b")]
    assert pairs_of(names, None, [("a", "b")]) == [("a", "b")]


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((-0.08, -0.02), "better"),
        ((0.02, 0.08), "worse"),
        ((-0.12, 0.02), "no difference shown"),
        ((-0.02, 0.04), "no difference shown"),
        ((None, None), "no verdict from one seed"),
    ],
)
def test_the_interval_decides(interval: tuple, words: str) -> None:
    assert verdict({"mean": 0.0, "low": interval[0], "high": interval[1]}) == words
