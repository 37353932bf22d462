"""From a source's bytes to its values, and what is not readable as a problem; a file for each family of formats."""

from __future__ import annotations

from collections.abc import Callable

from lead_engine.base.errors import UserError
from lead_engine.pool.problems import Problems
from lead_engine.pool.readers.arrow import read_arrow, read_parquet
from lead_engine.pool.readers.hub import read_hub
from lead_engine.pool.readers.json_files import read_json, read_jsonl
from lead_engine.pool.readers.tables import read_table
from lead_engine.pool.readers.values import Values
from lead_engine.pool.sources import content_path, hub_name, kind

__all__ = ["Values", "read_values"]

READERS: dict[str, Callable[[str, Problems], Values]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_table,
    ".tsv": read_table,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


def read_values(source: str, problems: Problems) -> Values:
    """The source's values in order, each with its line or number (see `Values`).

    Lines that cannot be read are added to `problems`. Raises UserError where the source as a whole cannot be.
    """
    reader = READERS.get(kind(content_path(source)) or "")
    if reader is not None:
        return _readable(source, reader(source, problems))
    name = hub_name(source)
    assert name is not None, f"{source} did not come from expand()"
    return read_hub(source, name)


def _readable(source: str, values: Values) -> Values:
    try:
        yield from values
    except OSError as error:  # also what Arrow says of a compressed file that is cut or damaged
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from None
