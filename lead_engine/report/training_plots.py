"""Plots of how one run trained: loss, learning rate, gradient norm, held-out loss per task."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lead_engine.report.runs import Run
from lead_engine.report.style import GREY, HOLLOW, INK, Plot, finish, method_colour, new_figure, short, tokens_axis


def loss_plot(run: Run) -> Plot:
    """Training loss against tokens trained, raw and smoothed."""
    name, title = "loss", "Training loss"
    if not run.metrics:
        return Plot(name, title, "No optimizer step has been logged yet.")
    tokens, loss = run.metric("tokens"), run.metric("loss")
    figure, (axes,) = new_figure()
    colour = method_colour(run.method)
    axes.plot(tokens, loss, color=colour, alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(tokens, run.smooth_loss, color=colour, linewidth=2, label="smoothed")
    axes.set_ylabel("loss (nats per response token)")
    tokens_axis(axes)
    axes.legend(loc="upper right")
    text = "Loss on the samples of each step, before the step."
    if run.method == "lead":
        text += (
            " LEAD chooses the samples that the model finds hard, so this curve lies above that of a run on random "
            "samples and falls less; the held-out loss is what tells the methods apart."
        )
    return finish(name, title, text, figure)


def optimizer_plot(run: Run) -> Plot:
    """Learning rate and gradient norm."""
    name, title = "optimizer", "Learning rate and gradient norm"
    if not run.metrics:
        return Plot(name, title, "No optimizer step has been logged yet.")
    tokens, norm = run.metric("tokens"), run.metric("grad_norm")
    figure, (rate, gradient) = new_figure(1, 2, height=2.9)
    colour = method_colour(run.method)
    rate.plot(tokens, run.metric("lr"), color=colour, linewidth=2)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    gradient.plot(tokens, norm, color=colour, alpha=0.6, linewidth=0.8)
    limit = run.config.get("optimizer", {}).get("max_grad_norm")
    text = "The learning rate follows the tokens trained."
    if np.nanmax(norm) > 20 * np.nanmedian(norm) > 0:
        gradient.set_yscale("log")
    else:
        gradient.set_ylim(bottom=0)
    if limit:
        _mark_limit(gradient, limit)
        text += f" Gradients were clipped to a norm of {limit:g} in {100 * np.mean(norm > limit):.0f} % of the steps."
    gradient.set_ylabel("gradient norm before clipping")
    for axes in (rate, gradient):
        tokens_axis(axes)
    return finish(name, title, text, figure)


def _mark_limit(axes: Axes, limit: float) -> None:
    axes.axhline(limit, color=GREY, linestyle="--", linewidth=1)
    axes.annotate(
        "clipped above",
        (1, limit),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=INK,
        fontsize=8.5,
        bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
    )


def heldout_plot(run: Run, base: dict[str, Any] | None) -> Plot:
    """Held-out loss per task, beside the untrained base where its evaluation is known."""
    name, title = "heldout", "Held-out loss per task"
    if run.evaluation is None:
        way = f"lead-engine eval --model {run.folder} --data FILE"
        return Plot(name, title, f"This run has not been evaluated; do it with {way}.")
    loss = run.evaluation["loss"]
    rows = task_rows(loss)
    untrained = dict(task_rows(base["loss"])) if base else {}
    figure, (axes,) = new_figure(height=1.1 + 0.24 * len(rows))
    ys = np.arange(len(rows))[::-1]
    values = [value for _, value in rows]
    if untrained:
        known = [untrained.get(task, np.nan) for task, _ in rows]
        axes.hlines(ys, values, known, color="#d5d5d5", linewidth=2, zorder=1)
        axes.scatter(known, ys, s=36, label="untrained base", zorder=2, **HOLLOW)
    axes.scatter(values, ys, s=40, color=method_colour(run.method), label=run.method, zorder=3)
    axes.set_yticks(ys, [task_label(task, loss) for task, _ in rows])
    axes.grid(axis="y", visible=False)
    axes.axhline(ys[1] - 0.5, color="#b0b0b0", linewidth=0.8)
    axes.set_xlabel("held-out loss (nats per response token)")
    if untrained:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    text = (
        "Mean loss over the response tokens of samples that no run trains on, with the number of samples behind each "
        "task. Overall weighs every token alike, macro every task."
    )
    return finish(name, title, text, figure)


def task_rows(loss: dict[str, Any]) -> list[tuple[str, float]]:
    """[("overall", ...), ("macro", ...), (task, ...) by descending loss]."""
    tasks = sorted(((task, float(values["loss"])) for task, values in loss["tasks"].items()), key=lambda row: -row[1])
    return [("overall", float(loss["overall"])), ("macro", float(loss["macro"])), *tasks]


def task_label(task: str, loss: dict[str, Any]) -> str:
    """The task with its number of samples."""
    return f"{short(task)} ({loss['tasks'][task]['samples']:,})" if task in loss["tasks"] else task
