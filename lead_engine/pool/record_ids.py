"""The ids that users gave their records, by sample number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import pyarrow.parquet as pq


class RecordIds(Sequence[str]):
    """Ids of a prepared pool's records, in the pool's order.

    They stay in Arrow's memory, which takes a third of the bytes of a list of Python strings.
    """

    def __init__(self, pool: Path) -> None:
        self._column = pq.read_table(pool / "records.parquet", columns=["id"]).column("id")

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [str(name) for name in self._column[index].to_pylist()]
        return str(self._column[index].as_py())
