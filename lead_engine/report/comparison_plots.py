"""Plots of several runs together: variants, budgets, seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lead_engine.base.statistics import Interval, mean_interval
from lead_engine.report.runs import Collection, Groups, Run
from lead_engine.report.style import (
    BETTER,
    GREY,
    Plot,
    finish,
    group_name,
    new_figure,
    short,
    tokens_axis,
    variant_colours,
)
from lead_engine.report.training_plots import task_label, task_rows
from lead_engine.study.contrasts import MEASURES

PANELS_IN_ROW = 3
TOGETHER = 6
"""Most variants that are drawn over each other."""
SMALL_IN_ROW = 5


def losses_plot(collection: Collection) -> Plot:
    """Training loss against tokens of every variant, with bands over seeds; a panel for each budget."""
    name, title = "compare-loss", "Training loss"
    variants = collection.variants[:TOGETHER]
    groups = {
        key: [run for run in runs if run.metrics] for key, runs in collection.groups.items() if key[0] in variants
    }
    groups = {key: runs for key, runs in groups.items() if runs}
    if not groups:
        return Plot(name, title, "No optimizer step has been logged yet.")
    colours = variant_colours(variants)
    panels = sorted({budget for _, budget in groups if budget is not None}) or [None]
    columns = min(len(panels), PANELS_IN_ROW)
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(rows, columns, height=0.6 + 2.9 * rows, sharey=True)
    for where, panel in zip(axes, panels, strict=False):
        end = max(run.metric("tokens")[-1] for key, runs in groups.items() if key[1] == panel for run in runs)
        for (variant, budget), runs in groups.items():
            if budget in (panel, None):
                _loss_band(where, variant, colours[variant], runs, end)
        where.set_title("" if panel is None else f"budget {100 * panel:g} %")
        where.set_xlim(0, 1.02 * end)
        tokens_axis(where)
    for where in axes[len(panels) :]:
        where.set_visible(False)
    for row in range(rows):
        axes[row * columns].set_ylabel("loss (nats per response token)")
    labelled = {
        label: handle for where in axes for handle, label in zip(*where.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=4)
    text = (
        "Loss on the samples trained, smoothed; lines are means over seeds, bands reach from the lowest to the "
        "highest seed. "
        "The variants train on different samples, so these curves tell how training went, not which variant is better."
    )
    if len(collection.variants) > len(variants):
        text += f" The first {len(variants)} variants of {len(collection.variants)} are shown."
    if any(budget is None for _, budget in groups) and panels != [None]:
        text += " Of full training, the part with as many tokens is shown."
    return finish(name, title, text, figure)


def _loss_band(axes: Axes, variant: str, colour: str, runs: list[Run], end: float) -> None:
    """Mean and range over seeds, up to `end` tokens."""
    first, last = max(run.metric("tokens")[0] for run in runs), min(run.metric("tokens")[-1] for run in runs)
    grid = np.linspace(min(first, end), min(last, end), 300)
    curves = np.array([np.interp(grid, run.metric("tokens"), run.smooth_loss) for run in runs])
    axes.plot(grid, curves.mean(0), color=colour, linewidth=2, label=variant)
    axes.fill_between(grid, curves.min(0), curves.max(0), color=colour, alpha=0.18, linewidth=0)


# --- held-out loss by budget ---


def budgets_plot(collection: Collection) -> Plot:
    """Held-out loss by budget, with intervals over seeds: all variants in one panel, or of many, a small panel each."""
    name, title = "compare-heldout", "Held-out loss by budget"
    groups = collection.evaluated
    if not groups:
        return Plot(name, title, "No run has been evaluated yet.")
    variants = [variant for variant in collection.variants if any(key[0] == variant for key in groups)]
    curves = {
        measure: {variant: _curve(groups, variant, measure) for variant in variants} for measure in ("overall", "macro")
    }
    text = "Means over seeds with 95 % intervals (Student's t)"
    if len(variants) <= TOGETHER:
        figure, axes = new_figure(1, 2, height=3.9)
        for where, (measure, by_variant) in zip(axes, curves.items(), strict=True):
            _together(where, by_variant)
            where.set_title(f"{MEASURES[measure]} loss")
            where.set_ylabel("held-out loss (nats per response token)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        text += "; small dots are seeds."
        if any(budget is None for _, budget in groups):
            text += " The line across is full training, its band the same interval."
    else:
        figure = _small_panels(curves, collection.reference)
        text += f"; a panel for each variant, the others behind it in grey, {collection.reference} as a dashed line."
        for variant in variants:
            if curves["overall"][variant][0][0] is None:
                reached = [f"{curves[measure][variant][0][1].mean:.4f} {MEASURES[measure]}" for measure in curves]
                text += f" Training on the whole pool ({variant}) reached {' and '.join(reached)}."
    text += (
        " Overlapping intervals do not mean that there is no difference: seeds are paired, see the differences below."
    )
    if collection.base:
        loss = collection.base["loss"]
        text += f" The untrained base has {loss['overall']:.4f} overall and {loss['macro']:.4f} macro."
    return finish(name, title, text, figure)


Curve = list[tuple[float | None, Interval, list[float]]]
"""(budget, interval over seeds, each seed's loss), budgets ascending; `full` has the one budget None."""


def _curve(groups: Groups, variant: str, measure: str) -> Curve:
    points = []
    for (name, budget), runs in groups.items():
        if name == variant:
            values = [run.evaluation["loss"][measure] for run in runs if run.evaluation is not None]
            points.append((budget, mean_interval(values), values))
    return points


def _together(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """The variants side by side at every budget."""
    budgets, colours = _budgets_of(curves), variant_colours(list(curves))
    moving = [variant for variant, curve in curves.items() if curve[0][0] is not None]
    for variant, curve in curves.items():
        colour = colours[variant]
        if curve[0][0] is None:
            _across(axes, curve[0][1], colour, variant)
            continue
        shift = (0.64 / len(moving)) * (moving.index(variant) - (len(moving) - 1) / 2)
        places = [budgets.index(budget) + shift for budget, _, _ in curve]
        for place, (_, _, values) in zip(places, curve, strict=True):
            axes.scatter(np.full(len(values), place + 0.05), values, s=12, color=colour, alpha=0.4, linewidth=0)
        axes.errorbar(
            places,
            [interval.mean for _, interval, _ in curve],
            _bars(curve),
            fmt="o",
            color=colour,
            markersize=6,
            linewidth=1.8,
            capsize=3,
            label=variant,
        )
    axes.set_xlabel("budget (share of the pool's tokens)")
    _budget_ticks(axes, budgets)


def _small_panels(curves: Mapping[str, Mapping[str, Curve]], reference: str) -> Figure:
    """For each measure a grid of panels, one for each variant."""
    first = next(iter(curves.values()))
    variants = [variant for variant, curve in first.items() if curve[0][0] is not None and variant != reference]
    rows = -(-len(variants) // SMALL_IN_ROW)
    figure, axes = new_figure(rows * len(curves), SMALL_IN_ROW, height=0.4 + 1.55 * rows * len(curves), sharex=True)
    for block, (measure, by_variant) in enumerate(curves.items()):
        panels = axes[block * rows * SMALL_IN_ROW : (block + 1) * rows * SMALL_IN_ROW]
        budgets = _budgets_of(by_variant)
        low, high = _limits(by_variant.values())
        for panel, variant in zip(panels, variants, strict=False):
            for other, curve in by_variant.items():
                if curve[0][0] is None:  # full training: far below, in words
                    continue
                if other == reference:
                    _line(panel, budgets, curve, color="#E69F00", linewidth=1.6, linestyle="--", zorder=3)
                elif other != variant:
                    _line(panel, budgets, curve, color="#dcdcdc", linewidth=0.8)
            curve = by_variant[variant]
            places = [budgets.index(budget) for budget, _, _ in curve]
            means = [interval.mean for _, interval, _ in curve]
            panel.errorbar(
                places, means, _bars(curve), fmt="o-", color=BETTER, markersize=3.5, linewidth=1.4, capsize=2, zorder=4
            )
            panel.set_title(short(variant, 24), fontsize=8.5)
            panel.tick_params(labelsize=7.5)
            panel.set_ylim(low, high)
            _budget_ticks(panel, budgets)
        for panel in panels[len(variants) :]:
            panel.set_visible(False)
        for row in range(rows):
            panels[row * SMALL_IN_ROW].set_ylabel(MEASURES[measure], fontsize=8.5)
    return figure


def _budgets_of(curves: Mapping[str, Curve]) -> list[float]:
    return sorted({budget for curve in curves.values() for budget, _, _ in curve if budget is not None})


def _limits(curves: Iterable[Curve]) -> tuple[float, float]:
    """Bounds that hold every mean at a budget; intervals of few seeds may reach out of the panel."""
    means = [interval.mean for curve in curves for budget, interval, _ in curve if budget is not None]
    margin = 0.08 * (max(means) - min(means)) or 0.1
    return min(means) - margin, max(means) + margin


def _line(axes: Axes, budgets: list[float], curve: Curve, **style: Any) -> None:
    axes.plot([budgets.index(budget) for budget, _, _ in curve], [interval.mean for _, interval, _ in curve], **style)


def _across(axes: Axes, interval: Interval, colour: str, label: str) -> None:
    axes.axhline(interval.mean, color=colour, linewidth=1.6, label=label)
    if interval.known:
        axes.axhspan(interval.low, interval.high, color=colour, alpha=0.12, linewidth=0)


def _bars(curve: Curve) -> list[list[float]]:
    """Lengths of error bars down and up; 0 where one seed gives none."""
    intervals = [interval for _, interval, _ in curve]
    return [
        [i.mean - i.low if i.known else 0.0 for i in intervals],
        [i.high - i.mean if i.known else 0.0 for i in intervals],
    ]


def _budget_ticks(axes: Axes, budgets: list[float]) -> None:
    axes.set_xticks(range(len(budgets)), [f"{100 * budget:g} %" for budget in budgets])
    axes.set_xlim(-0.6, max(len(budgets), 1) - 0.4)
    axes.grid(axis="x", visible=False)


# --- tasks ---


def tasks_plot(collection: Collection) -> Plot:
    """Held-out loss per task, at the largest budget; of many variants, the reference and full training alone."""
    name, title = "compare-tasks", "Held-out loss per task"
    groups = collection.evaluated
    if not groups:
        return Plot(name, title, "No run has been evaluated yet.")
    largest = max((budget for _, budget in groups if budget is not None), default=None)
    shown = {key: runs for key, runs in groups.items() if key[1] in (None, largest)}
    few = len(shown) <= TOGETHER
    if not few:
        shown = {key: runs for key, runs in shown.items() if key[0] == collection.reference or key[1] is None} or dict(
            list(shown.items())[:TOGETHER]
        )
    first = next(iter(shown.values()))[0].evaluation["loss"]
    tasks = [task for task, _ in task_rows(first)]
    colours = variant_colours([variant for variant, _ in shown])
    figure, (axes,) = new_figure(height=1.2 + 0.27 * len(tasks))
    places = np.arange(len(tasks))[::-1].astype(float)
    if collection.base:
        untrained = dict(task_rows(collection.base["loss"]))
        axes.scatter(
            [untrained.get(task, np.nan) for task in tasks],
            places,
            s=34,
            facecolor="white",
            edgecolor=GREY,
            linewidth=1.4,
            label="untrained base",
        )
    for index, ((variant, budget), runs) in enumerate(shown.items()):
        losses = [dict(task_rows(run.evaluation["loss"])) for run in runs]
        means = [np.mean([loss.get(task, np.nan) for loss in losses]) for task in tasks]
        offset = 0.1 * ((len(shown) - 1) / 2 - index)
        axes.scatter(means, places + offset, s=30, color=colours[variant], label=group_name(variant, budget))
    axes.set_yticks(places, [task_label(task, first) for task in tasks])
    axes.axhline(places[1] - 0.5, color="#b0b0b0", linewidth=0.8)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("held-out loss (nats per response token)")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4)
    text = "Means over seeds, with the number of held-out samples behind each task."
    if largest is not None:
        text += f" Variants with a budget are shown at {100 * largest:g} % of the pool."
    if not few:
        text += " There are too many variants to draw them all here; the plot of differences per task shows how each differs."
    return finish(name, title, text, figure)


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
    places, left = np.arange(len(shown))[::-1], np.zeros(len(shown))
    for part, colour in PARTS.items():
        widths = np.array([parts[part] for parts in shown.values()])
        if widths.any():
            axes.barh(places, widths, left=left, height=0.7, color=colour, label=part)
        left += widths
    for place, total in zip(places, left, strict=True):
        axes.text(total, place, f" {total:.3g} s", va="center", fontsize=8)
    axes.set_yticks(places, [short(variant, 32) for variant in shown])
    axes.set_xlim(0, 1.12 * left.max())
    axes.set_xlabel("wall time of a run (s)")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=4)
    text = "Means over seeds. Selection is planning a round and learning from it; scoring the passes over the pool inside the run."
    if largest is not None:
        text += f" At {100 * largest:g} % of the pool."
    for (variant, budget), summaries in finished.items():
        if budget is None and largest is not None:
            text += (
                f" Training on all of it ({variant}) took {np.mean([each['seconds'] for each in summaries]):,.0f} s."
            )
    text += " Runs that shared the machine with others took longer than they would alone; the shares tell more than the seconds."
    return finish(name, title, text, figure)


def time_parts(summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean seconds in each of `PARTS`; all of them "not split" where a summary does not tell the parts."""
    total = float(np.mean([each["seconds"] for each in summaries]))
    if any(each.get("selection_seconds") is None or each.get("scoring_seconds") is None for each in summaries):
        return dict.fromkeys(PARTS, 0.0) | {"not split": total}
    selection, scoring = (
        float(np.mean([each[f"{part}_seconds"] for each in summaries])) for part in ("selection", "scoring")
    )
    return {
        "training": max(0.0, total - selection - scoring),
        "selection": selection,
        "scoring": scoring,
        "not split": 0.0,
    }
