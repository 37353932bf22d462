"""`lead-engine compare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from lead_engine.config.batch import BatchConfig
from lead_engine.config.bounds import Bounds, Epochs, PathText, Seeds
from lead_engine.config.checks import require
from lead_engine.config.lora import LoraConfig
from lead_engine.config.methods import MethodName
from lead_engine.config.optimizer import OptimizerConfig
from lead_engine.config.options import Options
from lead_engine.config.runtime import RuntimeConfig
from lead_engine.config.selection import SelectionConfig

Share = Annotated[float, Bounds(gt=0, le=1, says="shares in (0, 1]")]


@dataclass(frozen=True)
class StudyConfig(Options):
    """A comparison: methods and variants of them x budgets x seeds (the YAML of `compare`)."""

    flags: ClassVar[str] = ""

    pool: Path
    """Folder written by `prepare`."""
    model: PathText
    """The base that every run starts from."""
    heldout: tuple[PathText, ...]
    """Held-out files."""
    methods: tuple[MethodName, ...] = ("lead", "random", "full")
    """Each stands as a variant of its own name; a file that names variants and no methods has only those."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """NAME: options of `train` that lie over the study's own, and method, match, budgets and seeds (study/variants.py).
    """
    reference: str | None = None
    """The variant that every other is compared with; `random` where there is one."""
    contrasts: tuple[tuple[str, str], ...] = ()
    """Further pairs [A, B] of variants, compared as A minus B."""
    jobs: Annotated[int, Bounds(ge=1, le=1024)] = 1
    """Runs at a time; they share the processor's cores between them."""
    budgets: tuple[Share, ...] = (0.025,)
    seeds: Seeds = (0, 1, 2)
    ranks: Annotated[int, Bounds(ge=1, le=1024)] = 1
    """torchrun processes per run."""
    generate: Annotated[int, Bounds(ge=0, zero="none")] = 0
    """Samples per task for exact match."""
    epochs: Epochs = 1
    """Passes over the pool for `full`, which stands beside the others as the reference that costs 100 %."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = "at least one method, where there are no variants"
        require(bool(self.methods or self.variants), "methods", self.methods, rule)


@dataclass(frozen=True)
class CompareConfig(Options):
    """Train several methods at equal token budget over several seeds, with paired intervals."""

    config: Path
    """YAML with the fields of a study (docs/README.md, "Your own data")."""
    out: Path
    """Folder to write; runs that are already complete there are kept."""
