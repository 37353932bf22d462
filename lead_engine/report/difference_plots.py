"""Plots of paired differences: forests of intervals, and a map of tasks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lead_engine.base.statistics import Interval, paired_interval
from lead_engine.report.runs import Collection, Run
from lead_engine.report.style import BETTER, GREY, WORSE, Plot, finish, group_name, new_figure, short
from lead_engine.study.contrasts import MEASURES

ANNOTATED_TASKS = 14
"""Most tasks whose cells in the map show their number."""
MANY_ROWS = 14
"""From more rows on, they are drawn small and close together."""


@dataclass(frozen=True)
class Row:
    """One line of a forest plot."""

    label: str
    block: str
    """Rows of the same block stand together."""
    intervals: dict[str, Interval]
    seeds: dict[str, list[float]]
    """Each seed's difference, by measure; empty where they are not known."""


def differences_plot(collection: Collection) -> Plot:
    """Paired differences to the reference at equal budget."""
    name, title = "compare-difference", f"Difference to {collection.reference} at equal budget"
    rows = []
    for variant, budget, by_measure in paired_differences(collection):
        intervals = {measure: interval for measure, (interval, _) in by_measure.items()}
        seeds = {measure: differences for measure, (_, differences) in by_measure.items()}
        rows.append(Row(group_name(variant, budget), variant, intervals, seeds))
    if not rows:
        return Plot(name, title, _no_pairs(collection))
    text = (
        "Mean over seeds of the difference within each seed (small dots), with its 95 % interval. An interval left of "
        f"0 (blue) shows that the variant is better than {collection.reference} at the same number of tokens, one "
        "right of it (red) that it is worse; one that holds 0 (grey) shows no difference."
    )
    return _forest(name, title, text, rows, f"loss minus that of {collection.reference} (nats)")


def _no_pairs(collection: Collection) -> str:
    return f"No variant was evaluated beside {collection.reference} at the same budget and with the same seeds."


def contrasts_plot(collection: Collection) -> Plot:
    """The study's other comparisons: two variants each, by budget and pooled."""
    name, title = "compare-contrasts", "Contrasts of two variants"
    rows = []
    for each in collection.comparisons:
        if each["b"] == collection.reference:
            continue
        pair = f"{each['a']} - {each['b']}"
        label = f"{pair}, pooled" if each["pooled"] else group_name(pair, each["budgets"][0])
        intervals = {measure: _interval(each[measure]) for measure in MEASURES}
        rows.append(Row(label, pair, intervals, {measure: [] for measure in MEASURES}))
    if not rows:
        return Plot(name, title, "The study names no contrasts.")
    text = (
        "Loss of the first minus loss of the second variant, paired by seed, with its 95 % interval; left of 0 (blue) "
        "the first is better. Pooled: the mean over the budgets that both have, within each seed."
    )
    return _forest(name, title, text, rows, "difference in loss (nats)")


def _interval(values: Mapping[str, Any]) -> Interval:
    low, high = (np.nan if values[bound] is None else values[bound] for bound in ("low", "high"))
    return Interval(values["mean"], low, high, values["n"])


def _forest(name: str, title: str, text: str, rows: list[Row], label: str) -> Plot:
    """A panel for each measure, in it a line for each row. label: of the x axis."""
    many = len(rows) > MANY_ROWS
    figure, panels = new_figure(1, len(MEASURES), height=1.5 + (0.2 if many else 0.42) * len(rows), sharey=True)
    ys = np.arange(len(rows))[::-1]
    for axes, (measure, heading) in zip(panels, MEASURES.items(), strict=True):
        axes.axvline(0, color=GREY, linewidth=1)
        for y, row in zip(ys, rows, strict=True):
            _forest_row(axes, y, row.intervals[measure], row.seeds[measure], many)
        for y, (row, below) in zip(ys, itertools.pairwise(rows), strict=False):
            if row.block != below.block:
                axes.axhline(y - 0.5, color="#e0e0e0", linewidth=0.8)
        reach = 1.15 * max(np.abs(axes.get_xlim()))  # 0 in the middle
        axes.set_xlim(-reach, reach)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(heading)
        axes.set_xlabel(f"{label}\nbetter \u2190   \u2192 worse", fontsize=8.5)
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(ys, [short(row.label, 44) for row in rows], fontsize=7.5 if many else None)
    panels[0].set_ylim(-0.6, len(rows) - 0.4)
    return finish(name, title, text, figure)


def _forest_row(axes: Axes, y: float, interval: Interval, seeds: list[float], many: bool) -> None:
    colour = GREY
    if interval.known and interval.low * interval.high > 0:  # 0 lies outside
        colour = BETTER if interval.high < 0 else WORSE
    axes.scatter(seeds, np.full(len(seeds), y + 0.2), s=7 if many else 16, color=colour, alpha=0.5, linewidth=0)
    axes.scatter(interval.mean, y, s=20 if many else 48, color=colour, zorder=3)
    if interval.known:
        axes.plot([interval.low, interval.high], [y, y], color=colour, linewidth=1.4 if many else 2)


def paired_differences(collection: Collection) -> list[tuple[str, float, dict[str, tuple[Interval, list[float]]]]]:
    """(variant, budget, {measure: (interval, each seed's difference)}) over seeds shared with the reference."""
    rows = []
    for variant, budget, pairs in _pairs(collection):
        by_measure = {}
        for measure in MEASURES:
            mine, theirs = ([run.losses[measure] for run in side if run.losses] for side in zip(*pairs, strict=True))
            by_measure[measure] = (paired_interval(mine, theirs), [a - b for a, b in zip(mine, theirs, strict=True)])
        rows.append((variant, budget, by_measure))
    return rows


def _pairs(collection: Collection) -> list[tuple[str, float, list[tuple[Run, Run]]]]:
    """(variant, budget, [(its run, the reference's run of the same seed)]), variant by variant."""
    groups, found = collection.evaluated, []
    for (variant, budget), runs in groups.items():
        reference = {run.seed: run for run in groups.get((collection.reference, budget), [])}
        pairs = [(run, reference[run.seed]) for run in runs if run.seed in reference]
        if variant != collection.reference and budget is not None and pairs:
            found.append((variant, budget, pairs))
    names = collection.variants
    return sorted(found, key=lambda row: (names.index(row[0]), row[1]))


def task_differences_plot(collection: Collection) -> Plot:
    """Heat map of each task's mean difference to the reference, at the largest budget."""
    name, title = "compare-task-differences", f"Difference to {collection.reference} per task"
    pairs = _pairs(collection)
    if not pairs:
        return Plot(name, title, _no_pairs(collection))
    largest = max(budget for _, budget, _ in pairs)
    shown = [(variant, runs) for variant, budget, runs in pairs if budget == largest]
    tasks = _tasks_by_loss(shown[0][1][0][1])
    values = np.empty((len(shown), len(tasks) + 1))
    for row, (_, runs) in enumerate(shown):
        for column, task in enumerate(tasks):
            values[row, column] = np.mean([a.task_losses[task] - b.task_losses[task] for a, b in runs])
    values[:, -1] = values[:, :-1].mean(axis=1)
    figure = _task_map(values, tasks, [variant for variant, _ in shown])
    text = (
        f"Held-out loss minus that of {collection.reference} with the same seed, mean over seeds, at "
        f"{100 * largest:g} % of the pool; blue is better. The last column is the mean over tasks."
    )
    return finish(name, title, text, figure)


def _tasks_by_loss(run: Run) -> list[str]:
    """Descending."""
    losses = run.task_losses
    return sorted(losses, key=lambda task: -losses[task])


def _task_map(values: NDArray[np.float64], tasks: list[str], variants: list[str]) -> Figure:
    """values: [variants, tasks + 1], the last column macro."""
    reach = np.abs(values).max() or 1.0
    figure, (axes,) = new_figure(height=2.2 + 0.3 * len(variants))
    image = axes.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
    axes.set_xticks(
        range(len(tasks) + 1),
        [*(short(task, 22) for task in tasks), "macro"],
        rotation=40,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_yticks(range(len(variants)), [short(variant, 32) for variant in variants])
    axes.grid(visible=False)
    axes.axvline(len(tasks) - 0.5, color="white", linewidth=3)
    if len(tasks) <= ANNOTATED_TASKS:
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if abs(value) > 0.6 * reach else "black"
            axes.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=7.5, color=colour)
    figure.colorbar(image, ax=axes, label="difference in loss (nats)", shrink=0.9)
    return figure
