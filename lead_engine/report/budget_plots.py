"""Held-out loss of several variants by budget, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lead_engine.base.statistics import Interval, mean_interval
from lead_engine.report.runs import Collection, Groups
from lead_engine.report.style import BETTER, REFERENCE, TOGETHER, Plot, finish, new_figure, short, variant_colours
from lead_engine.study.contrasts import MEASURES

PANELS_IN_ROW = 5
"""Of the small panels, one a variant."""


def budgets_plot(collection: Collection) -> Plot:
    """All variants in one panel for each measure; if they are many, a small panel for each."""
    name, title = "compare-heldout", "Held-out loss by budget"
    groups = collection.evaluated
    if not groups:
        return Plot(name, title, "No run has been evaluated yet.")
    variants = [variant for variant in collection.variants if any(key[0] == variant for key in groups)]
    curves = {measure: _curves(groups, variants, measure) for measure in ("overall", "macro")}
    text = "Means over seeds with 95 % intervals (Student's t)"
    if len(variants) <= TOGETHER:
        figure = _two_panels(curves)
        text += "; small dots are seeds."
        if any(budget is None for _, budget in groups):
            text += " The line across is full training, its band the same interval."
    else:
        figure = _small_panels(curves, collection.reference)
        text += f"; a panel for each variant, the others behind it in grey, {collection.reference} as a dashed line."
        for variant in curves["overall"].whole_pool:
            reached = [f"{of.whole_pool[variant].mean:.4f} {MEASURES[measure]}" for measure, of in curves.items()]
            text += f" Training on the whole pool ({variant}) reached {' and '.join(reached)}."
    text += (
        " Overlapping intervals do not mean that there is no difference: seeds are paired, see the differences below."
    )
    if collection.base:
        loss = collection.base["loss"]
        text += f" The untrained base has {loss['overall']:.4f} overall and {loss['macro']:.4f} macro."
    return finish(name, title, text, figure)


class Point(NamedTuple):
    """A variant at one budget: each seed's loss, and their interval."""

    budget: float
    interval: Interval
    losses: list[float]


class Curves(NamedTuple):
    """Every variant's losses in one measure."""

    variants: list[str]
    by_budget: dict[str, list[Point]]
    """Variants with budgets, their points by ascending budget."""
    whole_pool: dict[str, Interval]
    """Variants that train on the whole pool."""

    @property
    def budgets(self) -> list[float]:
        return sorted({point.budget for points in self.by_budget.values() for point in points})


def _curves(groups: Groups, variants: list[str], measure: str) -> Curves:
    curves = Curves(variants, {}, {})
    for variant in variants:
        for (name, budget), runs in groups.items():
            if name != variant:
                continue
            losses = [run.evaluation["loss"][measure] for run in runs if run.evaluation is not None]
            interval = mean_interval(losses)
            if budget is None:
                curves.whole_pool[variant] = interval
            else:
                curves.by_budget.setdefault(variant, []).append(Point(budget, interval, losses))
    return curves


def _two_panels(curves: Mapping[str, Curves]) -> Figure:
    figure, axes = new_figure(1, 2, height=3.9)
    for panel, (measure, of_measure) in zip(axes, curves.items(), strict=True):
        _together(panel, of_measure)
        panel.set_title(f"{MEASURES[measure]} loss")
        panel.set_ylabel("held-out loss (nats per response token)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _together(axes: Axes, curves: Curves) -> None:
    """The variants side by side at every budget; those of the whole pool as lines across."""
    budgets, colours, num_moving = curves.budgets, variant_colours(curves.variants), len(curves.by_budget)
    shifts = {variant: (0.64 / num_moving) * (i - (num_moving - 1) / 2) for i, variant in enumerate(curves.by_budget)}
    for variant in curves.variants:
        colour = colours[variant]
        if variant in curves.whole_pool:
            _across(axes, curves.whole_pool[variant], colour, variant)
            continue
        points, shift = curves.by_budget[variant], shifts[variant]
        xs = [budgets.index(point.budget) + shift for point in points]
        for x, point in zip(xs, points, strict=True):
            dots = np.full(len(point.losses), x + 0.05)
            axes.scatter(dots, point.losses, s=12, color=colour, alpha=0.4, linewidth=0)
        axes.errorbar(
            xs,
            [point.interval.mean for point in points],
            _bars(points),
            fmt="o",
            color=colour,
            markersize=6,
            linewidth=1.8,
            capsize=3,
            label=variant,
        )
    axes.set_xlabel("budget (share of the pool's tokens)")
    _budget_ticks(axes, budgets)


def _small_panels(curves: Mapping[str, Curves], reference: str) -> Figure:
    """For each measure a grid of panels, one a variant. Full training lies far below and is told in words alone."""
    variants = [variant for variant in next(iter(curves.values())).by_budget if variant != reference]
    rows = -(-len(variants) // PANELS_IN_ROW)
    figure, axes = new_figure(rows * len(curves), PANELS_IN_ROW, height=0.4 + 1.55 * rows * len(curves), sharex=True)
    for block, (measure, of_measure) in enumerate(curves.items()):
        panels = axes[block * rows * PANELS_IN_ROW : (block + 1) * rows * PANELS_IN_ROW]
        low, high = _limits(of_measure.by_budget.values())
        for panel, variant in zip(panels, variants, strict=False):
            _small_panel(panel, of_measure, variant, reference)
            panel.set_ylim(low, high)
        for panel in panels[len(variants) :]:
            panel.set_visible(False)
        for row in range(rows):
            panels[row * PANELS_IN_ROW].set_ylabel(MEASURES[measure], fontsize=8.5)
    return figure


def _small_panel(panel: Axes, curves: Curves, variant: str, reference: str) -> None:
    """One variant in front of the others."""
    budgets = curves.budgets
    for other, points in curves.by_budget.items():
        if other == reference:
            _line(panel, budgets, points, color=REFERENCE, linewidth=1.6, linestyle="--", zorder=3)
        elif other != variant:
            _line(panel, budgets, points, color="#dcdcdc", linewidth=0.8)
    points = curves.by_budget[variant]
    xs = [budgets.index(point.budget) for point in points]
    means = [point.interval.mean for point in points]
    panel.errorbar(xs, means, _bars(points), fmt="o-", color=BETTER, markersize=3.5, linewidth=1.4, capsize=2, zorder=4)
    panel.set_title(short(variant, 24), fontsize=8.5)
    panel.tick_params(labelsize=7.5)
    _budget_ticks(panel, budgets)


def _limits(curves: Iterable[list[Point]]) -> tuple[float, float]:
    """Bounds that hold every mean; intervals of few seeds may reach out of the panel."""
    means = [point.interval.mean for points in curves for point in points]
    margin = 0.08 * (max(means) - min(means)) or 0.1
    return min(means) - margin, max(means) + margin


def _line(axes: Axes, budgets: list[float], points: list[Point], **style: Any) -> None:
    axes.plot([budgets.index(point.budget) for point in points], [point.interval.mean for point in points], **style)


def _across(axes: Axes, interval: Interval, colour: str, label: str) -> None:
    axes.axhline(interval.mean, color=colour, linewidth=1.6, label=label)
    if interval.known:
        axes.axhspan(interval.low, interval.high, color=colour, alpha=0.12, linewidth=0)


def _bars(points: list[Point]) -> list[list[float]]:
    """Lengths of the error bars down and up; 0 where a single seed gives no interval."""
    intervals = [point.interval for point in points]
    down = [i.mean - i.low if i.known else 0.0 for i in intervals]
    up = [i.high - i.mean if i.known else 0.0 for i in intervals]
    return [down, up]


def _budget_ticks(axes: Axes, budgets: list[float]) -> None:
    axes.set_xticks(range(len(budgets)), [f"{100 * budget:g} %" for budget in budgets])
    axes.set_xlim(-0.6, max(len(budgets), 1) - 0.4)
    axes.grid(axis="x", visible=False)
