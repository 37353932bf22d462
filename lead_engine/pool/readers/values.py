"""What a reader gives, and what the readers share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Values = Iterator[tuple[int, Any]]
"""(place, value) of each record: its line (JSON Lines, CSV, TSV: where it starts), else its number from 1."""
BOM = b"\xef\xbb\xbf"
"""Bytes that some programs put at the start of a UTF-8 file."""


def without_nulls(value: Any) -> Any:
    """The value without the nulls with which Arrow fills objects of one column to the same keys."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value
