"""Parquet and Arrow files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from lead_engine.base.errors import UserError
from lead_engine.pool.problems import Problems
from lead_engine.pool.readers.values import Values, without_nulls


def read_parquet(source: str, problems: Problems) -> Values:
    """A row a record."""
    import pyarrow
    import pyarrow.parquet

    try:
        yield from _rows(source, pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=1024), problems)
    except pyarrow.ArrowException as error:
        raise UserError(f"{source}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def read_arrow(source: str, problems: Problems) -> Values:
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
                yield number, without_nulls(value)
