"""What the engine prints: lines, tables and progress bars, from rank 0 only.

On a terminal, rich draws them. Anywhere else (a pipe, a log file, a scheduler) the same calls write plain lines without
control codes: progress is then a line every 10 % or 15 seconds, whichever comes first, and at the end.
Everything goes to standard output, warnings to standard error, so that `lead-engine ... > log` keeps the results.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

LINE_EVERY_SHARE = 0.1
LINE_EVERY_SECONDS = 15.0
PLAIN_WIDTH = 200

_live: Progress | None = None  # the bars that are on the screen now; rich can draw only one group at a time


def is_main() -> bool:
    """Whether this process may speak: rank 0, or a process that torchrun did not start."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str = "") -> None:
    """Print one line (or several); square brackets are printed as they are."""
    if is_main():
        _print(text, error=False)


def warn(text: str) -> None:
    """Print "warning: TEXT" to standard error."""
    if is_main():
        _print(f"warning: {text}", error=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table. `format_cell` turns cells into text; columns of numbers are aligned right.

    ValueError where a row has more or fewer cells than there are columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells under {len(columns)} columns: {row!r}")
    if not is_main():
        return
    console = _console(error=False)
    if _is_terminal(console.file):
        view = _make_table(columns, rows, box.HEAVY_HEAD)
        view.title = escape(title)
        console.print(view)
        return
    with console.capture() as captured:
        console.print(_make_table(columns, rows, box.MARKDOWN))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    _print("\n".join([title, *filter(None, lines)]), error=False)


def _make_table(columns: Sequence[str], rows: Sequence[Sequence[object]], style: box.Box) -> Table:
    view = Table(title_justify="left", title_style="bold", header_style="bold", box=style)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(row[index] is None or isinstance(row[index], (int, float)) for row in rows)
        view.add_column(escape(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        view.add_row(*(escape(format_cell(cell)) for cell in row))
    return view


def format_cell(value: object) -> str:
    """A number with separators (12,345) or four significant digits (2.718), "-" for None, anything else by str()."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


class Bar:
    """Handle of one progress display; `advance` is cheap enough for an inner loop."""

    def advance(self, n: float = 1, **info: object) -> None:
        """Count `n` more done; `info` (for example loss=2.31) is shown beside the bar until it is replaced."""


class _LiveBar(Bar):
    def __init__(self, view: Progress, task: TaskID) -> None:
        self._view, self._task = view, task
        self._info: dict[str, object] = {}

    def advance(self, n: float = 1, **info: object) -> None:
        self._info.update(info)
        self._view.update(self._task, advance=n, info=_format_info(self._info))


class _LineBar(Bar):
    def __init__(self, total: float | None, description: str, done: float) -> None:
        self._total, self._description = total, description
        self._before = self._done = done
        self._info: dict[str, object] = {}
        self._started = self._last_time = time.monotonic()
        self._last_done: float | None = done or None  # what the last line said; None before the first

    def advance(self, n: float = 1, **info: object) -> None:
        self._done += n
        self._info.update(info)
        now = time.monotonic()
        grown = self._done - (self._last_done or 0.0)
        far = self._total is not None and self._total > 0 and grown >= LINE_EVERY_SHARE * self._total
        late = now - self._last_time >= LINE_EVERY_SECONDS
        if far or late:
            self._line(now)

    def close(self) -> None:
        if self._done != self._last_done:
            self._line(time.monotonic())

    def _line(self, now: float) -> None:
        self._last_time, self._last_done = now, self._done
        done = f"{self._done:,.0f}"
        if self._total:
            done += f"/{self._total:,.0f} ({100 * self._done / self._total:.0f} %)"
        parts = [
            f"{self._description}: {done}",
            _duration(now - self._started),
            self._left(now),
            _format_info(self._info),
        ]
        _print(", ".join(filter(None, parts)), error=False)

    def _left(self, now: float) -> str:
        """The time left, at the speed so far; what was done before this call says nothing about it."""
        grown = self._done - self._before
        if not self._total or not grown or self._done >= self._total:
            return ""
        return f"{_duration((self._total - self._done) * (now - self._started) / grown)} left"


@contextmanager
def progress(total: float | None, description: str, done: int = 0) -> Iterator[Bar]:
    """Show how far something is while the block runs.

    total: None where the end is unknown. done: what was done before this call.
    Blocks may be nested: on a terminal the inner bar stands under the outer one and goes when it is done.
    """
    if not is_main():
        yield Bar()
    elif _is_terminal(sys.stdout):
        with _live_bar(total, description, done) as bar:
            yield bar
    else:
        line = _LineBar(total, description, done)
        try:
            yield line
        finally:
            line.close()


@contextmanager
def _live_bar(total: float | None, description: str, done: int) -> Iterator[Bar]:
    global _live
    outermost = _live is None
    view = _make_view() if _live is None else _live
    task = view.add_task(escape(description), total=total, completed=done, info="")
    if outermost:
        _live = view
        view.start()
    try:
        yield _LiveBar(view, task)
    finally:
        if outermost:
            view.stop()
            _live = None
        else:
            view.remove_task(task)


def _make_view() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}", markup=False),
        console=_console(error=False),
        refresh_per_second=4,
    )


def _is_terminal(stream: IO[str]) -> bool:
    # Not rich's own answer: FORCE_COLOR and its like would make it draw bars into a log file.
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def _console(*, error: bool) -> Console:
    """The console to print on. Made anew unless bars are drawn, so that a redirected sys.stdout is honoured."""
    if _live is not None and not error:
        return _live.console
    stream = sys.stderr if error else sys.stdout
    if _is_terminal(stream):
        return Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, no_color=True, force_terminal=False, width=PLAIN_WIDTH)


def _print(text: str, *, error: bool) -> None:
    # Text, not markup: a file name with brackets must not be read as a style. soft_wrap: lines are cut by the reader's
    # terminal, never by us, so that logs can be searched.
    _console(error=error).print(Text(text), soft_wrap=True)
    if not error:
        sys.stdout.flush()


def _format_info(info: Mapping[str, object]) -> str:
    return " ".join(f"{name} {format_cell(value)}" for name, value in info.items())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
