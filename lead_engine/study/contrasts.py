"""Two variants against each other: paired by seed, at each budget that both have and pooled over those budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lead_engine.base.statistics import mean_interval, paired_bootstrap, paired_interval
from lead_engine.study.outcome import Outcome

MEASURES = {"overall": "overall", "macro": "macro", "per_sample": "mean over samples"}
"""Held-out losses: over all response tokens, mean over tasks, mean over samples of their mean loss."""
UNEQUAL_TOKENS = 0.02
"""Runs of a pair whose token counts differ by more than this share are not at equal budget."""
NO_WIDTH = 1e-9
"""An interval as narrow as this is not precise: its runs did not differ between seeds, so they are one observation."""
RESAMPLES = 2000
"""Of the bootstrap over held-out samples; a study has many pairs, and its interval is shown to three digits."""

Groups = Mapping[tuple[str, float | None], Sequence["Outcome"]]


def pairs_of(
    names: Sequence[str], reference: str | None, contrasts: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Every variant against the reference, then the contrasts; each pair once."""
    against = [(name, reference) for name in names if reference is not None and name != reference]
    return list(dict.fromkeys([*against, *contrasts]))


def compare_all(groups: Groups, pairs: Sequence[tuple[str, str]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Each pair's comparisons, one per budget that both have and, for more than one, one pooled over them; and warnings.

    A comparison: {"a", "b", "budgets": [shares], "pooled": bool, "seeds": [shared by both], a paired 95 % interval of a - b
    for every measure, "over_samples": interval over held-out samples or None, "tasks": {name: mean difference},
    "verdicts": {measure: words}, "sentence"}. Pairs without a common budget (`full`) or seed have none.
    """
    comparisons, warnings = [], []
    for a, b in pairs:
        matched = {budget: found for name, budget in groups if name == a and (found := _match(groups, a, b, budget))}
        comparisons += [_at_one_budget(a, b, budget, pairing) for budget, pairing in matched.items()]
        warnings += [warning for budget, pairing in matched.items() if (warning := _unequal(a, b, budget, pairing))]
        everywhere = set.intersection(*map(set, matched.values())) if matched else set()
        if len(matched) > 1 and everywhere:
            comparisons.append(_pooled(a, b, matched, sorted(everywhere)))
    return comparisons, warnings


Pairing = dict[int, tuple["Outcome", "Outcome"]]
"""seed -> the two runs."""


def _match(groups: Groups, a: str, b: str, budget: float | None) -> Pairing:
    if budget is None:
        return {}
    theirs = {outcome.run.seed: outcome for outcome in groups.get((b, budget), [])}
    return {mine.run.seed: (mine, theirs[mine.run.seed]) for mine in groups[a, budget] if mine.run.seed in theirs}


def _at_one_budget(a: str, b: str, budget: float, pairing: Pairing) -> dict[str, Any]:
    pairs = list(pairing.values())
    intervals = {
        measure: paired_interval(
            [getattr(x, measure) for x, _ in pairs], [getattr(y, measure) for _, y in pairs]
        ).to_json()
        for measure in MEASURES
    }
    samples = pairs[0][0].samples
    per_sample = np.mean([x.samples.nll - y.samples.nll for x, y in pairs], axis=0)
    over_samples = paired_bootstrap(per_sample, samples.tokens.astype(np.float64), samples.tasks, resamples=RESAMPLES)
    tasks = {task: float(np.mean([x.tasks[task] - y.tasks[task] for x, y in pairs])) for task in pairs[0][0].tasks}
    return _comparison(a, b, [budget], list(pairing), intervals, over_samples.to_json(), tasks)


def _pooled(a: str, b: str, matched: Mapping[float, Pairing], seeds: list[int]) -> dict[str, Any]:
    """The mean over budgets within each of the seeds first, so that one seed is one observation."""
    by_seed = [[pairing[seed] for pairing in matched.values()] for seed in seeds]
    intervals = {
        measure: mean_interval(
            [np.mean([getattr(x, measure) - getattr(y, measure) for x, y in pairs]) for pairs in by_seed]
        ).to_json()
        for measure in MEASURES
    }
    names = by_seed[0][0][0].tasks
    tasks = {
        task: float(np.mean([x.tasks[task] - y.tasks[task] for pairs in by_seed for x, y in pairs])) for task in names
    }
    return _comparison(a, b, list(matched), seeds, intervals, None, tasks)


def _comparison(
    a: str,
    b: str,
    budgets: list[float],
    seeds: list[int],
    intervals: dict[str, dict[str, Any]],
    over_samples: dict[str, Any] | None,
    tasks: dict[str, float],
) -> dict[str, Any]:
    comparison = {
        "a": a,
        "b": b,
        "budgets": budgets,
        "pooled": len(budgets) > 1,
        "seeds": seeds,
        **intervals,
        "over_samples": over_samples,
        "tasks": tasks,
        "verdicts": {measure: verdict(interval) for measure, interval in intervals.items()},
    }
    return comparison | {"sentence": sentence(comparison)}


def verdict(interval: Mapping[str, Any]) -> str:
    """What an interval of a difference in loss shows. From one seed, or from seeds that changed nothing, there is none."""
    if interval["low"] is None:
        return "no verdict from one seed"
    if interval["high"] - interval["low"] <= NO_WIDTH:
        return "no verdict from equal runs"
    return "better" if interval["high"] < 0 else "worse" if interval["low"] > 0 else "no difference shown"


def sentence(comparison: Mapping[str, Any]) -> str:
    """One sentence on a comparison: the verdict on every measure with its numbers."""
    where = " and ".join(f"{100 * budget:g} %" for budget in comparison["budgets"])
    told = [
        f"{title} {verdict(comparison[m])} ({signed(comparison[m]['mean'])} {bracket(comparison[m])})"
        for m, title in MEASURES.items()
    ]
    seeds = len(comparison["seeds"])
    mean = ", mean over budgets" if comparison["pooled"] else ""
    return (
        f"{comparison['a']} against {comparison['b']} at {where} of the pool{mean}: {', '.join(told)}; {seeds} seed{'s' * (seeds != 1)}"
        + ("" if seeds > 1 else "; run more seeds")
    )


def signed(value: float) -> str:
    """-0.0312"""
    return f"{value:+.4f}"


def bracket(interval: Mapping[str, Any]) -> str:
    """[-0.0312, +0.0041]"""
    return "[-]" if interval["low"] is None else f"[{signed(interval['low'])}, {signed(interval['high'])}]"


def _unequal(a: str, b: str, budget: float, pairing: Pairing) -> str | None:
    """A sentence if two variants were compared at a budget that turned out not to be equal."""
    mine, theirs = (
        float(np.mean([pair[side].summary["tokens_trained"] for pair in pairing.values()])) for side in (0, 1)
    )
    if abs(mine - theirs) <= UNEQUAL_TOKENS * theirs:
        return None
    return (
        f"{a} trained {mine:,.0f} tokens at {100 * budget:g} %, {b} {theirs:,.0f}: "
        "the budgets are not equal, and the difference is not due to the choice of samples alone"
    )
