"""`lead`, which the user's script calls, and the `Selection` that it returns: a maker of trainer classes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lead_engine.base.errors import UserError
from lead_engine.config import Budget, Method, SelectionConfig, reads
from lead_engine.config.bounds import Seed
from lead_engine.config.options import argument
from lead_engine.integrations.settings import Settings
from lead_engine.selection.methods import METHODS
from lead_engine.selection.methods.base import Method as MethodBase


class Selection(Settings):
    """See `lead`."""

    def trainer(self, cls: type) -> type:
        """A subclass of `cls` that trains what LEAD selects. Its constructor takes the arguments of `cls`.

        cls: transformers' Trainer, TRL's SFTTrainer, or a class derived from one of them. With a pool, `train_dataset`
        may be left out: the trainer then trains on the pool's own tokens. Raises UserError for classes with a loss or
        an order of samples of their own.
        """
        from lead_engine.integrations.trainer import with_lead  # slow to import: it brings in transformers' Trainer

        return with_lead(cls, self)


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

    pool: a folder that `lead-engine prepare` made from the records of `train_dataset`, in the same order; tokens and
    masks are compared. None: the model scores the trainer's own rows when training starts, once with and once without
    their instruction.
    budget: tokens to train, as a share of all of them; "0.1" is 0.1. The number of optimizer steps, which the trainer's
    schedule needs, is that share of the samples unless the trainer's arguments set `max_steps`. Training ends when
    either the tokens or the steps are used up. None: `max_steps` alone decides.
    method, options: as `--method` and `--selection.*` of the command line; options may be a dict by name.
    seed: the trainer's by default.
    Raises UserError for folders, methods, numbers and options that cannot be used.
    """
    checked_pool: Path | None = argument(Path | None, pool, "lead(pool=...)")
    checked_budget: float | None = argument(Budget | None, budget, "lead(budget=...)")
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"lead(method={method!r}): no such method; there are {', '.join(METHODS)}")
    given = SelectionConfig() if options is None else options
    checked_options: SelectionConfig = argument(SelectionConfig, given, "lead(options=...)")
    checked_seed: int | None = argument(Seed | None, seed, "lead(seed=...)")
    chosen = _Chosen(method, checked_options)
    reads.refuse_unread(
        chosen, reads.SELECTION, lambda option: reads.value_of(_Chosen("lead", SelectionConfig()), option)
    )
    if METHODS[method].refresh is not MethodBase.refresh:
        raise UserError(
            f"lead(method={method!r}): scores the pool again while it trains, which only `lead-engine train` does"
        )
    if METHODS[method].whole_pool:
        raise UserError(f"lead(method={method!r}): selects nothing; use the trainer without lead()")
    return Selection(checked_pool, checked_budget, method, checked_options, checked_seed)
