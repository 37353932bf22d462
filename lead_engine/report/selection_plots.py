"""Plots of what one run selected: the bandit, shares of tasks and clusters, utilities before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from lead_engine.report.runs import Run
from lead_engine.report.style import (
    AFTER,
    BEFORE,
    GREY,
    Plot,
    finish,
    method_colour,
    new_figure,
    ordered_colours,
    short,
    whole_numbers,
)

MOST_ROWS = 30
MOST_POINTS = 8000


def bandit_plot(run: Run) -> Plot:
    """The clusters' probabilities and the rewards, round by round."""
    name, title = "bandit", "Cluster probabilities and rewards"
    arms = len(run.rounds[0]["probabilities"]) if run.rounds else 0
    if arms < 2:
        return Plot(
            name, title, f"There is none: {run.method} draws from the whole pool, no bandit chooses between clusters."
        )
    rounds = np.array([line["round"] for line in run.rounds]) + 1
    probabilities = np.array([line["probabilities"] for line in run.rounds], dtype=np.float64)
    rewards = np.array([line["reward_raw"] for line in run.rounds], dtype=np.float64)
    colours = ordered_colours(arms)
    mixture = run.rounds[0]["cluster"] is None
    of_round = [GREY if mixture else colours[line["cluster"]] for line in run.rounds]
    figure, (shares, reward) = new_figure(2, 1, height=5.4, sharex=True, height_ratios=(1.4, 1))
    edges = np.concatenate([rounds - 0.5, [rounds[-1] + 0.5]])
    below = np.zeros(len(rounds))
    for arm in range(arms):
        above = below + probabilities[:, arm]
        shares.fill_between(
            edges,
            np.append(below, below[-1]),
            np.append(above, above[-1]),
            step="post",
            facecolor=colours[arm],
            edgecolor="white",
            linewidth=0.3,
            label=f"{arm}",
        )
        below = above
    shares.set_ylim(0, 1)
    shares.grid(visible=False)
    shares.set_ylabel("share of the round" if mixture else "probability of the draw")
    handles, labels = shares.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], title="cluster\n(0 easiest)", loc="outside right upper")
    reward.axhline(0, color=GREY, linewidth=1)
    reward.vlines(rounds, 0, rewards, color=of_round, linewidth=max(0.6, min(3, 260 / len(rounds))))
    reward.scatter(
        rounds, rewards, color=of_round, s=max(4, min(30, 2400 / len(rounds))), edgecolor=GREY, linewidth=0.4, zorder=3
    )
    reward.set_ylabel("reward: mean fall\nof utility (nats)")
    reward.set_xlabel("round")
    reward.set_xlim(edges[0], edges[-1])
    whole_numbers(reward)
    above, below = (
        "with which probability each difficulty cluster is drawn",
        "what the cluster drawn (its colour) earned",
    )
    if mixture:
        above, below = "each difficulty cluster's share of a round's samples", "what all of them earned together"
    text = (
        f"Above: {above}. Below: {below}, the mean over the round's samples of their utility before minus after. "
        "Clusters that are used up have probability 0."
    )
    return finish(name, title, text, figure)


def selected_plot(run: Run) -> Plot:
    """Shares of tasks and clusters among the samples trained, against their shares of the pool."""
    name, title = "selected", "What was selected"
    if not run.rounds:
        return Plot(name, title, "No round has been logged yet.")
    tasks: dict[str, float] = {}
    for line in run.rounds:
        for task, count in line["samples_per_task"].items():
            tasks[task] = tasks.get(task, 0) + count
    clusters = np.sum([line["samples_per_cluster"] for line in run.rounds], axis=0, dtype=np.float64)
    in_pool = _pool_shares(run, list(tasks), len(clusters))
    panels = [
        (
            "tasks",
            [short(task, 24) for task in tasks],
            np.array(list(tasks.values()), dtype=np.float64),
            in_pool and in_pool[0],
        ),
        ("difficulty clusters (0 easiest)", [str(k) for k in range(len(clusters))], clusters, in_pool and in_pool[1]),
    ]
    longest = min(MOST_ROWS, max(len(tasks), len(clusters)))
    figure, axes = new_figure(1, 2, height=1.3 + 0.24 * longest, width_ratios=(1.5, 1))
    for index, (where, (heading, labels, counts, pool)) in enumerate(zip(axes, panels, strict=True)):
        by_size = index == 0
        _dumbbells(
            where, labels, 100 * counts / max(1, counts.sum()), pool, by_size, method_colour(run.method), run.method
        )
        where.set_title(heading)
    axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    text = "Shares of the samples trained, every visit counted."
    text += (
        " Hollow: their shares of the pool."
        if in_pool
        else " The run is not finished, so the pool's shares are not known."
    )
    if len(tasks) > MOST_ROWS:
        text += f" The {MOST_ROWS} largest of {len(tasks)} tasks are shown."
    return finish(name, title, text, figure)


def utility_plot(run: Run) -> Plot:
    """U before and after training, and how often samples were visited."""
    name, title = "utility", "Utility before and after, and visits"
    if run.utility is None:
        return Plot(name, title, "The run is not finished; utilities are written at its end.")
    visits = run.utility["visits"]
    trained = np.flatnonzero(visits > 0)
    if trained.size == 0:
        return Plot(name, title, "No sample was trained.")
    initial, final = run.utility["initial"][trained], run.utility["final"][trained]
    known = np.isfinite(initial) & np.isfinite(final)
    initial, final = initial[known], final[known]
    figure, (spread, change, counts) = new_figure(1, 3, height=3.4, width_ratios=(1.3, 1.2, 0.8))
    bins = np.histogram_bin_edges(np.concatenate([initial, final]), bins=min(60, max(8, int(trained.size**0.5))))
    spread.hist(initial, bins, color=BEFORE, alpha=0.35, label="before")
    spread.hist(final, bins, histtype="step", color=AFTER, linewidth=1.8, label="after")
    spread.set_xlabel("utility U (nats per response token)")
    spread.set_ylabel("trained samples")
    spread.legend()
    _before_after(change, initial, final)
    _visits(counts, visits[trained])
    text = (
        f"The {trained.size:,} different samples that were trained, {100 * trained.size / visits.size:.1f} % of "
        f"the pool's "
        f"{visits.size:,}. Utility starts as the base model's loss and is updated whenever a sample is trained; "
        f"it fell for {100 * np.mean(final < initial):.0f} % of them, on average from {initial.mean():.2f} to "
        f"{final.mean():.2f}."
    )
    return finish(name, title, text, figure)


def _before_after(axes: Axes, initial: NDArray[Any], final: NDArray[Any]) -> None:
    low, high = float(min(initial.min(), final.min())), float(max(initial.max(), final.max()))
    if len(initial) > MOST_POINTS:
        cells = axes.hexbin(initial, final, gridsize=45, bins="log", cmap="Blues", mincnt=1, linewidths=0.1)
        axes.figure.colorbar(cells, ax=axes, label="samples")
    else:
        size, alpha = (12, 0.6) if len(initial) < 500 else (6, 0.35)
        axes.scatter(initial, final, s=size, color=AFTER, alpha=alpha, linewidth=0)
    axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--")
    axes.set_xlabel("U before")
    axes.set_ylabel("U after")


def _visits(axes: Axes, visits: NDArray[Any]) -> None:
    numbers, counts = np.unique(visits, return_counts=True)
    axes.bar(numbers, counts, color=AFTER, width=0.7)
    axes.set_xlabel("visits")
    axes.set_ylabel("samples")
    axes.grid(axis="x", visible=False)
    whole_numbers(axes)


def _dumbbells(
    axes: Axes,
    labels: Sequence[str],
    shares: NDArray[Any],
    pool: NDArray[Any] | None,
    by_size: bool,
    colour: str,
    method: str,
) -> None:
    order = np.argsort(-(shares if pool is None else pool), kind="stable") if by_size else np.arange(len(labels))
    order = order[:MOST_ROWS]
    places = np.arange(len(order))[::-1]
    if pool is not None:
        axes.hlines(places, pool[order], shares[order], color="#d5d5d5", linewidth=2, zorder=1)
        axes.scatter(
            pool[order], places, s=36, facecolor="white", edgecolor=GREY, linewidth=1.4, label="pool", zorder=2
        )
    axes.scatter(shares[order], places, s=40, color=colour, label=f"trained by {method}", zorder=3)
    axes.set_yticks(places, [labels[i] for i in order])
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.set_xlim(left=0)
    axes.margins(x=0.08)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of samples (%)")


def _pool_shares(run: Run, tasks: list[str], clusters: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Percentages of the pool's samples by task (in the order of `tasks`) and by cluster."""
    if run.utility is None or run.task_names is None:
        return None
    by_task = np.bincount(run.utility["task"], minlength=len(run.task_names))
    # Where misaligned samples are never trained they belong to no cluster, whatever their entry says.
    dropped = run.utility["dropped"] if "dropped" in run.utility else np.zeros(len(run.utility["cluster"]), dtype=bool)
    kept = slice(None) if (run.utility["visits"][dropped] > 0).any() else ~dropped
    by_cluster = np.bincount(run.utility["cluster"][kept], minlength=clusters)
    of_task = dict(zip(run.task_names, by_task, strict=True))
    counts = np.array([of_task.get(task, 0) for task in tasks], dtype=np.float64)
    return 100 * counts / by_task.sum(), 100 * by_cluster / by_cluster.sum()
