"""`full`: all of the pool, `--epochs` times, in random order: what selection is to come near at a small part of the cost."""

from __future__ import annotations

from lead_engine.selection.methods.random import Random


class Full(Random):
    """As `random`, but the budget is the pool."""

    whole_pool = True
