"""Held-out loss measured while a run trained: overall and macro, and each task in a small plot of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lead_engine.report.runs import Run
from lead_engine.report.style import GREY, WIDTH, Plot, finish, method_colour, short, tokens_axis

TASKS = 12
"""At most so many tasks have a small plot: those with the most response tokens."""
COLUMNS = 4


def heldout_curve(run: Run) -> Plot:
    """Held-out loss against tokens trained; the lowest is marked."""
    losses = [line["loss"] for line in run.heldout]
    tokens = np.array([line["tokens"] for line in run.heldout], dtype=np.float64)
    sizes = losses[-1]["tasks"]
    tasks = sorted(sizes, key=lambda name: -sizes[name]["tokens"])[:TASKS] if len(sizes) > 1 else []
    rows = -(-len(tasks) // COLUMNS)
    figure = Figure(figsize=(WIDTH, 3.2 + 1.5 * rows))
    grid = figure.add_gridspec(rows + 1, COLUMNS, height_ratios=[2.6] + [1.2] * rows)
    colour = method_colour(run.method)

    axes = figure.add_subplot(grid[0, :])
    overall = _values([loss["overall"] for loss in losses])
    macro = _values([loss["macro"] for loss in losses])
    axes.plot(tokens, macro, color=GREY, marker="o", markersize=3, linewidth=1.2, label="macro")
    axes.plot(tokens, overall, color=colour, marker="o", markersize=4, linewidth=2, label="overall")
    text = "Mean loss over the response tokens of --eval-data, before training, at rounds' ends and at the end."
    if np.isfinite(overall).any():
        best = int(np.nanargmin(overall))
        axes.plot(tokens[best], overall[best], "o", markersize=10, fillstyle="none", color=colour, label="lowest")
        text += f" Lowest overall: {overall[best]:.4f} after step {run.heldout[best]['step']:,}."
    axes.set_ylabel("held-out loss (nats per token)")
    tokens_axis(axes)
    axes.legend(loc="upper right", ncols=3)

    for index, name in enumerate(tasks):
        small = figure.add_subplot(grid[1 + index // COLUMNS, index % COLUMNS])
        _small(small, name, tokens, _values([loss["tasks"][name]["loss"] for loss in losses]), colour)
    if len(tasks) < len(sizes) > 1:
        text += f" Of {len(sizes)} tasks, the {len(tasks)} with the most tokens have a plot."
    return finish("heldout-curve", "Held-out loss while it trained", text, figure)


def _small(axes: Axes, name: str, tokens: NDArray[np.float64], values: NDArray[np.float64], colour: str) -> None:
    axes.plot(tokens, values, color=colour, marker="o", markersize=2, linewidth=1.2)
    axes.set_title(short(name, 24), fontsize=8.5)
    axes.tick_params(labelsize=7.5)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_locator(MaxNLocator(3))
    tokens_axis(axes, "")


def _values(losses: Sequence[float | None]) -> NDArray[np.float64]:
    """One number an evaluation; nan for None, which stands for a loss that was not finite."""
    return np.array([np.nan if loss is None else loss for loss in losses], dtype=np.float64)
