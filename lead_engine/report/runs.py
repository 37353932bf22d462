"""Reads run folders, finished or not, and folders that `lead-engine compare` wrote."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lead_engine.base.console import warn
from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json, read_lines
from lead_engine.config.yaml_file import read_yaml
from lead_engine.evaluation.outputs import RESULT, read_result, read_samples
from lead_engine.report.comparable import not_comparable
from lead_engine.study.outcome import mean_over_samples
from lead_engine.study.plan import budget_name

Array = NDArray[Any]
UTILITY = ("initial", "final", "visits", "cluster", "task")
"""The arrays of utility.npz that the plots need."""


@dataclass
class Run:
    """The contents of a run folder. An unfinished run has no summary, and may lack utilities and an evaluation."""

    folder: Path
    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    rounds: list[dict[str, Any]]
    summary: dict[str, Any] | None
    utility: dict[str, Array] | None
    evaluation: dict[str, Any] | None
    heldout: list[dict[str, Any]] = field(default_factory=list)
    """Evaluations while it trained, in order: the lines of heldout.jsonl."""

    @property
    def method(self) -> str:
        return str(self.config["method"])

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def budget(self) -> float | None:
        """Share of the pool's tokens; None for `full`, which takes the whole pool."""
        return None if self.method == "full" else float(self.config["budget"])

    @property
    def variant(self) -> str:
        """The run's name in its study, from its folder NAME-BUDGET-sSEED; outside a study, its method."""
        ending = f"-{budget_name(self.budget, self.config.get('epochs', 1))}-s{self.seed}"
        return self.folder.name.removesuffix(ending) if self.folder.name.endswith(ending) else self.method

    @property
    def group(self) -> tuple[str, float | None]:
        """Variant and budget: runs of a group differ in their seed alone."""
        return self.variant, self.budget

    @cached_property
    def losses(self) -> dict[str, float] | None:
        """Held-out loss by measure; None if the run has not been evaluated."""
        if self.evaluation is None:
            return None
        loss = self.evaluation["loss"]
        return {
            "overall": loss["overall"],
            "macro": loss["macro"],
            "per_sample": mean_over_samples(read_samples(self.folder / "eval")),
        }

    @property
    def task_losses(self) -> dict[str, float]:
        """Held-out loss of each task; empty if the run has not been evaluated."""
        if self.evaluation is None:
            return {}
        return {task: values["loss"] for task, values in self.evaluation["loss"]["tasks"].items()}

    @property
    def task_names(self) -> list[str] | None:
        return None if self.summary is None else self.summary.get("task_names")

    def metric(self, name: str) -> NDArray[np.float64]:
        """One value per optimizer step; nan where it was not measured."""
        return np.array([np.nan if line.get(name) is None else line[name] for line in self.metrics], dtype=np.float64)

    @cached_property
    def smooth_loss(self) -> NDArray[np.float64]:
        """Training loss averaged over neighbouring steps, weighted by their tokens; see `smooth`."""
        return smooth(self.metric("loss"), self.metric("step_tokens"))


Groups = dict[tuple[str, float | None], list[Run]]
"""Runs by variant and budget."""


@dataclass
class Collection:
    """The runs of a report, the untrained base's evaluation and, from a study, its results."""

    runs: list[Run] = field(default_factory=list)
    base: dict[str, Any] | None = None
    verdicts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    """A study's comparisons, as in results.json."""
    reference: str = "random"
    """The variant that the others are compared with."""
    study_variants: list[str] = field(default_factory=list)
    """A study's variants in its own order."""

    @property
    def variants(self) -> list[str]:
        """Names of the variants that have runs: in the study's order, others after them."""
        found = dict.fromkeys(run.variant for run in self.runs)
        in_study = [name for name in self.study_variants if name in found]
        return in_study + [name for name in found if name not in in_study]

    @property
    def groups(self) -> Groups:
        """Runs by variant and budget: budgets ascending, `full` last; within a budget in the order of `variants`."""
        names = self.variants

        def order(key: tuple[str, float | None]) -> tuple[bool, float, int]:
            variant, budget = key
            return budget is None, budget or 0.0, names.index(variant)

        keys = sorted({run.group for run in self.runs}, key=order)
        return {key: [run for run in self.runs if run.group == key] for key in keys}

    @property
    def evaluated(self) -> Groups:
        """The groups' runs that have been evaluated."""
        groups = {key: [run for run in runs if run.evaluation is not None] for key, runs in self.groups.items()}
        return {key: runs for key, runs in groups.items() if runs}


def read_collection(folders: Sequence[Path]) -> Collection:
    """All runs in the folders given; a folder that `compare` wrote stands for its runs.

    Raises UserError for a folder that is neither, for one given twice, and for damaged files.
    """
    found = Collection()
    for folder in folders:
        if (folder / "config.yaml").exists():
            found.runs.append(read_run(folder))
        else:
            _add_study(found, folder)
    paths = [run.folder.resolve() for run in found.runs]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path}: given more than once")
    _name(found.runs)
    evaluations = {run.name: run.evaluation for run in found.runs} | {"the untrained base": found.base}
    for warning in not_comparable({name: result for name, result in evaluations.items() if result is not None}):
        warn(warning)
        found.warnings.append(warning)
    return found


def _add_study(found: Collection, folder: Path) -> None:
    """Add the runs and results in a folder that `compare` wrote, as far as they are there yet."""
    runs = sorted(path.parent for path in (folder / "runs").glob("*/config.yaml"))
    if not runs:
        raise UserError(
            f"{folder}: neither a run folder (config.yaml, metrics.jsonl) nor one that `lead-engine compare` wrote "
            "(runs/)"
        )
    found.runs += [read_run(path) for path in runs]
    if (folder / "base" / RESULT).exists():
        found.base = read_result(folder / "base")
    if (folder / "results.json").exists():
        results = read_json(folder / "results.json")
        found.verdicts += results.get("verdicts", [])
        found.warnings += results.get("warnings", [])
        found.comparisons += results.get("comparisons", [])
        found.reference = results.get("reference") or found.reference
        names = [run["variant"] for run in results.get("runs", []) if "variant" in run]
        found.study_variants += dict.fromkeys(names)


def read_run(folder: Path) -> Run:
    """Read one run folder. Raises UserError if it is none, or if a file in it is damaged."""
    metrics, rounds = folder / "metrics.jsonl", folder / "selection.jsonl"
    if not metrics.exists():
        raise UserError(f"{folder}: has no metrics.jsonl; it is no run folder, or its run has not started to train")
    config = read_yaml(folder / "config.yaml")
    missing = [key for key in ("method", "seed", "budget") if key not in config]
    if missing:
        raise UserError(
            f"{folder / 'config.yaml'}: no {', '.join(missing)} in it; it is not the configuration of a training run"
        )
    evaluation, heldout = folder / "eval", folder / "heldout.jsonl"
    return Run(
        folder=folder,
        name=folder.name,
        config=config,
        metrics=_without_repeats(read_lines(metrics), "step", metrics),
        rounds=_without_repeats(read_lines(rounds), "round", rounds) if rounds.exists() else [],
        summary=read_json(folder / "summary.json") if (folder / "summary.json").exists() else None,
        utility=_read_utility(folder / "utility.npz"),
        evaluation=read_result(evaluation) if (evaluation / RESULT).exists() else None,
        heldout=_without_repeats(read_lines(heldout), "step", heldout) if heldout.exists() else [],
    )


def smooth(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted mean over a window centred on each step, narrower towards the ends.

    The window is a twentieth of the run wide, or 7 steps if that is more and the run has so many.
    """
    half = max(len(values) // 40, min(3, len(values) // 8))
    step = np.arange(len(values))
    reach = np.minimum(half, np.minimum(step, len(values) - 1 - step))
    # A window's mean is the difference of two running sums.
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0) * weights)])
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, weights, 0.0))])
    with np.errstate(invalid="ignore"):
        low, high = step - reach, step + reach + 1
        means: NDArray[np.float64] = (sums[high] - sums[low]) / (totals[high] - totals[low])
    return means


def _name(runs: list[Run]) -> None:
    """Name each run by its folder, with as much of the path as tells it from the others."""
    for run in runs:
        parts = run.folder.resolve().parts
        depth = 1
        while any(other is not run and other.folder.resolve().parts[-depth:] == parts[-depth:] for other in runs):
            depth += 1
        run.name = "/".join(parts[-depth:])


def _without_repeats(lines: list[dict[str, Any]], counter: str, path: Path) -> list[dict[str, Any]]:
    """The last line of each step or round, in order."""
    try:
        latest = {int(line[counter]): line for line in lines}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: a line has no {counter}; the file is no log of a training run") from None
    return [latest[key] for key in sorted(latest)]


def _read_utility(path: Path) -> dict[str, Array] | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    missing = [name for name in UTILITY if name not in found]
    if missing:
        raise UserError(f"{path}: damaged (no {', '.join(missing)} in it)")
    return found
