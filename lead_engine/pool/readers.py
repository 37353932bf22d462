"""From a source's bytes to its values: (line or record number, value) each, and what is not readable as a problem."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from lead_engine.base.errors import UserError
from lead_engine.pool.fields import parsed
from lead_engine.pool.forms import MESSAGE_LISTS
from lead_engine.pool.problems import Problems
from lead_engine.pool.sources import HubName, content_path, hub_name, kind, open_bytes
from lead_engine.pool.turns import are_turns

Values = Iterator[tuple[int, Any]]
BOM = b"\xef\xbb\xbf"


def read_values(source: str, problems: Problems) -> Values:
    """The source's values in order, each with its line (JSON Lines, CSV, TSV: where it starts) or number (else).

    Lines that cannot be read are added to `problems`. Raises UserError where the source as a whole cannot be.
    """
    reader = _READERS.get(kind(content_path(source)) or "")
    if reader is None:
        name = hub_name(source)
        assert name is not None, f"{source} did not come from expand()"
        return _read_hub(source, name)
    return _readable(source, reader(source, problems))


def _readable(source: str, values: Values) -> Values:
    try:
        yield from values
    except OSError as error:  # also what Arrow says of a compressed file that is cut or damaged
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from None


# --- JSON ---


class _Repeated(dict[str, Any]):
    """An object in which a key stands more than once: JSON readers would take the last and drop the others."""

    key: str


class _Decoder:
    """JSON, with objects that repeat a key marked."""

    def __init__(self) -> None:
        self.marked = False
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) == len(pairs):
            return fields
        self.marked = True
        repeated = _Repeated(fields)
        keys = [key for key, _ in pairs]
        repeated.key = next(key for key in keys if keys.count(key) > 1)
        return repeated

    def decode(self, text: str) -> Any:
        """ValueError for broken JSON, or an integer beyond Python's limit; RecursionError for one nested too deep."""
        return self._decoder.decode(text)

    def repeated_key(self, value: Any) -> str | None:
        """A key that stands twice in one object anywhere in the value."""
        if not self.marked:
            return None
        if isinstance(value, _Repeated):
            return value.key
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return next((key for part in parts if (key := self.repeated_key(part)) is not None), None)


def _without_repeats(source: str, values: Values, decoder: _Decoder, problems: Problems) -> Values:
    for number, value in values:
        key = decoder.repeated_key(value)
        if key is None:
            yield number, value
        else:
            problems.add("broken_line", source, number, f"the key {key!r} stands more than once in one object")


def _read_jsonl(source: str, problems: Problems) -> Values:
    with open_bytes(source) as file:
        yield from _parse_lines(source, enumerate(file, 1), problems)


def _parse_lines(source: str, lines: Iterable[tuple[int, bytes]], problems: Problems) -> Values:
    decoder = _Decoder()
    yield from _without_repeats(source, _decoded_lines(source, lines, decoder, problems), decoder, problems)


def _decoded_lines(source: str, lines: Iterable[tuple[int, bytes]], decoder: _Decoder, problems: Problems) -> Values:
    """Decoded line by line, so that bytes that are not UTF-8 spoil only the line they stand in, and it can be named."""
    for number, line in lines:
        line = line.removeprefix(BOM).strip() if number == 1 else line.strip()
        if not line:
            continue
        try:
            value = decoder.decode(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            problems.add("bad_utf8", source, number, f"byte {error.start + 1} of the line is not UTF-8")
        except (ValueError, RecursionError) as error:
            problems.add("broken_line", source, number, f"not valid JSON: {error}")
        else:
            yield number, value


def _read_json(source: str, problems: Problems) -> Values:
    with open_bytes(source) as file:
        raw = file.read().removeprefix(BOM)
    decoder = _Decoder()
    try:
        values = decoder.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}:{line}: not UTF-8 text; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and raw.lstrip()[:1] == b"{":  # one object a line: JSON Lines under the name .json
            lines = (line for line in raw.splitlines() if line.strip())
            yield from _parse_lines(source, enumerate(lines, 1), problems)
            return
        where = f"{source}:{error.lineno}"
        raise UserError(f"{where}: not valid JSON ({error.msg}); one record a line belongs in a .jsonl file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({error})") from None
    if isinstance(values, dict):
        values = values.get("data")
    if not isinstance(values, list):
        raise UserError(f'{source}: expected a list of records or {{"data": [...]}}')
    yield from _without_repeats(source, iter(enumerate(values, 1)), decoder, problems)


# --- CSV, TSV ---


def _read_csv(source: str, problems: Problems) -> Values:
    """Rows as objects of text; an empty cell is absent."""
    csv.field_size_limit(sys.maxsize)  # the process's; a cell may hold a whole conversation
    with open_bytes(source) as file:
        lines = _Lines(file)
        # strict: a quote that is never closed would otherwise swallow the rest of the file as one cell.
        rows = csv.reader(lines, delimiter="\t" if kind(source) == ".tsv" else ",", strict=True)
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
                yield start, {name: _cell(name, cell) for name, cell in zip(header, row, strict=False) if cell}


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
    try:
        names = [name.strip() for name in next((row for row in rows if any(row)), [])]
    except csv.Error as error:
        raise UserError(f"{source}:1: the row of column names is damaged ({error})") from None
    if lines.bad is not None:
        raise UserError(f"{source}:{lines.bad}: not UTF-8 text; save the file as UTF-8")
    if len(names) == 1 and (found := [mark for mark in (";", "\t", "|", ",") if mark in names[0]]):
        way = "part them by commas, or by tabs in a .tsv file"
        raise UserError(f"{source}:1: one column, {names[0]!r}: its names seem to be parted by {found[0]!r}; {way}")
    named = [name for name in names if name]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise UserError(f"{source}:1: two columns have the name {', '.join(map(repr, twice))}; rename one")
    return [name or f"column {number}" for number, name in enumerate(names, 1)]


# --- Arrow ---


def _read_parquet(source: str, problems: Problems) -> Values:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from _rows(source, pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=1024), problems)
    except pyarrow.ArrowException as error:
        raise UserError(f"{source}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _read_arrow(source: str, problems: Problems) -> Values:
    """Arrow's file or stream format, as `datasets.save_to_disk` writes it."""
    import pyarrow

    try:
        with pyarrow.memory_map(source) as file:
            if file.read(6) == b"ARROW1":
                stored = pyarrow.ipc.open_file(file)
                yield from _rows(source, map(stored.get_batch, range(stored.num_record_batches)), problems)
            else:
                file.seek(0)
                yield from _rows(source, pyarrow.ipc.open_stream(file), problems)
    except pyarrow.ArrowException as error:
        raise UserError(f"{source}: not a readable Arrow file ({str(error).splitlines()[0]})") from None


def _rows(source: str, batches: Iterable[Any], problems: Problems) -> Values:
    numbers = itertools.count(1)
    for batch in batches:
        for row in range(batch.num_rows):
            number = next(numbers)
            try:
                value = batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError as error:  # Arrow does not check its strings
                problems.add("bad_utf8", source, number, f"text that is not UTF-8 ({error.reason})")
            else:
                yield number, _pruned(value)


def _pruned(value: Any) -> Any:
    """Without the nulls with which Arrow fills objects of one column to the same keys."""
    if isinstance(value, dict):
        return {key: _pruned(part) for key, part in value.items() if part is not None}
    return [_pruned(part) for part in value] if isinstance(value, list) else value


def _read_hub(source: str, name: HubName) -> Values:
    try:
        import datasets
    except ImportError:
        way = "to read it as a hub data set install the package `datasets` (pip install datasets)"
        raise UserError(f"{source}: no such file; {way}") from None
    try:
        rows = datasets.load_dataset(name.name, name.config, split=name.split)
        for number, row in enumerate(rows, 1):
            yield number, _pruned(row)
    except Exception as error:  # many unrelated types: network, no such set or split
        lines = str(error).splitlines() or [type(error).__name__]
        # Where a configuration has to be chosen, the second line names them.
        reason = " ".join(lines[: 2 if lines[0].startswith("Config name is missing") else 1])
        where = f"{source}: no such file, and the hub data set {name.name}, split {name.split},"
        raise UserError(f"{where} could not be loaded ({reason}); NAME:CONFIG:SPLIT names another part of it") from None


_READERS: dict[str, Callable[[str, Problems], Values]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
