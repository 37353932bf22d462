"""What a run of the head's benchmark shows: a table for the terminal, a plot for the README."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from head_counts import markdown

FORWARD, BOTH = "forward", "forward+backward"


def table(case: dict[str, Any]) -> str:
    rows = []
    absent: dict[str, list[str]] = {}
    for name, entry in case["entries"].items():
        if "absent" in entry:
            absent.setdefault(entry["absent"], []).append(name)
            continue
        cells = [cell for mode in (FORWARD, BOTH) for cell in _cells(entry.get(mode))]
        rows.append([name, *cells, f"{entry['error']['dW']:.1e}" if "error" in entry else "-"])
    columns = [f"{mode} {what}" for mode in ("fwd", "fwd+bwd") for what in ("ms", "/ products", "/ naive", "MB")]
    missing = [f"Not measured: {', '.join(names)}: {reason}." for reason, names in absent.items()]
    return "\n".join([markdown(["", *columns, "error of dW"], rows), "", *missing])


def _cells(one: dict[str, Any] | None) -> list[str]:
    if one is None:
        return ["-"] * 4
    naive_ratio, memory = one.get("over_naive"), one.get("memory_bytes")
    cells = [f"{one['ms']:.2f}", f"{one['over_products']:.3f}", "-" if naive_ratio is None else f"{naive_ratio:.3f}"]
    return [*cells, "-" if memory is None else f"{memory / 1e6:.0f}"]


SHOWN = 5.0
COLORS = {
    "ours": "#d1495b",
    "naive": "#8d99ae",
    "compiled": "#edae49",
    "torch": "#30638e",
    "torch-chunked": "#6fa8dc",
    "liger": "#3a7d44",
    "liger-fp32": "#8fbc8f",
    "cce": "#6a4c93",
    "cce-exact": "#b39ddb",
    "quack": "#003d5b",
}


def plot(result: dict[str, Any], path: Path) -> None:
    """Forward + backward by dtype (a row each): time over the products, by number of threads, and memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = result["cases"]
    dtypes, threads = (list(dict.fromkeys(case[key] for case in cases)) for key in ("dtype", "threads"))
    columns = sorted(threads) if result["device"] == "cpu" else threads[:1]
    names = [n for n in COLORS if any(BOTH in case["entries"].get(n, {}) for case in cases)]
    size = (5.2 * (len(columns) + 1) if result["device"] == "cpu" else 14.0, 3.4 * len(dtypes) + 0.9)
    figure, axes = plt.subplots(len(dtypes), len(columns) + 1, figsize=size, squeeze=False, layout="constrained")
    for line, dtype in zip(axes, dtypes, strict=True):
        for axis, count in zip(line, columns, strict=False):
            chosen = [case for case in cases if case["dtype"] == dtype and case["threads"] == count]
            _bars(axis, chosen, names, lambda entry: entry["over_products"], "{:.2f}")
            axis.axhline(1.0, color="black", linewidth=1, linestyle=":")
            where = f", {count} thread{'s' * (count > 1)}" if result["device"] == "cpu" else ""
            axis.set_title(f"{dtype}{where}: time / three matrix products", fontsize=10)
        chosen = [case for case in cases if case["dtype"] == dtype and case["threads"] == columns[-1]]
        unit, scale, label = ("MB", 1e6, "{:.0f}") if result["device"] == "cpu" else ("GB", 1e9, "{:.1f}")
        line[-1].set_yscale("log")
        line[-1].minorticks_off()
        _bars(line[-1], chosen, names, lambda entry, scale=scale: (entry["memory_bytes"] or math.nan) / scale, label)
        line[-1].set_title(f"{dtype}: peak memory beyond the inputs, {unit}", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(
    axis: Any, cases: list[dict[str, Any]], names: list[str], value: Callable[[dict[str, Any]], float], label: str
) -> None:
    """A group of bars a case. On a linear scale bars are cut off at SHOWN; their number stands at the cut."""
    width = 0.84 / len(names)
    cut = SHOWN if axis.get_yscale() == "linear" else math.inf
    for place, name in enumerate(names):
        here = [
            (i, value(case["entries"][name][BOTH]))
            for i, case in enumerate(cases)
            if BOTH in case["entries"].get(name, {})
        ]
        at = [i + (place - (len(names) - 1) / 2) * width for i, _ in here]
        bars = axis.bar(at, [min(v, cut) for _, v in here], width, color=COLORS[name], label=name)
        axis.bar_label(
            bars, [label.format(v) for _, v in here], fontsize=6, padding=1, rotation=90 if len(names) > 6 else 0
        )
    axis.set_xticks(
        range(len(cases)), [f"{case['rows']} x {case['hidden']}\nx {case['vocabulary']}" for case in cases], fontsize=8
    )
    axis.tick_params(axis="y", labelsize=8)
    axis.margins(y=0.14)
    axis.spines[["top", "right"]].set_visible(False)
