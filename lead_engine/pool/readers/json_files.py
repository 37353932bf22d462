"""JSON and JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from lead_engine.base.errors import UserError
from lead_engine.pool.problems import Problems
from lead_engine.pool.readers.values import BOM, Values
from lead_engine.pool.sources import open_bytes


class _Repeated(dict[str, Any]):
    """An object in which a key stands more than once: JSON readers would take the last and drop the others."""

    key: str


class _Decoder:
    """JSON, with objects that repeat a key marked."""

    def __init__(self) -> None:
        self.marked = False
        """Whether any object so far repeats a key."""
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
        for part in _parts(value):
            key = self.repeated_key(part)
            if key is not None:
                return key
        return None


def _parts(value: Any) -> Iterable[Any]:
    """The values inside an object or a list."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _without_repeats(source: str, values: Values, decoder: _Decoder, problems: Problems) -> Values:
    for number, value in values:
        key = decoder.repeated_key(value)
        if key is None:
            yield number, value
        else:
            problems.add("broken_line", source, number, f"the key {key!r} stands more than once in one object")


def read_jsonl(source: str, problems: Problems) -> Values:
    """A record a line."""
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


def read_json(source: str, problems: Problems) -> Values:
    """A list of records, or {"data": [...]}; also JSON Lines under the name .json."""
    with open_bytes(source) as file:
        raw = file.read().removeprefix(BOM)
    decoder = _Decoder()
    try:
        values = decoder.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}:{line}: not UTF-8 text; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or raw.lstrip()[:1] != b"{":
            place, hint = f"{source}:{error.lineno}", "one record a line belongs in a .jsonl file"
            raise UserError(f"{place}: not valid JSON ({error.msg}); {hint}") from None
        # One object behind the other: JSON Lines.
        lines = (line for line in raw.splitlines() if line.strip())
        yield from _parse_lines(source, enumerate(lines, 1), problems)
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({error})") from None
    if isinstance(values, dict):
        values = values.get("data")
    if not isinstance(values, list):
        raise UserError(f'{source}: expected a list of records or {{"data": [...]}}')
    yield from _without_repeats(source, iter(enumerate(values, 1)), decoder, problems)
