"""Hub data sets, through the package `datasets`."""

from __future__ import annotations

from lead_engine.base.errors import UserError
from lead_engine.pool.readers.values import Values, without_nulls
from lead_engine.pool.sources import HubName


def read_hub(source: str, name: HubName) -> Values:
    """Rows of a hub data set; they have no lines."""
    try:
        import datasets
    except ImportError:
        way = "to read it as a hub data set install the package `datasets` (pip install datasets)"
        raise UserError(f"{source}: no such file; {way}") from None
    try:
        rows = datasets.load_dataset(name.name, name.config, split=name.split)
        for number, row in enumerate(rows, 1):
            yield number, without_nulls(row)
    except Exception as error:  # many unrelated types: network, no such set or split
        lines = str(error).splitlines() or [type(error).__name__]
        # Where a configuration has to be chosen, the second line names them.
        told = 2 if lines[0].startswith("Config name is missing") else 1
        reason = " ".join(lines[:told])
        where = f"{source}: no such file, and the hub data set {name.name}, split {name.split},"
        raise UserError(f"{where} could not be loaded ({reason}); NAME:CONFIG:SPLIT names another part of it") from None
