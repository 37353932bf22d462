"""The result of a study, results.json, from its finished runs: means over seeds, paired differences, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lead_engine.base.errors import UserError
from lead_engine.base.statistics import mean_interval
from lead_engine.config import to_dict
from lead_engine.study.contrasts import MEASURES, GroupKey, Groups, compare_all, pairs_of
from lead_engine.study.outcome import Outcome
from lead_engine.study.variants import Study


def summarise_study(study: Study, outcomes: Sequence[Outcome], base: dict[str, Any] | None) -> dict[str, Any]:
    """The contents of results.json; intervals are 95 %.

    {"study": its options,
     "reference": the variant that the others are compared with, or None,
     "base": what `read_base` returns, or None,
     "runs": [one run each],
     "groups": [one variant at one budget each: costs, and intervals over seeds],
     "comparisons": [two variants each, at one budget or pooled over budgets; see `compare_all`],
     "verdicts": [a sentence for each two variants],
     "warnings": [sentences]}

    Raises UserError if two runs were not evaluated on the same samples.
    """
    _check_same_samples(outcomes)
    names = [variant.name for variant in study.variants]
    groups = _groups(outcomes, names)
    comparisons, warnings = compare_all(groups, pairs_of(names, study.reference, study.options.contrasts))
    return {
        "study": to_dict(study.options),
        "reference": study.reference,
        "base": base,
        "runs": [_run_line(outcome) for outcome in outcomes],
        "groups": [_group(members) for members in groups.values()],
        "comparisons": comparisons,
        "verdicts": [each["sentence"] for each in summing_up(comparisons)],
        "warnings": [*equal_seeds(groups), *warnings],
    }


def summing_up(comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One comparison for each two variants: the one pooled over budgets, if there are several budgets."""
    by_pair: dict[tuple[str, str], dict[str, Any]] = {}
    for each in comparisons:
        by_pair[each["a"], each["b"]] = each  # the pooled one comes last and so stays
    return list(by_pair.values())


def _groups(outcomes: Sequence[Outcome], names: Sequence[str]) -> dict[GroupKey, list[Outcome]]:
    """The runs of each variant and budget, by budget (the whole pool last), then in the study's order of variants."""

    def order(key: GroupKey) -> tuple[bool, float, int]:
        variant, budget = key
        return budget is None, budget or 0.0, names.index(variant)

    keys = {(outcome.run.variant, outcome.run.budget) for outcome in outcomes}
    groups: dict[GroupKey, list[Outcome]] = {key: [] for key in sorted(keys, key=order)}
    for outcome in outcomes:
        groups[outcome.run.variant, outcome.run.budget].append(outcome)
    return groups


def equal_seeds(groups: Groups) -> list[str]:
    """Warnings about variants whose seeds change nothing, because they draw nothing: their intervals are too narrow."""
    where: dict[str, list[str]] = {}
    for (name, budget), outcomes in groups.items():
        if len({outcome.overall for outcome in outcomes}) < len(outcomes):
            where.setdefault(name, []).append("100 %" if budget is None else f"{100 * budget:g} %")
    return [
        f"{name} at {', '.join(budgets)}: runs with different seeds ended in exactly the same loss, so they are no "
        "repetitions; an interval with this variant counts the other variant's variation alone"
        for name, budgets in where.items()
    ]


def _group(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One variant at one budget: costs, and losses and shares with their intervals over seeds."""
    run = outcomes[0].run
    return {
        "variant": run.variant,
        "method": run.method,
        "budget": run.budget,
        "epochs": getattr(run.train.options, "epochs", 1) if run.budget is None else 1,
        "seeds": [outcome.run.seed for outcome in outcomes],
        **{name: _mean_or_none([outcome.costs[name] for outcome in outcomes]) for name in outcomes[0].costs},
        **{measure: mean_interval([outcome.loss(measure) for outcome in outcomes]).to_json() for measure in MEASURES},
        "whole": _share_interval(outcomes, "whole"),
        "final": _share_interval(outcomes, "final"),
        "tasks": {
            task: mean_interval([outcome.tasks[task] for outcome in outcomes]).to_json() for task in outcomes[0].tasks
        },
    }


def _mean_or_none(values: list[float | None]) -> float | None:
    """The mean, unless one of the values is not known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _share_interval(outcomes: Sequence[Outcome], kind: str) -> dict[str, Any] | None:
    shares = [share for outcome in outcomes if (share := outcome.share(kind)) is not None]
    return mean_interval(shares).to_json() if len(shares) == len(outcomes) else None


def _run_line(outcome: Outcome) -> dict[str, Any]:
    run = outcome.run
    return {
        "name": run.name,
        "variant": run.variant,
        "method": run.method,
        "budget": run.budget,
        "seed": run.seed,
        "steps": outcome.summary["steps"],
        **outcome.costs,
        **{measure: outcome.loss(measure) for measure in MEASURES},
        "tasks": outcome.tasks,
        "whole": outcome.share("whole"),
        "final": outcome.share("final"),
    }


def _check_same_samples(outcomes: Sequence[Outcome]) -> None:
    first = outcomes[0]
    for other in outcomes[1:]:
        if other.samples.ids != first.samples.ids or (other.samples.tokens != first.samples.tokens).any():
            raise UserError(
                f"{other.run.folder / 'eval'}: evaluated on other held-out samples than {first.run.folder / 'eval'}; "
                "delete both folders and run the same command again"
            )
