"""Reading run folders, finished or not, and folders written by `compare`."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lead_engine.base import fingerprint
from lead_engine.base.console import warn
from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json, read_lines
from lead_engine.config.yaml_file import read_yaml
from lead_engine.evaluation.outputs import RESULT, read_result, read_samples
from lead_engine.study.outcome import mean_over_samples
from lead_engine.study.plan import budget_name

Array = NDArray[Any]
UTILITY = ("initial", "final", "visits", "cluster", "task")


@dataclass
class Run:
    """What a run folder holds. A run that is not finished has no summary, and may lack utilities and an evaluation."""

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
        """What the run is called in its study: NAME of the folder NAME-BUDGET-sSEED. Elsewhere, its method."""
        ending = f"-{budget_name(self.budget, self.config.get('epochs', 1))}-s{self.seed}"
        return self.folder.name.removesuffix(ending) if self.folder.name.endswith(ending) else self.method

    @property
    def group(self) -> tuple[str, float | None]:
        """Runs of a group differ in their seed alone."""
        return self.variant, self.budget

    @cached_property
    def losses(self) -> dict[str, float] | None:
        """Held-out loss in each of `MEASURES`; None before it was evaluated."""
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
        """Held-out loss of each task; empty before it was evaluated."""
        return (
            {}
            if self.evaluation is None
            else {task: values["loss"] for task, values in self.evaluation["loss"]["tasks"].items()}
        )

    @property
    def task_names(self) -> list[str] | None:
        return None if self.summary is None else self.summary.get("task_names")

    def metric(self, name: str) -> NDArray[np.float64]:
        """One value per optimizer step; nan where it was not measured."""
        return np.array([np.nan if line.get(name) is None else line[name] for line in self.metrics], dtype=np.float64)

    @cached_property
    def smooth_loss(self) -> NDArray[np.float64]:
        """Training loss averaged over the steps around, by tokens; see `smooth`."""
        return smooth(self.metric("loss"), self.metric("step_tokens"))


Groups = dict[tuple[str, float | None], list[Run]]
"""Runs by variant and budget."""


@dataclass
class Collection:
    """The runs of a report, the untrained base's evaluation, and a study's verdicts where there is a study."""

    runs: list[Run] = field(default_factory=list)
    base: dict[str, Any] | None = None
    verdicts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    """A study's, as they stand in results.json."""
    reference: str = "random"
    """The variant that the others are compared with."""
    named: list[str] = field(default_factory=list)
    """A study's variants in its own order."""

    @property
    def variants(self) -> list[str]:
        """Names of the variants that have runs: in the study's order, others behind."""
        found = dict.fromkeys(run.variant for run in self.runs)
        return [*(name for name in self.named if name in found), *(name for name in found if name not in self.named)]

    @property
    def groups(self) -> Groups:
        """Runs by variant and budget: budgets ascending, `full` last; within a budget in the order of `variants`."""
        keys, names = dict.fromkeys(run.group for run in self.runs), self.variants
        ordered = sorted(keys, key=lambda key: (key[1] is None, key[1] or 0.0, names.index(key[0])))
        return {key: [run for run in self.runs if run.group == key] for key in ordered}

    @property
    def evaluated(self) -> Groups:
        """The groups' runs that have been evaluated."""
        groups = {key: [run for run in runs if run.evaluation is not None] for key, runs in self.groups.items()}
        return {key: runs for key, runs in groups.items() if runs}


def read_collection(folders: Sequence[Path]) -> Collection:
    """All runs in the folders given; a folder written by `compare` stands for its runs.

    Raises UserError for a folder that is neither, for one given twice, and for damaged files.
    """
    found = Collection()
    for folder in folders:
        if (folder / "config.yaml").exists():
            found.runs.append(read_run(folder))
            continue
        inside = sorted(path.parent for path in (folder / "runs").glob("*/config.yaml"))
        if not inside:
            raise UserError(
                f"{folder}: neither a run folder (config.yaml, metrics.jsonl) nor one written by `lead-engine compare` (runs/)"
            )
        found.runs += [read_run(path) for path in inside]
        if (folder / "base" / RESULT).exists():
            found.base = read_result(folder / "base")
        if (folder / "results.json").exists():
            results = read_json(folder / "results.json")
            found.verdicts += results.get("verdicts", [])
            found.warnings += results.get("warnings", [])
            found.comparisons += results.get("comparisons", [])
            found.reference = results.get("reference") or found.reference
            found.named += dict.fromkeys(run["variant"] for run in results.get("runs", []) if "variant" in run)
    places = [run.folder.resolve() for run in found.runs]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place}: given more than once")
    _name(found.runs)
    evaluations = {run.name: run.evaluation for run in found.runs} | {"the untrained base": found.base}
    for mixed in _mixed({name: result for name, result in evaluations.items() if result is not None}):
        warn(mixed)
        found.warnings.append(mixed)
    return found


def _mixed(results: dict[str, dict[str, Any]]) -> list[str]:
    """Sentences on evaluations that are of other records, or of other tokens of them, than the first one."""
    sentences = []
    for name, result in list(results.items())[1:]:
        first, before = next(iter(results.items()))
        noted = ({"sources": side.get(fingerprint.KEY, {}).get("sources")} for side in (before, result))
        found = fingerprint.differences(*noted, f"for {first}", "here") or _other_counts(before, result, first)
        if found:
            what = f"{name}: evaluated on other held-out records than {first}"
            sentences.append(f"{what} ({'; '.join(found)}); losses do not compare")
    return sentences


def _other_counts(before: dict[str, Any], now: dict[str, Any], first: str) -> list[str]:
    """Where --max-length, --skip-bad or the tokenizer made other tokens of the same records: how many there are."""
    sizes = [
        {task: (each["samples"], each["tokens"]) for task, each in result["loss"]["tasks"].items()}
        for result in (before, now)
    ]
    if sizes[0] == sizes[1]:
        return []
    then, today = (" and ".join(f"{sum(each):,}" for each in zip(*size.values(), strict=True)) for size in sizes)
    return [f"records and response tokens: {then} for {first}, {today} here"]


def read_run(folder: Path) -> Run:
    """One run folder. Raises UserError where it is none, or a file in it is damaged."""
    metrics, rounds = folder / "metrics.jsonl", folder / "selection.jsonl"
    if not metrics.exists():
        raise UserError(f"{folder}: has no metrics.jsonl; it is no run folder, or its run has not begun to train")
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
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, len(values) - 1 - place))
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0) * weights)])
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, weights, 0.0))])
    with np.errstate(invalid="ignore"):
        low, high = place - reach, place + reach + 1
        return (sums[high] - sums[low]) / (totals[high] - totals[low])


def _name(runs: list[Run]) -> None:
    """Folder names, with as much of the path before them as tells them apart."""
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
