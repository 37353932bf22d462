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
"""Most tasks or clusters in a plot."""
MOST_POINTS = 8000
"""From more points on, a plot shows their density."""


def bandit_plot(run: Run) -> Plot:
    """The clusters' probabilities and the rewards, round by round."""
    name, title = "bandit", "Cluster probabilities and rewards"
    arms = len(run.rounds[0]["probabilities"]) if run.rounds else 0
    if arms < 2:
        return Plot(
            name, title, f"There is none: {run.method} draws from the whole pool; no bandit chooses between clusters."
        )
    mixture = run.rounds[0]["cluster"] is None
    figure, (shares, reward) = new_figure(2, 1, height=5.4, sharex=True, height_ratios=(1.4, 1))
    _cluster_shares(shares, run, arms)
    shares.set_ylabel("share of the round" if mixture else "probability of the draw")
    handles, labels = shares.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], title="cluster\n(0 easiest)", loc="outside right upper")
    _rewards(reward, run, arms, mixture)
    if mixture:
        above = "each difficulty cluster's share of a round's samples"
        below = "what all of them earned together"
    else:
        above = "with which probability each difficulty cluster is drawn"
        below = "what the cluster drawn (its colour) earned"
    text = (
        f"Above: {above}. Below: {below}, the mean over the round's samples of their utility before minus after. "
        "Clusters that are used up have probability 0."
    )
    return finish(name, title, text, figure)


def _round_numbers(run: Run) -> NDArray[Any]:
    """From 1 on."""
    return np.array([line["round"] + 1 for line in run.rounds])


def _cluster_shares(axes: Axes, run: Run, arms: int) -> None:
    """The clusters' probabilities, one above the other, as steps from round to round."""
    rounds = _round_numbers(run)
    probabilities = np.array([line["probabilities"] for line in run.rounds], dtype=np.float64)
    edges = np.concatenate([rounds - 0.5, [rounds[-1] + 0.5]])
    low = np.zeros(len(rounds))
    for arm, colour in enumerate(ordered_colours(arms)):
        high = low + probabilities[:, arm]
        # step="post" holds a value until the next edge, so the last one is given twice.
        axes.fill_between(
            edges,
            np.append(low, low[-1]),
            np.append(high, high[-1]),
            step="post",
            facecolor=colour,
            edgecolor="white",
            linewidth=0.3,
            label=f"{arm}",
        )
        low = high
    axes.set_ylim(0, 1)
    axes.set_xlim(edges[0], edges[-1])
    axes.grid(visible=False)


def _rewards(axes: Axes, run: Run, arms: int, mixture: bool) -> None:
    """Each round's reward in the colour of the cluster drawn; grey where a round mixes clusters."""
    rounds = _round_numbers(run)
    rewards = np.array([line["reward_raw"] for line in run.rounds], dtype=np.float64)
    colours = ordered_colours(arms)
    of_round = [GREY if mixture else colours[line["cluster"]] for line in run.rounds]
    width, size = max(0.6, min(3, 260 / len(rounds))), max(4, min(30, 2400 / len(rounds)))
    axes.axhline(0, color=GREY, linewidth=1)
    axes.vlines(rounds, 0, rewards, color=of_round, linewidth=width)
    axes.scatter(rounds, rewards, color=of_round, s=size, edgecolor=GREY, linewidth=0.4, zorder=3)
    axes.set_ylabel("reward: mean drop\nof utility (nats)")
    axes.set_xlabel("round")
    whole_numbers(axes)


def selected_plot(run: Run) -> Plot:
    """Shares of tasks and clusters among the samples trained, against their shares of the pool."""
    name, title = "selected", "What was selected"
    if not run.rounds:
        return Plot(name, title, "No round has been logged yet.")
    tasks: dict[str, float] = {}
    for line in run.rounds:
        for task, count in line["samples_per_task"].items():
            tasks[task] = tasks.get(task, 0) + count
    clusters = np.array([line["samples_per_cluster"] for line in run.rounds], dtype=np.float64).sum(axis=0)
    in_pool = _pool_shares(run, list(tasks), len(clusters))
    of_tasks, of_clusters = in_pool if in_pool else (None, None)
    longest = min(MOST_ROWS, max(len(tasks), len(clusters)))
    figure, (left, right) = new_figure(1, 2, height=1.3 + 0.24 * longest, width_ratios=(1.5, 1))
    counts = np.array(list(tasks.values()), dtype=np.float64)
    shares = 100 * counts / max(1, counts.sum())
    by_size = np.argsort(-(shares if of_tasks is None else of_tasks), kind="stable")[:MOST_ROWS]
    _dumbbells(left, [short(task, 24) for task in tasks], shares, of_tasks, by_size, run.method)
    left.set_title("tasks")
    left.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    shares = 100 * clusters / max(1, clusters.sum())
    in_order = np.arange(len(clusters))[:MOST_ROWS]
    _dumbbells(right, [str(k) for k in range(len(clusters))], shares, of_clusters, in_order, run.method)
    right.set_title("difficulty clusters (0 easiest)")
    text = "Shares of the samples trained, every visit counted."
    if in_pool:
        text += " Hollow: their shares of the pool."
    else:
        text += " The run is not finished, so the pool's shares are not known."
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
    num_bins = min(60, max(8, int(trained.size**0.5)))
    bins = np.histogram_bin_edges(np.concatenate([initial, final]), bins=num_bins).tolist()
    spread.hist(initial, bins, color=BEFORE, alpha=0.35, label="before")
    spread.hist(final, bins, histtype="step", color=AFTER, linewidth=1.8, label="after")
    spread.set_xlabel("utility U (nats per response token)")
    spread.set_ylabel("trained samples")
    spread.legend()
    _before_after(change, initial, final)
    _visits(counts, visits[trained])
    text = (
        f"The {trained.size:,} different samples that were trained, {100 * trained.size / visits.size:.1f} % of the "
        f"pool's {visits.size:,}. Utility starts as the base model's loss and is updated whenever a sample is trained; "
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
    order: NDArray[np.int64],
    method: str,
) -> None:
    """A row for each entry of `order`: its share of the samples trained and, if known, of the pool, in percent."""
    ys = np.arange(len(order))[::-1]
    if pool is not None:
        axes.hlines(ys, pool[order], shares[order], color="#d5d5d5", linewidth=2, zorder=1)
        axes.scatter(pool[order], ys, s=36, facecolor="white", edgecolor=GREY, linewidth=1.4, label="pool", zorder=2)
    axes.scatter(shares[order], ys, s=40, color=method_colour(method), label=f"trained by {method}", zorder=3)
    axes.set_yticks(ys, [labels[i] for i in order])
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
    clusters_of_samples = run.utility["cluster"]
    dropped = run.utility.get("dropped")  # runs of an older version lack it
    if dropped is not None and not (run.utility["visits"][dropped] > 0).any():
        # Misaligned samples that are never trained belong to no cluster, whatever their entry says.
        clusters_of_samples = clusters_of_samples[~dropped]
    by_cluster = np.bincount(clusters_of_samples, minlength=clusters)
    of_task = dict(zip(run.task_names, by_task, strict=True))
    counts = np.array([of_task.get(task, 0) for task in tasks], dtype=np.float64)
    return 100 * counts / by_task.sum(), 100 * by_cluster / by_cluster.sum()
