"""Times of a round's parts for bench/plan.py, and their plot."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ENOUGH = 5.0
"""Seconds after which a part is not repeated any more."""


def least_ms(call: Callable[[int], object], repeats: int, device: torch.device) -> float:
    """call(round) is given another round each time, for `repeats` or ENOUGH seconds; the first is not counted."""
    seconds: list[float] = []
    for number in range(repeats + 1):
        seconds.append(seconds_of(lambda number=number: call(number), device))
        if number and sum(seconds) > ENOUGH:
            break
    return round(1e3 * min(seconds[1:]), 3)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Of the clock; of the processor where it is one thread of a CPU, so that a machine's other work counts less."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A round's milliseconds against the pool's size, both logarithmic; the first number of tasks and of threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"lead-paper": "#d1495b", "lead-mixture": "#6a4c93", "random": "#30638e", "hkust-lead": "#8d99ae"}
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    first = rows[0]
    for name, color in colors.items():
        wanted = (name, first["tasks"], first["threads"])
        chosen = [r for r in rows if (r["selection"], r["tasks"], r["threads"]) == wanted]
        measured = [(r["samples"], r["round_ms"]) for r in chosen if r["round_ms"]]
        if measured:
            axis.plot(*zip(*measured, strict=True), marker="o", color=color, label=name)
            axis.annotate(
                f"{measured[-1][1]:,.3g}",
                measured[-1],
                textcoords="offset points",
                xytext=(6, -3),
                fontsize=8,
                color=color,
            )
        guessed = [(r["samples"], r["extrapolated_ms"]) for r in chosen if not r["round_ms"]]
        if measured and guessed:
            axis.plot(
                *zip(measured[-1], *guessed, strict=True), marker="o", fillstyle="none", linestyle=":", color=color
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("samples in the pool")
    axis.set_ylabel("ms a round")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
