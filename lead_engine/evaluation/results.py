"""From the finished runs of a study to its result: means over seeds, paired differences, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lead_engine.config import to_dict
from lead_engine.errors import UserError
from lead_engine.evaluation.outputs import Samples, read_result, read_samples
from lead_engine.evaluation.stats import Interval, mean_interval, paired_bootstrap, paired_interval
from lead_engine.evaluation.study import COMPLETE, StudyRun
from lead_engine.evaluation.variants import Study
from lead_engine.files import read_json

REFERENCE = "random"
"""The method that every other is compared with at equal budget."""
UNEQUAL_TOKENS = 0.02
"""Runs of a pair whose token counts differ by more than this share are not at equal budget."""


@dataclass(frozen=True)
class Outcome:
    """A finished run and what it reached."""

    run: StudyRun
    summary: dict[str, Any]
    result: dict[str, Any]
    samples: Samples

    @property
    def overall(self) -> float:
        return self.result["loss"]["overall"]

    @property
    def macro(self) -> float:
        return self.result["loss"]["macro"]

    def share(self, kind: str) -> float | None:
        """Share of right answers, `kind` "whole" or "final"; None where nothing was generated or no answer is final."""
        shares = (self.result["exact_match"] or {}).get("overall", {}).get(kind)
        return None if shares is None else shares["mean"]


def read_outcome(run: StudyRun) -> Outcome:
    """Read a run's summary and evaluation."""
    evaluation = run.folder / "eval"
    return Outcome(run, read_json(run.folder / COMPLETE), read_result(evaluation), read_samples(evaluation))


def summarise_study(study: Study, outcomes: Sequence[Outcome], base: dict[str, Any] | None) -> dict[str, Any]:
    """What stands in results.json.

    {"study", "base": losses of the untrained model or None, "runs": [a run each], "groups": [a method and budget each:
    intervals over seeds, and "difference" to `random` at the same budget or None], "verdicts": [sentences], "warnings":
    [sentences]}. Intervals are 95 %. Raises UserError where two runs were not evaluated on the same samples.
    """
    _check_same_samples(outcomes)
    keys = dict.fromkeys((outcome.run.variant, outcome.run.budget) for outcome in outcomes)
    by_key = {key: [o for o in outcomes if (o.run.variant, o.run.budget) == key] for key in keys}
    names = [variant.name for variant in study.variants]
    order = sorted(by_key, key=lambda key: (key[1] is None, key[1] or 0.0, names.index(key[0])))
    groups = [_group(by_key[key], by_key.get((REFERENCE, key[1]))) for key in order]
    return {
        "study": to_dict(study.options),
        "base": None if base is None else {"loss": base["loss"], "exact_match": base["exact_match"]},
        "runs": [_run_line(outcome) for outcome in outcomes],
        "groups": groups,
        "verdicts": [verdict(group) for group in groups if group["difference"]],
        "warnings": [warning for group in groups if (warning := _unequal(group, groups))],
    }


def verdict(group: dict[str, Any]) -> str:
    """One sentence on a group's held-out loss against `random`: better, worse, or no difference shown.

    The paired interval over seeds decides. Below two seeds there is none, and the sentence says so.
    """
    difference = group["difference"]
    seeds, samples = difference["overall"], difference["over_samples"]
    where = f"{group['variant']} at {100 * group['budget']:g} % of the pool"
    what = f"held-out loss {signed(seeds['mean'])} against {REFERENCE}"
    if seeds["low"] is None:
        return f"{where}: no verdict from one seed ({what}; over held-out samples alone 95 % {bracket(samples)}); run more seeds"
    outcome = "better" if seeds["high"] < 0 else "worse" if seeds["low"] > 0 else "no difference shown"
    return f"{where}: {outcome} ({what}, 95 % {bracket(seeds)}, {seeds['n']} seeds)"


def signed(value: float) -> str:
    """-0.0312"""
    return f"{value:+.4f}"


def bracket(interval: dict[str, Any]) -> str:
    """[-0.0312, +0.0041]"""
    return "-" if interval["low"] is None else f"[{signed(interval['low'])}, {signed(interval['high'])}]"


def _group(outcomes: list[Outcome], reference: list[Outcome] | None) -> dict[str, Any]:
    run = outcomes[0].run
    compared = reference is not None and run.variant != REFERENCE
    return {
        "variant": run.variant,
        "method": run.method,
        "budget": run.budget,
        "seeds": [outcome.run.seed for outcome in outcomes],
        "tokens_trained": float(np.mean([outcome.summary["tokens_trained"] for outcome in outcomes])),
        "seconds": float(np.mean([outcome.summary["seconds"] for outcome in outcomes])),
        "overall": mean_interval([outcome.overall for outcome in outcomes]).to_json(),
        "macro": mean_interval([outcome.macro for outcome in outcomes]).to_json(),
        "whole": _share_interval(outcomes, "whole"),
        "final": _share_interval(outcomes, "final"),
        "tasks": {
            task: mean_interval([outcome.result["loss"]["tasks"][task]["loss"] for outcome in outcomes]).to_json()
            for task in outcomes[0].result["loss"]["tasks"]
        },
        "difference": _difference(outcomes, reference) if compared else None,
    }


def _share_interval(outcomes: list[Outcome], kind: str) -> dict[str, Any] | None:
    shares = [outcome.share(kind) for outcome in outcomes]
    return None if None in shares else mean_interval([share for share in shares if share is not None]).to_json()


def _difference(outcomes: list[Outcome], reference: list[Outcome]) -> dict[str, Any]:
    """The method minus `random`: by seed; and over held-out samples, losses averaged over seeds first."""
    theirs = {outcome.run.seed: outcome for outcome in reference}
    pairs = [(outcome, theirs[outcome.run.seed]) for outcome in outcomes]

    def over_seeds(read: str) -> Interval:
        return paired_interval([getattr(a, read) for a, _ in pairs], [getattr(b, read) for _, b in pairs])

    samples = outcomes[0].samples
    per_sample = np.mean([a.samples.nll - b.samples.nll for a, b in pairs], axis=0)
    over_samples = paired_bootstrap(per_sample, samples.tokens.astype(np.float64), samples.tasks)
    return {
        "to": REFERENCE,
        "overall": over_seeds("overall").to_json(),
        "macro": over_seeds("macro").to_json(),
        "over_samples": over_samples.to_json(),
    }


def _run_line(outcome: Outcome) -> dict[str, Any]:
    run = outcome.run
    return {
        "name": run.name,
        "variant": run.variant,
        "method": run.method,
        "budget": run.budget,
        "seed": run.seed,
        "tokens_trained": outcome.summary["tokens_trained"],
        "samples_trained": outcome.summary["samples_trained"],
        "steps": outcome.summary["steps"],
        "seconds": outcome.summary["seconds"],
        "overall": outcome.overall,
        "macro": outcome.macro,
        "tasks": {task: values["loss"] for task, values in outcome.result["loss"]["tasks"].items()},
        "whole": outcome.share("whole"),
        "final": outcome.share("final"),
    }


def _unequal(group: dict[str, Any], groups: list[dict[str, Any]]) -> str | None:
    """A sentence if a method was compared with `random` at a budget that turned out not to be equal."""
    if not group["difference"]:
        return None
    other = next(g for g in groups if g["variant"] == REFERENCE and g["budget"] == group["budget"])
    mine, theirs = group["tokens_trained"], other["tokens_trained"]
    if abs(mine - theirs) <= UNEQUAL_TOKENS * theirs:
        return None
    return (
        f"{group['variant']} trained {mine:,.0f} tokens at {100 * group['budget']:g} %, {REFERENCE} {theirs:,.0f}: "
        "the budgets are not equal, and the difference is not due to the choice of samples alone"
    )


def _check_same_samples(outcomes: Sequence[Outcome]) -> None:
    first = outcomes[0]
    for other in outcomes[1:]:
        if other.samples.ids != first.samples.ids or (other.samples.tokens != first.samples.tokens).any():
            raise UserError(
                f"{_evaluation(other)}: evaluated on other held-out samples than {_evaluation(first)}; "
                "delete both folders and run the same command again"
            )


def _evaluation(outcome: Outcome) -> Path:
    return outcome.run.folder / "eval"
