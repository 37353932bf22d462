"""`lead-engine eval` and `lead-engine lm-eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from lead_engine.config import reads
from lead_engine.config.batch import BatchConfig
from lead_engine.config.bounds import Bounds, Count, MaxLength, PathText, Seed
from lead_engine.config.options import Options
from lead_engine.config.runtime import RuntimeConfig


@dataclass(frozen=True)
class EvalConfig(Options):
    """Held-out loss per task, and exact match with --generate."""

    read_with: ClassVar[reads.Table] = reads.EVAL

    model: PathText
    """Run folder, model folder, or hub name."""
    data: tuple[PathText, ...]
    """Held-out files, in any form that `prepare` reads."""
    out: Path | None = None
    """Folder for eval.json and per-sample results; by default, RUN/eval for a run folder, else only printed."""
    generate: Annotated[int, Bounds(ge=0, zero="none")] = 0
    """Samples per task for which an answer is generated and compared; 0 generates none."""
    max_new_tokens: Count = 128
    """Longest generated answer."""
    max_length: MaxLength = 1024
    """Longest sample in tokens."""
    skip_bad: bool = False
    """Leave out records that cannot be used instead of refusing the file."""
    fold_system: bool = False
    """As in `prepare`; not needed for a run on a pool that was prepared with it."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.batch.require_room(self.max_length, "--max-length")


@dataclass(frozen=True)
class HarnessConfig(Options):
    """Public benchmarks by lm-eval: GSM8K, MMLU, HumanEval, TyDiQA, and tasks of your own."""

    model: PathText
    """Run folder, model folder, or hub name; an adapter is merged into its base."""
    tasks: tuple[str, ...]
    """lm-eval's task, group or tag names, or patterns of them: gsm8k mmlu humaneval tydiqa."""
    out: Path
    """Folder for results.json and the samples."""
    include_path: Path | None = None
    """Folder with task YAML files of your own."""
    shots: Annotated[int, Bounds(ge=-1, le=10_000, says="0 to 10000, or -1 for each task's own")] = -1
    """Examples in the prompt; -1 takes each task's own number."""
    limit: Annotated[int, Bounds(ge=0, zero="all")] = 0
    """Samples a task; 0 takes all."""
    batch_size: Annotated[int, Bounds(ge=1, le=2**16)] = 8
    """Samples at a time."""
    max_length: Annotated[int, Bounds(ge=0, le=2**24, zero="the model's own")] = 0
    """Longest prompt and answer in tokens; 0 takes the model's own limit."""
    chat: bool = False
    """Put prompts into the tokenizer's chat template."""
    allow_code: bool = False
    """Run tasks that execute what the model writes (humaneval): on this machine, as this user."""
    seed: Seed = 0
    """Seed of the examples in the prompts."""
