"""Plots of several runs together: methods, budgets, seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lead_engine.evaluation.stats import Interval, mean_interval, paired_interval
from lead_engine.report.runs import Collection, Run
from lead_engine.report.style import GREY, Plot, finish, group_name, method_colour, new_figure, tokens_axis
from lead_engine.report.training_plots import task_label, task_rows

REFERENCE = "random"
PANELS_IN_ROW = 3


def losses_plot(collection: Collection) -> Plot:
    """Training loss against tokens of every method, with bands over seeds; a panel for each budget."""
    name, title = "compare-loss", "Training loss of all methods"
    groups = {key: [run for run in runs if run.metrics] for key, runs in collection.groups.items()}
    groups = {key: runs for key, runs in groups.items() if runs}
    if not groups:
        return Plot(name, title, "No optimizer step has been logged yet.")
    panels = sorted({budget for _, budget in groups if budget is not None}) or [None]
    columns = min(len(panels), PANELS_IN_ROW)
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(rows, columns, height=0.6 + 2.9 * rows, sharey=True)
    for where, panel in zip(axes, panels, strict=False):
        end = max(run.metric("tokens")[-1] for key, runs in groups.items() if key[1] == panel for run in runs)
        for (method, budget), runs in groups.items():
            if budget in (panel, None):
                _loss_band(where, method, runs, end)
        where.set_title("" if panel is None else f"budget {100 * panel:g} %")
        where.set_xlim(0, 1.02 * end)
        tokens_axis(where)
    for where in axes[len(panels) :]:
        where.set_visible(False)
    for row in range(rows):
        axes[row * columns].set_ylabel("loss (nats per response token)")
    labelled = {label: handle for where in axes for handle, label in zip(*where.get_legend_handles_labels(), strict=True)}
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=4)
    text = (
        "Loss on the samples trained, smoothed; lines are means over seeds, bands reach from the lowest to the "
        "highest seed. "
        "The methods train on different samples, so these curves tell how training went, not which method is better."
    )
    if ("full", None) in groups and panels != [None]:
        text += " Of full training, the part with as many tokens is shown."
    return finish(name, title, text, figure)


def _loss_band(axes: Axes, method: str, runs: list[Run], end: float) -> None:
    """Mean and range over seeds, up to `end` tokens."""
    first, last = max(run.metric("tokens")[0] for run in runs), min(run.metric("tokens")[-1] for run in runs)
    grid = np.linspace(min(first, end), min(last, end), 300)
    curves = np.array([np.interp(grid, run.metric("tokens"), run.smooth_loss) for run in runs])
    axes.plot(grid, curves.mean(0), color=method_colour(method), linewidth=2, label=method)
    axes.fill_between(grid, curves.min(0), curves.max(0), color=method_colour(method), alpha=0.18, linewidth=0)


def budgets_plot(collection: Collection) -> Plot:
    """Held-out loss by budget, with intervals over seeds."""
    name, title = "compare-heldout", "Held-out loss by budget"
    groups = _evaluated(collection)
    if not groups:
        return Plot(name, title, "No run has been evaluated yet.")
    figure, (overall, macro) = new_figure(1, 2, height=3.9)
    for axes, kind in ((overall, "overall"), (macro, "macro")):
        _losses_by_budget(axes, groups, kind)
        axes.set_title(f"{kind} loss")
        axes.set_ylabel("held-out loss (nats per response token)")
    handles, labels = overall.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    text = (
        "Means over seeds with 95 % intervals (Student's t); small dots are seeds. Overlapping intervals do not "
        "mean that there "
        "is no difference: seeds are paired, see the next plot."
    )
    if ("full", None) in groups:
        text += " The line across is full training, its band the same interval."
    if collection.base:
        loss = collection.base["loss"]
        text += f" The untrained base has {loss['overall']:.4f} overall and {loss['macro']:.4f} macro."
    return finish(name, title, text, figure)


def differences_plot(collection: Collection) -> Plot:
    """Paired differences to `random` at equal budget."""
    name, title = "compare-difference", "Difference to random at equal budget"
    rows = paired_differences(collection)
    if not rows:
        return Plot(name, title, f"No method was evaluated beside {REFERENCE} at the same budget and with the same seeds.")
    figure, panels = new_figure(1, 2, height=1.5 + 0.42 * len(rows), sharey=True)
    places = np.arange(len(rows))[::-1]
    for axes, kind in zip(panels, ("overall", "macro"), strict=True):
        axes.axvline(0, color=GREY, linewidth=1)
        for place, (method, _, by_kind) in zip(places, rows, strict=True):
            interval, seeds = by_kind[kind]
            colour = method_colour(method)
            axes.scatter(seeds, np.full(len(seeds), place + 0.2), s=16, color=colour, alpha=0.5, linewidth=0)
            axes.scatter(interval.mean, place, s=48, color=colour, zorder=3)
            if interval.known:
                axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2)
        reach = 1.15 * max(np.abs(axes.get_xlim()))
        axes.set_xlim(-reach, reach)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(f"{kind} loss")
        axes.set_xlabel(f"loss minus that of {REFERENCE} (nats per token)\nbetter \u2190   \u2192 worse")
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(places, [group_name(method, budget) for method, budget, _ in rows])
    panels[0].set_ylim(-0.6, len(rows) - 0.4)
    text = (
        "Mean over seeds of the difference within each seed (small dots), with its 95 % interval. An interval left "
        "of 0 shows "
        "that the method is better than random selection at the same number of tokens; one that holds 0 shows no "
        "difference."
    )
    return finish(name, title, text, figure)


def tasks_plot(collection: Collection) -> Plot:
    """Held-out loss per task of every method, at the largest budget."""
    name, title = "compare-tasks", "Held-out loss per task"
    groups = _evaluated(collection)
    if not groups:
        return Plot(name, title, "No run has been evaluated yet.")
    largest = max((budget for _, budget in groups if budget is not None), default=None)
    shown = {key: runs for key, runs in groups.items() if key[1] in (None, largest)}
    first = next(iter(shown.values()))[0].evaluation["loss"]
    tasks = [task for task, _ in task_rows(first)]
    figure, (axes,) = new_figure(height=1.2 + 0.27 * len(tasks))
    places = np.arange(len(tasks))[::-1].astype(float)
    if collection.base:
        untrained = dict(task_rows(collection.base["loss"]))
        axes.scatter([untrained.get(task, np.nan) for task in tasks], places, s=34, facecolor="white", edgecolor=GREY,
                     linewidth=1.4, label="untrained base")  # fmt: skip
    for index, ((method, budget), runs) in enumerate(shown.items()):
        losses = [dict(task_rows(run.evaluation["loss"])) for run in runs]
        means = [np.mean([loss.get(task, np.nan) for loss in losses]) for task in tasks]
        offset = 0.1 * ((len(shown) - 1) / 2 - index)
        axes.scatter(means, places + offset, s=30, color=method_colour(method), label=group_name(method, budget))
    axes.set_yticks(places, [task_label(task, first) for task in tasks])
    axes.axhline(places[1] - 0.5, color="#b0b0b0", linewidth=0.8)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("held-out loss (nats per response token)")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4)
    text = "Means over seeds, with the number of held-out samples behind each task."
    if largest is not None:
        text += f" Methods with a budget are shown at {100 * largest:g} % of the pool."
    return finish(name, title, text, figure)


def paired_differences(collection: Collection) -> list[tuple[str, float, dict[str, tuple[Interval, list[float]]]]]:
    """(method, budget, {"overall" or "macro": (interval, each seed's difference)}), seeds shared with `random`."""
    groups, rows = _evaluated(collection), []
    for (method, budget), runs in groups.items():
        reference = {run.seed: run for run in groups.get((REFERENCE, budget), [])}
        pairs = [(run, reference[run.seed]) for run in runs if run.seed in reference]
        if method == REFERENCE or budget is None or not pairs:
            continue
        by_kind = {}
        for kind in ("overall", "macro"):
            mine, theirs = ([run.evaluation["loss"][kind] for run in side] for side in zip(*pairs, strict=True))
            by_kind[kind] = (paired_interval(mine, theirs), [a - b for a, b in zip(mine, theirs, strict=True)])
        rows.append((method, budget, by_kind))
    return rows


def _losses_by_budget(axes: Axes, groups: dict[tuple[str, float | None], list[Run]], kind: str) -> None:
    budgets = sorted({budget for _, budget in groups if budget is not None})
    methods = list(dict.fromkeys(method for method, budget in groups if budget is not None))
    for (method, budget), runs in groups.items():
        values = [run.evaluation["loss"][kind] for run in runs]
        interval, colour = mean_interval(values), method_colour(method)
        if budget is None:
            axes.axhline(interval.mean, color=colour, linewidth=1.6, label=method)
            if interval.known:
                axes.axhspan(interval.low, interval.high, color=colour, alpha=0.12, linewidth=0)
            continue
        x = budgets.index(budget) + 0.16 * (methods.index(method) - (len(methods) - 1) / 2)
        axes.scatter(np.full(len(values), x + 0.05), values, s=12, color=colour, alpha=0.4, linewidth=0)
        label = method if budget == min(b for m, b in groups if m == method and b is not None) else None
        error = [[interval.mean - interval.low], [interval.high - interval.mean]] if interval.known else None
        axes.errorbar(x, interval.mean, error, fmt="o", color=colour, markersize=6.5, linewidth=1.8, capsize=3, label=label)
    axes.set_xticks(range(len(budgets)), [f"{100 * budget:g} %" for budget in budgets])
    axes.set_xlim(-0.6, max(len(budgets), 1) - 0.4)
    axes.set_xlabel("budget (share of the pool's tokens)")
    axes.grid(axis="x", visible=False)


def _evaluated(collection: Collection) -> dict[tuple[str, float | None], list[Run]]:
    groups: dict[tuple[str, float | None], list[Any]] = {
        key: [run for run in runs if run.evaluation is not None] for key, runs in collection.groups.items()
    }
    return {key: runs for key, runs in groups.items() if runs}
