"""`full`: all of the pool in random order: what selection is to come near at a small part of the cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from lead_engine.config.bounds import Bounds
from lead_engine.config.methods import MethodOptions
from lead_engine.selection.methods.random import Random


@dataclass(frozen=True)
class FullOptions(MethodOptions):
    """The whole pool."""

    flags: ClassVar[str] = "--full."

    epochs: Annotated[int, Bounds(ge=1, le=1000)] = 1
    """Passes over the pool."""


class Full(Random):
    """As `random`, but the budget is the pool, `--full.epochs` times."""

    Options = FullOptions

    @classmethod
    def budget(cls, options: FullOptions, share: float, pool_tokens: int) -> int:
        return options.epochs * pool_tokens
