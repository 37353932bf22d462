"""A finished run of a study, read from its folder: what it cost and what it reached."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lead_engine.base.files import read_json
from lead_engine.evaluation.outputs import Samples, read_result, read_samples
from lead_engine.study.plan import COMPLETE, StudyRun

COSTS = (
    "tokens_trained",
    "response_tokens_trained",
    "samples_trained",
    "seconds",
    "selection_seconds",
    "scoring_seconds",
)
"""The costs in a run's summary, in tokens, samples and seconds. Runs of an older version lack some."""


@dataclass(frozen=True)
class Outcome:
    """A finished run. Losses are in nats per response token, on the held-out samples."""

    run: StudyRun
    summary: dict[str, Any]
    """The run's summary.json."""
    result: dict[str, Any]
    """The eval.json of its model."""
    samples: Samples
    """Its loss on every held-out sample."""

    @property
    def overall(self) -> float:
        """Mean loss over all response tokens."""
        return float(self.result["loss"]["overall"])

    @property
    def macro(self) -> float:
        """Mean over tasks of each task's mean loss, so that large tasks do not decide alone."""
        return float(self.result["loss"]["macro"])

    @cached_property
    def per_sample(self) -> float:
        """Mean over samples of each sample's mean loss, so that a short answer counts as much as a long one."""
        return mean_over_samples(self.samples)

    def loss(self, measure: str) -> float:
        """The loss by its name in `contrasts.MEASURES`."""
        return {"overall": self.overall, "macro": self.macro, "per_sample": self.per_sample}[measure]

    @property
    def tasks(self) -> dict[str, float]:
        """Mean loss of each task."""
        return {task: values["loss"] for task, values in self.result["loss"]["tasks"].items()}

    def share(self, kind: str) -> float | None:
        """Share of correct answers, `kind` "whole" or "final"; None if nothing was generated or no answer is final."""
        shares = (self.result["exact_match"] or {}).get("overall", {}).get(kind)
        return None if shares is None else shares["mean"]

    @property
    def costs(self) -> dict[str, float | None]:
        """`COSTS` and training_seconds, the time without selection and scoring; None for what is not known."""
        costs: dict[str, float | None] = {name: self.summary.get(name) for name in COSTS}
        whole, selection, scoring = costs["seconds"], costs["selection_seconds"], costs["scoring_seconds"]
        costs["training_seconds"] = None
        if whole is not None and selection is not None and scoring is not None:
            costs["training_seconds"] = whole - selection - scoring
        return costs


def read_outcome(run: StudyRun) -> Outcome:
    """Read a run's summary and evaluation. Raises UserError for a file that is missing or damaged."""
    evaluation = run.folder / "eval"
    return Outcome(run, read_json(run.folder / COMPLETE), read_result(evaluation), read_samples(evaluation))


def read_base(folder: Path) -> dict[str, Any]:
    """The untrained model's evaluation in a folder: {"loss", "exact_match", "per_sample"}."""
    result = read_result(folder)
    return {
        "loss": result["loss"],
        "exact_match": result["exact_match"],
        "per_sample": mean_over_samples(read_samples(folder)),
    }


def mean_over_samples(samples: Samples) -> float:
    """Mean of the samples' mean losses; samples without response tokens have none and are left out."""
    return float(samples.nll[samples.tokens > 0].mean())
