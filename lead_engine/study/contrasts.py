"""Two variants against each other: paired by seed, at each budget that both have, and pooled over those budgets."""

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
"""An interval this narrow shows no precision: its runs did not differ between seeds, so they are one observation."""
RESAMPLES = 2000
"""Of the bootstrap over held-out samples; few, for a study has many pairs and shows its intervals to three digits."""

GroupKey = tuple[str, float | None]
"""A variant and a budget; None for the whole pool."""
Groups = Mapping[GroupKey, Sequence[Outcome]]
Pairing = dict[int, tuple[Outcome, Outcome]]
"""seed -> the runs of both variants."""


def pairs_of(
    names: Sequence[str], reference: str | None, contrasts: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Every variant against the reference, then the contrasts; each pair once."""
    against = [(name, reference) for name in names if reference is not None and name != reference]
    return list(dict.fromkeys([*against, *contrasts]))


def compare_all(groups: Groups, pairs: Sequence[tuple[str, str]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare each pair at every budget that both have and, if there are several, pooled over them; and warnings.

    A comparison: {"a", "b": the variants,
     "budgets": [shares of the pool], "pooled": whether there are several,
     "seeds": [those that both have],
     "overall", "macro", "per_sample": 95 % interval of a - b over seeds,
     "over_samples": 95 % interval of a - b in overall loss over held-out samples, or None if pooled,
     "tasks": {name: mean difference},
     "verdicts": {measure: words}, "sentence": all of it in words}

    A pair without a common budget (such as `full`) or without a common seed has no comparison.
    """
    comparisons: list[dict[str, Any]] = []
    warnings: list[str] = []
    for a, b in pairs:
        matched = _match(groups, a, b)
        for budget, pairing in matched.items():
            comparisons.append(_at_one_budget(a, b, budget, pairing))
            warnings += _unequal(a, b, budget, pairing)
        if len(matched) > 1:
            seeds = set.intersection(*(set(pairing) for pairing in matched.values()))
            if seeds:
                comparisons.append(_pooled(a, b, matched, sorted(seeds)))
    return comparisons, warnings


def _match(groups: Groups, a: str, b: str) -> dict[float, Pairing]:
    """The pairs of runs at every budget at which both variants have runs of the same seed."""
    matched: dict[float, Pairing] = {}
    for name, budget in groups:
        if name != a or budget is None:
            continue
        of_b = {outcome.run.seed: outcome for outcome in groups.get((b, budget), [])}
        pairing = {mine.run.seed: (mine, of_b[mine.run.seed]) for mine in groups[a, budget] if mine.run.seed in of_b}
        if pairing:
            matched[budget] = pairing
    return matched


def _at_one_budget(a: str, b: str, budget: float, pairing: Pairing) -> dict[str, Any]:
    pairs = list(pairing.values())
    intervals = {
        measure: paired_interval([x.loss(measure) for x, _ in pairs], [y.loss(measure) for _, y in pairs]).to_json()
        for measure in MEASURES
    }
    samples = pairs[0][0].samples
    per_sample = np.mean([x.samples.nll - y.samples.nll for x, y in pairs], axis=0)
    over_samples = paired_bootstrap(per_sample, samples.tokens.astype(np.float64), samples.tasks, resamples=RESAMPLES)
    tasks = {task: float(np.mean([x.tasks[task] - y.tasks[task] for x, y in pairs])) for task in pairs[0][0].tasks}
    return _comparison(a, b, [budget], list(pairing), intervals, over_samples.to_json(), tasks)


def _pooled(a: str, b: str, matched: Mapping[float, Pairing], seeds: list[int]) -> dict[str, Any]:
    """Pool over budgets: first the mean over budgets within each seed, so that one seed is one observation."""
    by_seed = [[pairing[seed] for pairing in matched.values()] for seed in seeds]
    intervals = {}
    for measure in MEASURES:
        of_seeds = [float(np.mean([x.loss(measure) - y.loss(measure) for x, y in pairs])) for pairs in by_seed]
        intervals[measure] = mean_interval(of_seeds).to_json()
    every_pair = [pair for pairs in by_seed for pair in pairs]
    tasks = {
        task: float(np.mean([x.tasks[task] - y.tasks[task] for x, y in every_pair])) for task in by_seed[0][0][0].tasks
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
    """What an interval of a difference in loss shows: nothing if it comes from one seed or from runs that are equal."""
    if interval["low"] is None:
        return "no verdict from one seed"
    if interval["high"] - interval["low"] <= NO_WIDTH:
        return "no verdict from equal runs"
    if interval["high"] < 0:
        return "better"
    if interval["low"] > 0:
        return "worse"
    return "no difference shown"


def sentence(comparison: Mapping[str, Any]) -> str:
    """One sentence on a comparison: the verdict on every measure with its numbers."""
    where = " and ".join(f"{100 * budget:g} %" for budget in comparison["budgets"])
    told = [
        f"{title} {verdict(comparison[m])} ({signed(comparison[m]['mean'])} {bracket(comparison[m])})"
        for m, title in MEASURES.items()
    ]
    mean = ", mean over budgets" if comparison["pooled"] else ""
    num_seeds = len(comparison["seeds"])
    seeds = f"{num_seeds} seeds" if num_seeds > 1 else "1 seed; run more seeds"
    pair = f"{comparison['a']} against {comparison['b']}"
    return f"{pair} at {where} of the pool{mean}: {', '.join(told)}; {seeds}"


def signed(value: float) -> str:
    """A difference with its sign, as in "-0.0312"."""
    return f"{value:+.4f}"


def bracket(interval: Mapping[str, Any]) -> str:
    """The bounds of an interval, as in "[-0.0312, +0.0041]"; "[-]" if it has none."""
    if interval["low"] is None:
        return "[-]"
    return f"[{signed(interval['low'])}, {signed(interval['high'])}]"


def _unequal(a: str, b: str, budget: float, pairing: Pairing) -> list[str]:
    """A warning if the two variants did not train about as many tokens; else none."""
    tokens_a = float(np.mean([x.summary["tokens_trained"] for x, _ in pairing.values()]))
    tokens_b = float(np.mean([y.summary["tokens_trained"] for _, y in pairing.values()]))
    if abs(tokens_a - tokens_b) <= UNEQUAL_TOKENS * tokens_b:
        return []
    return [
        f"{a} trained {tokens_a:,.0f} tokens at {100 * budget:g} %, {b} {tokens_b:,.0f}: "
        "the budgets are not equal, and the difference is not due to the choice of samples alone"
    ]
