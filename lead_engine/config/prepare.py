"""`lead-engine prepare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from lead_engine.config import reads
from lead_engine.config.batch import BatchConfig
from lead_engine.config.bounds import Bounds, MaxLength, PathText, Seed, VocabSize
from lead_engine.config.optimizer import OptimizerConfig
from lead_engine.config.options import Options
from lead_engine.config.runtime import RuntimeConfig


@dataclass(frozen=True)
class PrepareConfig(Options):
    """Turn instruction files into a prepared pool: tokens, difficulty, initial utility, clusters, tasks."""

    read_with: ClassVar[reads.Table] = reads.PREPARE

    pool: tuple[PathText, ...]
    """Files (JSON, JSONL, CSV, TSV, Parquet, Arrow; text also .gz, .zst, .bz2), folders, patterns, "-", or hub
    NAME[:CONFIG[:SPLIT]]."""
    model: PathText
    """Hub name, model folder, run, or scratch:tiny|mini|small|100m."""
    out: Path
    """Folder to write."""
    max_length: MaxLength = 1024
    """Longest sample in tokens; longer ones are cut, and counted."""
    clusters: Annotated[int, Bounds(ge=1, le=2**16)] = 7
    """K, difficulty clusters."""
    tasks: Annotated[int, Bounds(ge=0, le=2**16)] = 0
    """Topic clusters by k-means, for records that name no `dataset`; 0: the `dataset` field, or one task without it."""
    scoring: Literal["model", "ngram"] = "model"
    """Who judges the samples before training: the model (three passes over the pool), or counts of n-grams (none)."""
    warmup_share: Annotated[float, Bounds(ge=0, lt=1)] = 0.01
    """Share of the pool's tokens on which a copy of the model is trained briefly before difficulty is measured
    (with --scoring model)."""
    vocab_size: VocabSize = 4096
    """Size of the vocabulary trained for scratch:NAME."""
    skip_bad: bool = False
    """Leave out records that cannot be used (each is named and counted) instead of refusing the pool."""
    fold_system: bool = False
    """Put a system message at the head of the user turn that follows it, for chat templates without that role."""
    seed: Seed = 0
    """Seed of the warm-up and of k-means."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.batch.require_room(self.max_length, "--max-length")
