"""A finished run of a study: what it cost and what it reached."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lead_engine.evaluation.outputs import Samples
from lead_engine.study.runs import StudyRun

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


def mean_over_samples(samples: Samples) -> float:
    """Mean of the samples' mean losses; samples without response tokens have none."""
    return float(samples.nll[samples.tokens > 0].mean())
