"""What the user's script holds: which pool, which budget, which method; and the trainer class made of the user's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lead_engine.base.errors import UserError
from lead_engine.config import Budget, Method, SelectionConfig, reads
from lead_engine.config.bounds import Seed
from lead_engine.config.options import argument
from lead_engine.pool.state import PoolState
from lead_engine.pool.store import TokenStore
from lead_engine.selection.methods import METHODS
from lead_engine.selection.methods.base import Method as MethodBase

if TYPE_CHECKING:
    import datasets


class Selection:
    """See `lead`. One selection serves any number of trainers."""

    def __init__(
        self, pool: Path | None, budget: float | None, method: Method, options: SelectionConfig, seed: int | None
    ) -> None:
        self.pool, self.budget, self.method, self.options, self.seed = pool, budget, method, options, seed
        self.store = TokenStore.open(pool / "store", "mmap") if pool is not None else None
        """The pool's tokens, left on disk; None where the trainer's own rows are scored."""

    def trainer(self, cls: type) -> type:
        """`cls` (transformers' Trainer, TRL's SFTTrainer, or a class made of them) with LEAD in it. Its arguments are those of `cls`.

        `train_dataset` may be left out where there is a pool: then the pool's own tokens are trained.
        """
        from lead_engine.integrations.trainer import with_lead

        return with_lead(cls, self)

    def dataset(self) -> datasets.Dataset:
        """The pool's samples as a data set of the columns input_ids and labels, which both trainers take as it is. Needs datasets."""
        if self.store is None:
            raise UserError("lead(pool=...): dataset() gives the pool's samples, and no pool was given")
        import datasets
        import numpy as np
        import pyarrow as pa

        tokens, response, offsets = (x.numpy() for x in (self.store.tokens, self.store.response, self.store.offsets))
        labels = np.where(response, tokens, -100).astype(np.int32)
        labels[offsets[:-1]] = -100  # a sample's first token is predicted by nothing
        bounds, kind = (offsets.astype(np.int32), pa.ListArray) if offsets[-1] < 2**31 else (offsets, pa.LargeListArray)
        columns = {"input_ids": kind.from_arrays(bounds, tokens), "labels": kind.from_arrays(bounds, labels)}
        return datasets.Dataset(pa.table(columns))

    def state(self) -> PoolState | None:
        """What `prepare` found out about the pool; None where the trainer's own rows are to be scored."""
        if self.pool is None:
            return None
        assert self.store is not None
        if METHODS[self.method].needs_scores or PoolState.exists(self.pool):
            return PoolState.load(self.pool, self.store.num_samples)
        return PoolState.unscored(self.store.num_samples)


@dataclass(frozen=True)
class _Chosen:
    """What decides which of the options are read."""

    method: Method
    selection: SelectionConfig


def lead(
    pool: str | os.PathLike[str] | None = None,
    budget: float | str | None = None,
    *,
    method: Method = "lead",
    options: SelectionConfig | Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> Selection:
    """Selection for a Hugging Face trainer: `lead(...).trainer(SFTTrainer)(model=..., args=..., train_dataset=...)`.

    pool: folder of `lead-engine prepare`, of the records that `train_dataset` holds, in their order; tokens and masks
    are compared. None: the trainer's own rows are scored by the model when training starts, once with and once without
    their instruction.
    budget: tokens to train, as a share of all of them; "0.1" is 0.1. The number of optimizer steps, which the trainer's
    schedule needs, is that share of the samples unless the arguments say `max_steps`; training ends with whichever is
    spent first. None: `max_steps` alone decides.
    method, options: as `--method` and `--selection.*` of the command line, options also as a dict of their names.
    seed: by default the trainer's.
    UserError for folders, methods, numbers and options that cannot be used.
    """
    pool = argument(Path | None, pool, "lead(pool=...)")
    budget = argument(Budget | None, budget, "lead(budget=...)")
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"lead(method={method!r}): no such method; there are {', '.join(METHODS)}")
    options = argument(SelectionConfig, SelectionConfig() if options is None else options, "lead(options=...)")
    seed = argument(Seed | None, seed, "lead(seed=...)")
    chosen = _Chosen(method, options)
    reads.refuse_unread(
        chosen, reads.SELECTION, lambda option: reads.value_of(_Chosen("lead", SelectionConfig()), option)
    )
    if METHODS[method].refresh is not MethodBase.refresh:
        raise UserError(
            f"lead(method={method!r}): measures the pool again while it trains, which only `lead-engine train` does"
        )
    if METHODS[method].whole_pool:
        raise UserError(f"lead(method={method!r}): selects nothing; the trainer without lead() is that")
    return Selection(pool, budget, method, options, seed)
