"""Plots of several runs together: training loss, held-out loss per task, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lead_engine.report.runs import Collection, Groups, Run
from lead_engine.report.style import (
    HOLLOW,
    TOGETHER,
    Plot,
    finish,
    group_name,
    new_figure,
    short,
    tokens_axis,
    variant_colours,
)
from lead_engine.report.training_plots import task_label, task_rows

PANELS_IN_ROW = 3


def losses_plot(collection: Collection) -> Plot:
    """Training loss against tokens of every variant, with bands over seeds; a panel for each budget."""
    name, title = "compare-loss", "Training loss"
    variants = collection.variants[:TOGETHER]
    groups: Groups = {}
    for key, runs in collection.groups.items():
        logged = [run for run in runs if run.metrics]
        if key[0] in variants and logged:
            groups[key] = logged
    if not groups:
        return Plot(name, title, "No optimizer step has been logged yet.")
    budgets: list[float | None] = [*sorted({budget for _, budget in groups if budget is not None})]
    text = (
        "Loss on the samples trained, smoothed; lines are means over seeds, bands reach from the lowest to the highest "
        "seed. The variants train on different samples, so these curves tell how training went, not which variant is "
        "better."
    )
    if len(collection.variants) > len(variants):
        text += f" The first {len(variants)} variants of {len(collection.variants)} are shown."
    if budgets and any(budget is None for _, budget in groups):
        text += " Of full training, the part with as many tokens is shown."
    figure = _loss_panels(groups, budgets or [None], variant_colours(variants))
    return finish(name, title, text, figure)


def _loss_panels(groups: Groups, budgets: list[float | None], colours: Mapping[str, str]) -> Figure:
    """A panel for each budget, side by side in rows; variants without a budget are in all of them."""
    columns = min(len(budgets), PANELS_IN_ROW)
    rows = -(-len(budgets) // columns)
    figure, axes = new_figure(rows, columns, height=0.6 + 2.9 * rows, sharey=True)
    for panel, of_panel in zip(axes, budgets, strict=False):
        end = max(run.metric("tokens")[-1] for key, runs in groups.items() if key[1] == of_panel for run in runs)
        for (variant, budget), runs in groups.items():
            if budget in (of_panel, None):
                _loss_band(panel, variant, colours[variant], runs, end)
        panel.set_title("" if of_panel is None else f"budget {100 * of_panel:g} %")
        panel.set_xlim(0, 1.02 * end)
        tokens_axis(panel)
    for panel in axes[len(budgets) :]:
        panel.set_visible(False)
    for row in range(rows):
        axes[row * columns].set_ylabel("loss (nats per response token)")
    labelled: dict[str, Any] = {}
    for panel in axes:
        handles, labels = panel.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    figure.legend(list(labelled.values()), list(labelled), loc="outside lower center", ncols=4)
    return figure


def _loss_band(axes: Axes, variant: str, colour: str, runs: list[Run], end: float) -> None:
    """Mean and range over seeds, up to `end` tokens."""
    first, last = max(run.metric("tokens")[0] for run in runs), min(run.metric("tokens")[-1] for run in runs)
    grid = np.linspace(min(first, end), min(last, end), 300)
    curves = np.array([np.interp(grid, run.metric("tokens"), run.smooth_loss) for run in runs])
    axes.plot(grid, curves.mean(0), color=colour, linewidth=2, label=variant)
    axes.fill_between(grid, curves.min(0), curves.max(0), color=colour, alpha=0.18, linewidth=0)


# --- tasks ---


def tasks_plot(collection: Collection) -> Plot:
    """Held-out loss per task, at the largest budget; of many variants, the reference and full training alone."""
    name, title = "compare-tasks", "Held-out loss per task"
    groups = collection.evaluated
    if not groups:
        return Plot(name, title, "No run has been evaluated yet.")
    largest = max((budget for _, budget in groups if budget is not None), default=None)
    at_largest = {key: runs for key, runs in groups.items() if key[1] in (None, largest)}
    shown = at_largest
    if len(at_largest) > TOGETHER:
        shown = {key: runs for key, runs in at_largest.items() if key[0] == collection.reference or key[1] is None}
        shown = shown or dict(list(at_largest.items())[:TOGETHER])
    untrained = collection.base["loss"] if collection.base else None
    figure = _task_panel(shown, untrained)
    text = "Means over seeds, with the number of held-out samples behind each task."
    if largest is not None:
        text += f" Variants with a budget are shown at {100 * largest:g} % of the pool."
    if len(at_largest) > TOGETHER:
        text += (
            " There are too many variants to draw them all here; the plot of differences per task shows how each "
            "differs."
        )
    return finish(name, title, text, figure)


def _task_panel(groups: Groups, untrained: dict[str, Any] | None) -> Figure:
    """A row for each task and a dot in it for each group. untrained: the base's "loss", or None."""
    losses = {
        key: [run.evaluation["loss"] for run in runs if run.evaluation is not None] for key, runs in groups.items()
    }
    first = next(iter(losses.values()))[0]
    tasks = [task for task, _ in task_rows(first)]
    colours = variant_colours([variant for variant, _ in groups])
    figure, (axes,) = new_figure(height=1.2 + 0.27 * len(tasks))
    ys = np.arange(len(tasks))[::-1].astype(float)
    if untrained is not None:
        by_task = dict(task_rows(untrained))
        axes.scatter([by_task.get(task, np.nan) for task in tasks], ys, s=34, label="untrained base", **HOLLOW)
    for index, ((variant, budget), of_group) in enumerate(losses.items()):
        by_seed = [dict(task_rows(loss)) for loss in of_group]
        means = [np.mean([loss.get(task, np.nan) for loss in by_seed]) for task in tasks]
        offset = 0.1 * ((len(losses) - 1) / 2 - index)  # so that equal losses do not cover each other
        axes.scatter(means, ys + offset, s=30, color=colours[variant], label=group_name(variant, budget))
    axes.set_yticks(ys, [task_label(task, first) for task in tasks])
    axes.axhline(ys[1] - 0.5, color="#b0b0b0", linewidth=0.8)  # overall and macro stand above the tasks
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("held-out loss (nats per response token)")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4)
    return figure


# --- time ---

PARTS = {"training": "#0072B2", "selection": "#E69F00", "scoring": "#CC79A7", "not split": "#c4c4c4"}


def time_plot(collection: Collection) -> Plot:
    """Wall time of every variant at the largest budget, split into training, selection and scoring."""
    name, title = "compare-time", "Where the time goes"
    finished = {key: [run.summary for run in runs if run.summary] for key, runs in collection.groups.items()}
    finished = {key: summaries for key, summaries in finished.items() if summaries}
    largest = max((budget for _, budget in finished if budget is not None), default=None)
    shown = {variant: time_parts(summaries) for (variant, budget), summaries in finished.items() if budget == largest}
    if not shown:
        return Plot(name, title, "No run is finished yet.")
    figure, (axes,) = new_figure(height=1.4 + 0.28 * len(shown))
    ys, left = np.arange(len(shown))[::-1], np.zeros(len(shown))
    for part, colour in PARTS.items():
        widths = np.array([parts[part] for parts in shown.values()])
        if widths.any():
            axes.barh(ys, widths, left=left, height=0.7, color=colour, label=part)
        left += widths
    for y, total in zip(ys, left, strict=True):
        axes.text(total, y, f" {total:.3g} s", va="center", fontsize=8)
    axes.set_yticks(ys, [short(variant, 32) for variant in shown])
    axes.set_xlim(0, 1.12 * left.max())
    axes.set_xlabel("wall time of a run (s)")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=4)
    text = (
        "Means over seeds. Selection is planning a round and learning from it; scoring the passes over the pool inside "
        "the run."
    )
    if largest is not None:
        text += f" At {100 * largest:g} % of the pool."
    for (variant, budget), summaries in finished.items():
        if budget is None and largest is not None:
            seconds = np.mean([each["seconds"] for each in summaries])
            text += f" Training on all of it ({variant}) took {seconds:,.0f} s."
    text += (
        " Runs that shared the machine with others took longer than they would alone; the shares tell more than the "
        "seconds."
    )
    return finish(name, title, text, figure)


def time_parts(summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean seconds in each of `PARTS`; all of them "not split" if a summary does not name the parts."""
    total = float(np.mean([each["seconds"] for each in summaries]))
    if any(each.get("selection_seconds") is None or each.get("scoring_seconds") is None for each in summaries):
        return dict.fromkeys(PARTS, 0.0) | {"not split": total}
    selection = float(np.mean([each["selection_seconds"] for each in summaries]))
    scoring = float(np.mean([each["scoring_seconds"] for each in summaries]))
    return {
        "training": max(0.0, total - selection - scoring),
        "selection": selection,
        "scoring": scoring,
        "not split": 0.0,
    }
