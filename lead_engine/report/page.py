"""One HTML page that needs no other file: pictures are embedded, and nothing is fetched."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from lead_engine.base.console import format_cell
from lead_engine.report.runs import Collection, Run
from lead_engine.report.style import Plot

STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #5c6670; --line: #d9dde2; --ground: #fff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe3e8; --soft: #9aa4af; --line: #3a4149; --ground: #16191d; --card: #20252b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; color: var(--ink); background: var(--ground);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .25rem; }
p { margin: .35rem 0 .75rem; max-width: 48rem; } .soft { color: var(--soft); }
.verdict { border-left: 4px solid #0072b2; background: var(--card); padding: .6rem .9rem; margin: .5rem 0;
           max-width: none; }
.warning { border-left-color: #e69f00; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0 1rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { font-weight: 600; } td.number, th.number { text-align: right; }
figure { margin: .5rem 0 1rem; }
img { max-width: 100%; height: auto; display: block; background: #fff; border: 1px solid var(--line);
      border-radius: 6px; padding: .5rem; }
details { border: 1px solid var(--line); border-radius: 6px; padding: .25rem 1rem; margin: .75rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .4rem 0; }
"""


def page(collection: Collection, compared: Sequence[Plot], single: Sequence[tuple[Run, Sequence[Plot]]]) -> str:
    """The whole page. compared: plots of all runs together. single: runs with plots of their own."""
    title = "Training report"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        f'<p class="soft">{_count(len(collection.runs), "run")}. Losses are nats per response token.</p>',
        *(f'<p class="verdict">{escape(text)}</p>' for text in collection.verdicts),
        *(f'<p class="verdict warning">{escape(text)}</p>' for text in collection.warnings),
        "<h2>Runs</h2>",
        runs_table(collection),
    ]
    if compared:
        parts += ["<h2>Methods compared</h2>", *map(plot_html, compared)]
    only = len(single) == 1
    parts.append(f"<h2>{'The run' if only else 'Each run'}</h2>")
    if len(single) < len(collection.runs):
        told = f"{len(single)} of {len(collection.runs)} runs are drawn here; lead-engine report RUN draws any other."
        parts.append(f'<p class="soft">{told}</p>')
    for run, plots in single:
        inside = options_table(run) + "".join(map(plot_html, plots))
        shown = " open" if only else ""
        parts.append(f"<details{shown}><summary>{escape(run.name)}</summary>{inside}</details>")
    return "\n".join([*parts, "</body></html>", ""])


def plot_html(plot: Plot) -> str:
    """Title, picture and words; without a picture, the sentence that says why."""
    if plot.png is None:
        return f'<h3>{escape(plot.title)}</h3><p class="soft">{escape(plot.text)}</p>'
    data = base64.b64encode(plot.png).decode("ascii")
    picture = f'<img alt="{escape(plot.title)}" src="data:image/png;base64,{data}">'
    return f"<h3>{escape(plot.title)}</h3><p>{escape(plot.text)}</p><figure>{picture}</figure>"


def runs_table(collection: Collection) -> str:
    """A row per run: what it cost and what it reached."""
    rows = [_run_row(run) for run in collection.runs]
    if collection.base:
        loss = collection.base["loss"]
        base: dict[str, object] = dict.fromkeys(rows[0])
        base |= {"run": "untrained base", "tokens trained": 0, "different samples": 0, "steps": 0}
        base |= {"overall": _loss(loss["overall"]), "macro": _loss(loss["macro"])}
        rows.insert(0, base)
    return table_html(list(rows[0]), [list(row.values()) for row in rows])


def _run_row(run: Run) -> dict[str, object]:
    summary = run.summary or {}
    loss = run.evaluation["loss"] if run.evaluation else {}
    tokens_so_far = run.metrics[-1]["tokens"] if run.metrics else 0
    return {
        "run": run.name if run.summary else f"{run.name} (not finished)",
        "variant": run.variant,
        "method": run.method,
        "budget": "whole pool" if run.budget is None else f"{100 * run.budget:g} %",
        "seed": run.seed,
        "tokens trained": summary.get("tokens_trained", tokens_so_far),
        "different samples": summary.get("distinct_samples"),
        "steps": summary.get("steps", len(run.metrics)),
        "time (s)": summary.get("seconds"),
        "selection (s)": summary.get("selection_seconds"),
        "overall": _loss(loss.get("overall")),
        "macro": _loss(loss.get("macro")),
    }


def options_table(run: Run) -> str:
    """The run's options, folded away."""
    rows = [[key, value] for key, value in _flat(run.config).items()]
    return f"<details><summary>Options</summary>{table_html(['option', 'value'], rows)}</details>"


def table_html(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; columns of numbers are aligned on the right, unless it has but two columns (options and values)."""
    numeric = [len(columns) > 2 and any(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    head = _table_row("th", columns, numeric)
    body = "".join(_table_row("td", [format_cell(cell) for cell in row], numeric) for row in rows)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _table_row(tag: str, cells: Sequence[str], numeric: Sequence[bool]) -> str:
    inside = ""
    for cell, is_number in zip(cells, numeric, strict=True):
        attribute = ' class="number"' if is_number else ""
        inside += f"<{tag}{attribute}>{escape(cell)}</{tag}>"
    return f"<tr>{inside}</tr>"


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, str) and value[:1].isdigit())


def _loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
