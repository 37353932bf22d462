"""results.json as tables: compact on the console, complete in results.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lead_engine.base import console
from lead_engine.study.contrasts import MEASURES, bracket, signed
from lead_engine.study.results import summing_up

Table = list[dict[str, str]]
"""Rows by column name; every row has the same columns."""
NONE = "-"
SHOWN_WARNINGS = 6
"""On the console; results.md has all of them."""


def group_rows(results: dict[str, Any], *, compact: bool) -> Table:
    """A row per variant and budget, the untrained base first. results: the contents of results.json.

    Compact: losses without intervals, and fewer columns of costs.
    """
    reference = results["reference"]
    differences = {
        (each["a"], each["budgets"][0]): each
        for each in results["comparisons"]
        if each["b"] == reference and not each["pooled"]
    }
    rows = [_base_row(results["base"])] if results["base"] else []
    for group in results["groups"]:
        rows.append(_group_row(group, differences.get((group["variant"], group["budget"])), reference))
    dropped = set()
    if not any(group["whole"] for group in results["groups"]):  # nothing was generated
        dropped.add("exact match")
    if reference is None:
        dropped.add("difference to None")
    if compact:
        dropped |= {"tokens trained", "answer tokens", "samples", "training"}
        for row in rows:
            row |= {title: row[title].partition(" ")[0] for title in MEASURES.values()}  # without the interval
    return [{name: cell for name, cell in row.items() if name not in dropped} for row in _same_columns(rows)]


def comparison_rows(comparisons: Sequence[dict[str, Any]], *, compact: bool) -> Table:
    """A row per comparison: difference, interval (unless compact) and verdict in every measure."""
    rows = []
    for each in comparisons:
        budgets = ", ".join(f"{100 * budget:g} %" for budget in each["budgets"])
        row = {"a": each["a"], "b": each["b"], "budget": budgets}
        for measure, title in MEASURES.items():
            interval = "" if compact else f" {bracket(each[measure])}"
            row[title] = f"{signed(each[measure]['mean'])}{interval} {each['verdicts'][measure]}"
        rows.append(row | {"seeds": str(len(each["seeds"]))})
    return rows


def show(results: dict[str, Any]) -> None:
    """Print the losses, one line for every two variants compared, and the first warnings."""
    _print("Held-out loss (nats per response token), means over seeds", group_rows(results, compact=True))
    _print(
        "Difference in loss, a minus b, mean over budgets",
        comparison_rows(summing_up(results["comparisons"]), compact=True),
    )
    for warning in results["warnings"][:SHOWN_WARNINGS]:
        console.say(f"warning: {warning}")
    if len(results["warnings"]) > SHOWN_WARNINGS:
        console.say(f"and {len(results['warnings']) - SHOWN_WARNINGS} more warnings in results.md")


def markdown(results: dict[str, Any]) -> str:
    """The text of results.md: the tables, how to read them, and the verdicts."""
    study = results["study"]
    heldout = "`, `".join(study["heldout"])
    seeds = ", ".join(map(str, study["seeds"]))
    lines = [
        "# Comparison of selection methods",
        "",
        f"Pool `{study['pool']}`, model `{study['model']}`, held-out `{heldout}`, seeds {seeds}.",
        "",
        *_markdown_table(group_rows(results, compact=False)),
        "",
        "Losses are nats per response token on the held-out samples: *overall* over all tokens, *macro* the mean over "
        "tasks, *mean over samples* the mean of the samples' mean losses. Brackets are 95 % intervals of the mean over "
        "seeds (Student's t); the difference is in overall loss, paired by seed, at the same budget. Exact match is "
        "whole answer / final answer. Time is that of the run; of it, selection is planning and learning from what was "
        "trained, scoring the passes over the pool inside the run.",
    ]
    if results["comparisons"]:
        lines += ["", "## Differences", "", *_differences(results)]
    if results["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {line}" for line in results["warnings"])]
    return "\n".join(lines) + "\n"


def _differences(results: dict[str, Any]) -> list[str]:
    """The section on comparisons: a table, how to read it, the verdicts, and the intervals over samples."""
    comparisons = results["comparisons"]
    num_intervals = len(comparisons) * len(MEASURES)
    by_chance = num_intervals / 20  # of 95 % intervals, one in twenty
    lines = [
        *_markdown_table(comparison_rows(comparisons, compact=False)),
        "",
        "Loss of a minus loss of b, below 0 where a is better: mean over seeds of the difference within each seed, and "
        "its 95 % interval; over several budgets, the mean over them within each seed. The interval decides: *better* "
        f"or *worse* where it leaves out 0. There are {num_intervals} intervals here, of which about {by_chance:.0f} "
        "would leave out 0 by chance if nothing differed.",
        "",
        *(f"- {line}" for line in results["verdicts"]),
    ]
    lines_over_samples = []
    for each in comparisons:
        interval = each["over_samples"]
        if interval:
            pair = f"{each['a']} against {each['b']}, {100 * each['budgets'][0]:g} %"
            lines_over_samples.append(f"- {pair}: {signed(interval['mean'])} {bracket(interval)}")
    if lines_over_samples:
        lines += [
            "",
            "Difference in overall loss with the trained models taken as given, 95 % over the choice of held-out "
            "samples (paired bootstrap within tasks, losses averaged over seeds):",
            "",
            *lines_over_samples,
        ]
    return lines


def _base_row(base: dict[str, Any]) -> dict[str, str]:
    losses = {"overall": base["loss"]["overall"], "macro": base["loss"]["macro"], "per_sample": base["per_sample"]}
    match = base["exact_match"]
    shares = [_share(match["overall"][kind]) if match else NONE for kind in ("whole", "final")]
    return {
        "variant": "untrained",
        "tokens trained": "0",
        "answer tokens": "0",
        "samples": "0",
        **{MEASURES[measure]: _number(loss) for measure, loss in losses.items()},
        "exact match": " / ".join(shares),
    }


def _group_row(group: dict[str, Any], difference: dict[str, Any] | None, reference: str | None) -> dict[str, str]:
    share = group["epochs"] if group["budget"] is None else group["budget"]
    overall = difference["overall"] if difference else None
    return {
        "variant": group["variant"],
        "budget": f"{100 * share:g} %",
        "tokens trained": _count(group["tokens_trained"]),
        "answer tokens": _count(group["response_tokens_trained"]),
        "samples": _count(group["samples_trained"]),
        **{title: _interval(group[measure]) for measure, title in MEASURES.items()},
        f"difference to {reference}": f"{signed(overall['mean'])} {bracket(overall)}" if overall else NONE,
        "exact match": " / ".join(_share(group[kind]) for kind in ("whole", "final")),
        "time": _time(group["seconds"]),
        "training": _time(group["training_seconds"]),
        "selection": _time(group["selection_seconds"]),
        "scoring": _time(group["scoring_seconds"]),
    }


def _same_columns(rows: Table) -> Table:
    """Give every row the columns of the fullest one, in its order, with "-" where a row has none."""
    fullest = max(rows, key=len)
    return [{name: row.get(name, NONE) for name in fullest} for row in rows]


def _print(title: str, rows: Table) -> None:
    if rows:
        console.table(title, list(rows[0]), [list(row.values()) for row in rows])


def _markdown_table(rows: Table) -> list[str]:
    columns = list(rows[0])
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row.values()) + " |" for row in rows),
    ]


def _number(value: float) -> str:
    return f"{value:.4f}"


def _interval(interval: dict[str, Any]) -> str:
    bounds = "" if interval["low"] is None else f" [{interval['low']:.4f}, {interval['high']:.4f}]"
    return _number(interval["mean"]) + bounds


def _share(share: dict[str, Any] | None) -> str:
    return NONE if share is None or share["mean"] is None else f"{100 * share['mean']:.1f} %"


def _count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
