"""The ids that users gave their records, by place in the pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq


class SampleNames(Sequence[str]):
    """Ids of a prepared pool's records, in the pool's order; as Arrow keeps them, a third of the bytes of a list of Python strings."""

    def __init__(self, pool: Path) -> None:
        self._column = pq.read_table(pool / "records.parquet", columns=["id"]).column("id")

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, place):  # type: ignore[override]  # one at a time is all that is asked
        return self._column[place].as_py()
