"""A study's result as a table: on the console and as Markdown."""

from __future__ import annotations

from typing import Any

from lead_engine import console
from lead_engine.evaluation.results import bracket, signed

EXACT = "exact match"
COLUMNS = ("variant", "budget", "tokens trained", "overall loss", "macro loss", "difference to random", EXACT, "time")


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """A row per method and budget, the untrained base first; losses as mean and 95 % interval over seeds."""
    rows, epochs = [], results["study"]["epochs"]
    if results["base"]:
        loss, match = results["base"]["loss"], results["base"]["exact_match"]
        shares = [_share(match["overall"][kind]) for kind in ("whole", "final")] if match else ["-", "-"]
        losses = [_number(loss[kind]) for kind in ("overall", "macro")]
        rows.append(["untrained", "-", "0", *losses, "-", " / ".join(shares), "-"])
    for group in results["groups"]:
        difference = group["difference"]
        rows.append(
            [
                group["variant"],
                f"{100 * (epochs if group['budget'] is None else group['budget']):g} %",
                f"{group['tokens_trained']:,.0f}",
                _interval(group["overall"]),
                _interval(group["macro"]),
                f"{signed(difference['overall']['mean'])} {bracket(difference['overall'])}" if difference else "-",
                " / ".join(_share(group[kind]) for kind in ("whole", "final")),
                _time(group["seconds"]),
            ]
        )
    if not any(group["whole"] for group in results["groups"]):  # nothing was generated
        rows = [[*row[:6], row[7]] for row in rows]
    return rows


def columns_of(rows: list[list[str]]) -> list[str]:
    """The columns' names; without exact match where the rows have none."""
    return [name for name in COLUMNS if name != EXACT or len(rows[0]) == len(COLUMNS)]


def show(results: dict[str, Any]) -> None:
    """Print the table and the verdicts."""
    rows = table_rows(results)
    console.table("Held-out loss (nats per response token), mean over seeds and 95 % interval", columns_of(rows), rows)
    for line in (*results["verdicts"], *(f"warning: {warning}" for warning in results["warnings"])):
        console.say(line)


def markdown(results: dict[str, Any]) -> str:
    """results.md: the table, how to read it, and the verdicts."""
    rows = table_rows(results)
    columns = columns_of(rows)
    study = results["study"]
    lines = [
        "# Comparison of selection methods",
        "",
        f"Pool `{study['pool']}`, model `{study['model']}`, held-out `{'`, `'.join(study['heldout'])}`, seeds "
        f"{', '.join(map(str, study['seeds']))}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(f"- {line}" for line in (*results["verdicts"], *results["warnings"])),
        "",
        "Losses are nats per response token on the held-out samples: *overall* over all tokens, *macro* the mean over "
        "tasks. Brackets are 95 % intervals of the mean over seeds (Student's t); the difference to `random` is in "
        "overall loss, paired by seed, at the same budget. Exact match is whole answer / final answer. Time is "
        "training alone.",
    ]
    over_samples = [
        f"- {group['variant']}, {100 * group['budget']:g} %: {signed(group['difference']['over_samples']['mean'])} "
        f"{bracket(group['difference']['over_samples'])}"
        for group in results["groups"]
        if group["difference"]
    ]
    if over_samples:
        lines += [
            "",
            "Difference to `random` with the trained models taken as given, 95 % over the choice of held-out samples "
            "(paired bootstrap within tasks, losses averaged over seeds):",
            "",
            *over_samples,
        ]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:.4f}"


def _interval(interval: dict[str, Any]) -> str:
    bounds = "" if interval["low"] is None else f" [{interval['low']:.4f}, {interval['high']:.4f}]"
    return _number(interval["mean"]) + bounds


def _share(share: dict[str, Any] | None) -> str:
    return "-" if share is None or share["mean"] is None else f"{100 * share['mean']:.1f} %"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
