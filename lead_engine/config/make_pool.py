"""`lead-engine make-pool`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lead_engine.config.bounds import Bounds, Seed
from lead_engine.config.options import Options


@dataclass(frozen=True)
class MakePoolConfig(Options):
    """Write a procedural pool to try the engine on: pool.jsonl, heldout.jsonl and text.txt to pre-train on."""

    out: Path
    """Folder to write."""
    samples: Annotated[int, Bounds(ge=100, le=10**8)] = 4000
    """Records in pool.jsonl."""
    seed: Seed = 0
    """Seed of everything random."""
