"""`lead-engine pretrain`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from lead_engine.config import reads
from lead_engine.config.batch import BatchConfig
from lead_engine.config.bounds import Bounds, Epochs, PathText, Seed, VocabSize
from lead_engine.config.optimizer import OptimizerConfig
from lead_engine.config.options import Options
from lead_engine.config.runtime import RuntimeConfig


@dataclass(frozen=True)
class PretrainConfig(Options):
    """Train a small base model on plain text, in the same loop."""

    read_with: ClassVar[reads.Table] = reads.PRETRAIN

    text: tuple[Path, ...]
    """Plain-text files; a blank line or a line break ends a paragraph."""
    out: Path
    """Run folder; the model lies in OUT/model."""
    model: PathText = "scratch:tiny"
    """scratch:NAME, a hub name or a folder."""
    vocab_size: VocabSize = 4096
    """Size of the byte-level BPE vocabulary trained for scratch:NAME."""
    block: Annotated[int, Bounds(ge=16, le=2**24)] = 512
    """Tokens in one training sample."""
    epochs: Epochs = 1
    """Passes over the text."""
    seed: Seed = 0
    """Seed of everything random."""
    resume: bool = False
    """Go on from the newest complete checkpoint."""
    checkpoint_every: Annotated[int, Bounds(ge=0, zero="none before the end")] = 0
    """Rounds between two checkpoints; 0 writes none before the end."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-3, weight_decay=0.1))
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.batch.require_room(self.block, "--block")
