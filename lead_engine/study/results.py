"""From the finished runs of a study to its result: means over seeds, paired differences, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json
from lead_engine.base.statistics import mean_interval
from lead_engine.config import to_dict
from lead_engine.evaluation.outputs import read_result, read_samples
from lead_engine.study.contrasts import MEASURES, compare_all, pairs_of
from lead_engine.study.outcome import Outcome, mean_over_samples
from lead_engine.study.runs import COMPLETE, StudyRun
from lead_engine.study.variants import Study


def read_outcome(run: StudyRun) -> Outcome:
    """Read a run's summary and evaluation."""
    evaluation = run.folder / "eval"
    return Outcome(run, read_json(run.folder / COMPLETE), read_result(evaluation), read_samples(evaluation))


def read_base(folder: Path) -> dict[str, Any]:
    """The untrained model's evaluation: {"loss", "exact_match", "per_sample"}."""
    result = read_result(folder)
    return {
        "loss": result["loss"],
        "exact_match": result["exact_match"],
        "per_sample": mean_over_samples(read_samples(folder)),
    }


def summarise_study(study: Study, outcomes: Sequence[Outcome], base: dict[str, Any] | None) -> dict[str, Any]:
    """What stands in results.json.

    {"study", "reference", "base": as `read_base` gives it or None, "runs": [a run each], "groups": [a variant and budget
    each: costs and intervals over seeds], "comparisons": [two variants each, at one budget or pooled; see `compare_all`],
    "verdicts": [a sentence for each two variants], "warnings": [sentences]}. Intervals are 95 %. Raises UserError where two
    runs were not evaluated on the same samples.
    """
    _check_same_samples(outcomes)
    names = [variant.name for variant in study.variants]
    keys = dict.fromkeys((outcome.run.variant, outcome.run.budget) for outcome in outcomes)
    order = sorted(keys, key=lambda key: (key[1] is None, key[1] or 0.0, names.index(key[0])))
    by_key = {key: [o for o in outcomes if (o.run.variant, o.run.budget) == key] for key in order}
    comparisons, warnings = compare_all(by_key, pairs_of(names, study.reference, study.options.contrasts))
    return {
        "study": to_dict(study.options),
        "reference": study.reference,
        "base": base,
        "runs": [_run_line(outcome) for outcome in outcomes],
        "groups": [_group(members) for members in by_key.values()],
        "comparisons": comparisons,
        "verdicts": [each["sentence"] for each in summing_up(comparisons)],
        "warnings": [*_repeated(by_key), *warnings],
    }


def summing_up(comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One comparison for each two variants: the one pooled over budgets where there is one."""
    by_pair: dict[tuple[str, str], dict[str, Any]] = {}
    for each in comparisons:  # pooled ones stand behind those of one budget
        by_pair[each["a"], each["b"]] = each
    return list(by_pair.values())


def _repeated(by_key: dict[tuple[str, float | None], list[Outcome]]) -> list[str]:
    """Sentences on variants whose seeds changed nothing (nothing in them is drawn): their intervals are too narrow."""
    where: dict[str, list[str]] = {}
    for (name, budget), outcomes in by_key.items():
        if len({outcome.overall for outcome in outcomes}) < len(outcomes):
            where.setdefault(name, []).append("100 %" if budget is None else f"{100 * budget:g} %")
    return [
        f"{name} at {', '.join(budgets)}: runs of different seeds ended in exactly the same loss, so its seeds are no "
        "repetitions; intervals that it is part of count the other variant's variation alone"
        for name, budgets in where.items()
    ]


def _group(outcomes: list[Outcome]) -> dict[str, Any]:
    run = outcomes[0].run
    return {
        "variant": run.variant,
        "method": run.method,
        "budget": run.budget,
        "epochs": run.train.epochs,
        "seeds": [outcome.run.seed for outcome in outcomes],
        **{name: _mean_or_none([outcome.costs[name] for outcome in outcomes]) for name in outcomes[0].costs},
        **{
            measure: mean_interval([getattr(outcome, measure) for outcome in outcomes]).to_json()
            for measure in MEASURES
        },
        "whole": _share_interval(outcomes, "whole"),
        "final": _share_interval(outcomes, "final"),
        "tasks": {
            task: mean_interval([outcome.tasks[task] for outcome in outcomes]).to_json() for task in outcomes[0].tasks
        },
    }


def _mean_or_none(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _share_interval(outcomes: list[Outcome], kind: str) -> dict[str, Any] | None:
    shares = [outcome.share(kind) for outcome in outcomes]
    return None if None in shares else mean_interval([share for share in shares if share is not None]).to_json()


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
        **{measure: getattr(outcome, measure) for measure in MEASURES},
        "tasks": outcome.tasks,
        "whole": outcome.share("whole"),
        "final": outcome.share("final"),
    }


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
