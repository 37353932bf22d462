"""CSV and TSV."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from lead_engine.base.errors import UserError
from lead_engine.pool.fields import parsed
from lead_engine.pool.forms import MESSAGE_LISTS
from lead_engine.pool.problems import Problems
from lead_engine.pool.readers.values import BOM, Values
from lead_engine.pool.sources import kind, open_bytes
from lead_engine.pool.turns import are_turns


def read_table(source: str, problems: Problems) -> Values:
    """Rows of CSV or TSV as objects of text; an empty cell is absent."""
    csv.field_size_limit(sys.maxsize)  # the process's; a cell may hold a whole conversation
    delimiter = "\t" if kind(source) == ".tsv" else ","
    with open_bytes(source) as file:
        lines = _Lines(file)
        # strict: a quote that is never closed would otherwise swallow the rest of the file as one cell.
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header = _header(source, rows, lines)
        while True:
            start = rows.line_num + 1
            lines.bad = None
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                through = f"; lines {start} to {rows.line_num} are left out" if rows.line_num > start else ""
                problems.add("broken_line", source, start, f"not a row of {kind(source)}: {error}{through}")
                continue
            if lines.bad is not None:
                problems.add("bad_utf8", source, start, f"bytes that are not UTF-8, in line {lines.bad}")
            elif len(row) > len(header):
                problems.add("broken_line", source, start, f"{len(row)} cells under {len(header)} columns")
            elif any(row):  # an empty line is no row
                yield start, _object(header, row)


def _object(header: list[str], row: list[str]) -> dict[str, Any]:
    """A row as an object; one that is shorter than the header lacks its last fields."""
    return {name: _cell(name, cell) for name, cell in zip(header, row, strict=False) if cell}


def _cell(name: str, cell: str) -> Any:
    """A cell is text; but a table has no other way to hold a list of messages than as JSON text."""
    turns = parsed(cell) if name in MESSAGE_LISTS else cell
    return turns if are_turns(turns) else cell


class _Lines:
    """A file's lines as text for the csv module, which needs their line breaks; the last that is not UTF-8 is noted."""

    def __init__(self, file: BinaryIO) -> None:
        self.bad: int | None = None
        self._lines = enumerate(file, 1)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        line = line.removeprefix(BOM) if number == 1 else line
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError:
            self.bad = number
            return line.decode("utf-8", "replace")


def _header(source: str, rows: Iterator[list[str]], lines: _Lines) -> list[str]:
    """The names of the columns, from the first row that has any."""
    try:
        names = [name.strip() for name in next((row for row in rows if any(row)), [])]
    except csv.Error as error:
        raise UserError(f"{source}:1: the row of column names is damaged ({error})") from None
    if lines.bad is not None:
        raise UserError(f"{source}:{lines.bad}: not UTF-8 text; save the file as UTF-8")
    marks = [mark for mark in (";", "\t", "|", ",") if mark in names[0]] if len(names) == 1 else []
    if marks:
        hint = "part them by commas, or by tabs in a .tsv file"
        raise UserError(f"{source}:1: one column, {names[0]!r}: its names seem to be parted by {marks[0]!r}; {hint}")
    named = [name for name in names if name]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise UserError(f"{source}:1: two columns have the name {', '.join(map(repr, twice))}; rename one")
    return [name or f"column {number}" for number, name in enumerate(names, 1)]
