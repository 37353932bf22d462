"""`lead-engine train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from lead_engine.config.batch import BatchConfig
from lead_engine.config.bounds import Bounds, PathText, Seed
from lead_engine.config.checks import require
from lead_engine.config.lora import LoraConfig
from lead_engine.config.methods import MethodName, MethodOptions, Recipe, WithMethod
from lead_engine.config.optimizer import OptimizerConfig
from lead_engine.config.runtime import RuntimeConfig
from lead_engine.config.selection import SelectionConfig

Budget = Annotated[float, Bounds(gt=0, le=1000, says="above 0 and at most 1000 (times the pool)")]


@dataclass(frozen=True)
class TrainConfig(WithMethod):
    """Train a model on the samples that a method selects from a prepared pool."""

    pool: Path
    """Folder written by `lead-engine prepare`."""
    model: PathText
    """Hub name, model folder, run (an adapter is trained on), or scratch:tiny|mini|small|100m."""
    out: Path
    """Run folder to write."""
    method: MethodName = "lead"
    """Who chooses the samples."""
    recipe: Recipe = "default"
    """Set of options that files and flags then change: the best measured here, or LEAD as its paper has it."""
    budget: Budget = 0.025
    """Tokens to train, as a share of the pool's tokens; not for `full`, which takes the whole pool."""
    seed: Seed = 0
    """Seed of everything random."""
    resume: bool = False
    """Go on from the newest complete checkpoint in `out`."""
    checkpoint_every: Annotated[int, Bounds(ge=0, zero="none before the end")] = 0
    """Rounds between two checkpoints; 0 writes none before the end."""
    keep_checkpoints: Annotated[int, Bounds(ge=1)] = 2
    """How many checkpoints to keep."""
    max_skipped_steps: Annotated[int, Bounds(ge=0)] = 10
    """Steps whose loss or gradient is not finite are skipped and counted; more of them than this stop the run."""
    eval_data: tuple[PathText, ...] = ()
    """Held-out files, in any form that `prepare` reads: their loss is measured before training and at its end."""
    eval_every: Annotated[int, Bounds(ge=0, zero="only before training and at its end")] = 0
    """Measure it every N optimizer steps too, at a round's end (0: not in between); keep the best model in OUT/best."""
    patience: Annotated[int, Bounds(ge=0, zero="never stop early")] = 0
    """Stop after so many measurements in a row without a lower held-out loss; 0 never does."""
    skip_bad: bool = False
    """Leave out records of `eval_data` that cannot be used (each is named and counted) instead of refusing them."""
    wandb: str = ""
    """Also log to Weights & Biases: the project's name."""
    mlflow: str = ""
    """Also log to MLflow: the experiment's name."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    options: MethodOptions = field(default_factory=MethodOptions)
    """The method's own, under its name."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eval_every", "patience", "skip_bad"):
            value = getattr(self, name)
            alone = value and not self.eval_data
            require(not alone, self.flag(name), value, "left out without --eval-data, the files that it is about")
        alone = self.patience and not self.eval_every
        require(not alone, "--patience", self.patience, "left out without --eval-every N")

    @property
    def match(self) -> Path | None:
        """Folder of the run that this one imitates, if its method does that."""
        match: Path | None = getattr(self.options, "match", None)
        return match
