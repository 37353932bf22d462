"""`lead-engine merge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lead_engine.config.options import Options


@dataclass(frozen=True)
class MergeConfig(Options):
    """Merge a LoRA adapter into its base; writes a model folder in Hugging Face format."""

    run: Path
    """Run folder with an adapter."""
    out: Path
    """Model folder to write."""
