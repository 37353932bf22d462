"""What the user's script chose: pool, budget, method, options and seed; and the pool's samples as a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lead_engine.base.errors import UserError
from lead_engine.config import MethodOptions, find_method
from lead_engine.pool.state import PoolState
from lead_engine.pool.store import TokenStore

if TYPE_CHECKING:
    import datasets


class Settings:
    """The checked arguments of `lead`. Trainers read them and change nothing, so one object serves several trainers."""

    def __init__(
        self,
        pool: Path | None,
        budget: float | None,
        method: str,
        options: MethodOptions,
        seed: int | None,
        round_steps: int,
    ) -> None:
        self.pool = pool
        self.budget = budget
        self.method = method
        self.options = options
        self.seed = seed
        self.round_steps = round_steps
        self.store = TokenStore.open(pool / "store", "mmap") if pool is not None else None
        """The pool's tokens, which stay on disk; None where the trainer's own rows are scored."""

    def dataset(self) -> datasets.Dataset:
        """The pool's samples as a data set with the columns input_ids and labels, which both trainers take as it is.

        Needs the package `datasets`. Raises UserError if no pool was given.
        """
        if self.store is None:
            raise UserError("lead(pool=...): dataset() returns the pool's samples, and no pool was given")
        import datasets
        import numpy as np
        import pyarrow as pa

        tokens = self.store.tokens.numpy()
        offsets = self.store.offsets.numpy()
        labels = np.where(self.store.response.numpy(), tokens, -100).astype(np.int32)
        labels[offsets[:-1]] = -100  # nothing predicts a sample's first token
        if offsets[-1] < 2**31:
            list_array, bounds = pa.ListArray, offsets.astype(np.int32)
        else:  # Arrow's plain lists have 32-bit offsets
            list_array, bounds = pa.LargeListArray, offsets
        columns = {
            "input_ids": list_array.from_arrays(bounds, tokens),
            "labels": list_array.from_arrays(bounds, labels),
        }
        return datasets.Dataset(pa.table(columns))

    def state(self) -> PoolState | None:
        """The scores that `lead-engine prepare` computed; None where the trainer's own rows have yet to be scored."""
        if self.pool is None or self.store is None:
            return None
        if find_method(self.method).needs_scores or PoolState.exists(self.pool):
            return PoolState.load(self.pool, self.store.num_samples)
        return PoolState.unscored(self.store.num_samples)
