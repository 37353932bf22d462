"""--optimizer.*: AdamW and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from lead_engine.config.bounds import Bounds
from lead_engine.config.options import Options

OptimizerKind = Literal["adamw", "adamw8bit"]
Decay = Annotated[float, Bounds(ge=0, lt=1, says="two numbers in [0, 1)")]


@dataclass(frozen=True)
class OptimizerConfig(Options):
    """AdamW with linear warm-up and decay over the token budget."""

    flags: ClassVar[str] = "--optimizer."

    lr: Annotated[float, Bounds(gt=0)] = 2e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Bounds(ge=0)] = 0.0
    """Decoupled weight decay, on matrices only."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    max_grad_norm: Annotated[float, Bounds(gt=0)] = 1.0
    """Clip the global gradient norm to this."""
    warmup: Annotated[float, Bounds(ge=0, lt=1)] = 0.05
    """Share of the token budget over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls afterwards: to a tenth of the peak, or not at all."""
    kind: OptimizerKind = "adamw"
    """adamw: torch's fused AdamW, fp32 moments; adamw8bit: 8-bit moments (bitsandbytes), a quarter of the memory."""
