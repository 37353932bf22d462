"""From the finished runs of a study to its result: means over seeds, paired differences, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lead_engine.config import to_dict
from lead_engine.errors import UserError
from lead_engine.evaluation.contrasts import MEASURES, compare_all, pairs_of
from lead_engine.evaluation.outputs import Samples, read_result, read_samples
from lead_engine.evaluation.stats import mean_interval
from lead_engine.evaluation.study import COMPLETE, StudyRun
from lead_engine.evaluation.variants import Study
from lead_engine.files import read_json

COSTS = (
    "tokens_trained",
    "response_tokens_trained",
    "samples_trained",
    "seconds",
    "selection_seconds",
    "scoring_seconds",
)
"""What a run's summary says of its cost; runs of an older version lack some."""


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

    @cached_property
    def per_sample(self) -> float:
        """Mean over held-out samples of their mean loss: a short answer counts as much as a long one."""
        return mean_over_samples(self.samples)

    @property
    def tasks(self) -> dict[str, float]:
        return {task: values["loss"] for task, values in self.result["loss"]["tasks"].items()}

    def share(self, kind: str) -> float | None:
        """Share of right answers, `kind` "whole" or "final"; None where nothing was generated or no answer is final."""
        shares = (self.result["exact_match"] or {}).get("overall", {}).get(kind)
        return None if shares is None else shares["mean"]

    @property
    def costs(self) -> dict[str, float | None]:
        """`COSTS`, and training_seconds: what is left of the time without selection and scoring; None where it is not known."""
        costs = {name: self.summary.get(name) for name in COSTS}
        parts = [costs["seconds"], costs["selection_seconds"], costs["scoring_seconds"]]
        known = None not in parts
        return costs | {"training_seconds": parts[0] - parts[1] - parts[2] if known else None}


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


def mean_over_samples(samples: Samples) -> float:
    """Mean of the samples' mean losses; samples without response tokens have none."""
    return float(samples.nll[samples.tokens > 0].mean())


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
