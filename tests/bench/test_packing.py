"""The compared rules of packing, on cases done by hand; all of them on one pool."""

from __future__ import annotations

import pytest
from packing import (
    RULES,
    best_fit,
    best_fit_ahead,
    best_fit_decreasing,
    lognormal,
    measure,
    next_fit,
    ours,
    strays,
    waste,
)

LENGTHS = [5, 6, 5, 4, 3, 7]


def test_rules_by_hand() -> None:
    assert next_fit(LENGTHS, 10, 9, 2) == [[0], [1], [2, 3], [4, 5]]
    assert best_fit(LENGTHS, 10, 9, 2) == [[0, 2], [1, 3], [4, 5], []]  # 4 fits exactly behind 6, as does 5 behind 5
    assert best_fit([6, 7, 5, 3], 10, 9, 2) == [[0], [1], [2, 3], []]  # 5 fits nowhere and ends the step
    assert best_fit_ahead([6, 7, 5, 3], 10, 9, 2) == [[0], [1, 3], [2], []]  # the sample of 3 is looked at too
    assert best_fit_decreasing([3, 6, 4, 7], 10, 9, 2) == [[3, 0], [1, 2]]
    assert ours(LENGTHS, 10, 9, 2) == [[0, 2], [1, 3], [4, 5]]


def test_waste_is_that_of_all_steps_but_the_last() -> None:
    assert waste([[0], [1], [2, 3], [4, 5]], LENGTHS, 10, 9, 1) == pytest.approx(1 - 20 / 30, abs=1e-5)
    assert waste([[0], [1], [2, 3], [4, 5]], LENGTHS, 10, 9, 2) == pytest.approx(1 - 11 / 20, abs=1e-5)
    assert waste([[0, 2], [1, 3], [4, 5]], LENGTHS, 10, 9, 8) is None


@pytest.mark.parametrize("packed", [[[0, 1], [2, 3], [4, 5]], [[0], [1], [2, 3], [5]], [[0], [1], [1, 2, 3], [4, 5]]])
def test_a_rule_that_breaks_its_promise_is_refused(packed: list[list[int]]) -> None:
    with pytest.raises(RuntimeError):
        waste(packed, LENGTHS, 10, 9, 1)


def test_pack_plan_wastes_less_than_the_sequential_rules() -> None:
    lengths = lognormal(30, 200, 5)[:3000]
    shares = {row["rule"]: row["waste"] for row in measure(lengths, capacities=(1024,), step_bins=(1, 4))}
    assert list(shares) == list(RULES)
    assert shares["pack_plan"][4] < 0.01 < shares["best fit"][4] < shares["next fit"][4] / 2
    assert shares["pack_plan"][1] == pytest.approx(shares["pack_plan"][4], abs=1e-3)
    assert strays(lengths, 1024, 32, 4)["most_places_ahead"] <= 32
