"""`lead`, which the user's script calls, and the `Selection` that it returns: a maker of trainer classes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lead_engine.base.errors import UserError
from lead_engine.config import Budget, MethodName, MethodOptions, SelectionConfig, find_method
from lead_engine.config.bounds import Seed
from lead_engine.config.methods import method_options
from lead_engine.config.options import argument
from lead_engine.integrations.settings import Settings
from lead_engine.selection.methods.base import Method


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


def lead(
    pool: str | os.PathLike[str] | None = None,
    budget: float | str | None = None,
    *,
    method: str = "lead",
    options: MethodOptions | Mapping[str, Any] | None = None,
    round_steps: int = SelectionConfig.round_steps,
    seed: int | None = None,
) -> Selection:
    """Selection for a Hugging Face trainer: `lead(...).trainer(SFTTrainer)(model=..., args=..., train_dataset=...)`.

    pool: a folder that `lead-engine prepare` made from the records of `train_dataset`, in the same order; tokens and
    masks are compared. None: the model scores the trainer's own rows when training starts, once with and once without
    their instruction.
    budget: tokens to train, as a share of all of them; "0.1" is 0.1. The number of optimizer steps, which the trainer's
    schedule needs, is that share of the samples unless the trainer's arguments set `max_steps`. Training ends when
    either the tokens or the steps are used up. None: `max_steps` alone decides.
    method, options: as `--method` and the method's own options (`--lead.*`) of the command line, e.g. {"gamma": 0.2}.
    round_steps: as `--selection.round-steps`.
    seed: the trainer's by default.
    Raises UserError for folders, methods, numbers and options that cannot be used.
    """
    checked_pool: Path | None = argument(Path | None, pool, "lead(pool=...)")
    checked_budget: float | None = argument(Budget | None, budget, "lead(budget=...)")
    method = argument(MethodName, method, "lead(method=...)")
    own = method_options(method, options, place="lead(options=...)")
    checked_seed: int | None = argument(Seed | None, seed, "lead(seed=...)")
    round_steps = SelectionConfig(round_steps=round_steps).round_steps
    chosen: type[Method] = find_method(method)
    if chosen.refresh is not Method.refresh:
        raise UserError(
            f"lead(method={method!r}): scores the pool again while it trains, which only `lead-engine train` does"
        )
    if method == "full":
        raise UserError(f"lead(method={method!r}): selects nothing; use the trainer without lead()")
    return Selection(checked_pool, checked_budget, method, own, checked_seed, round_steps)
