"""--runtime.*: where and in which precision things run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from lead_engine.config.bounds import Bounds
from lead_engine.config.options import Options

Precision = Literal["auto", "bf16", "fp32"]
Placement = Literal["auto", "device", "pinned", "mmap"]
Attention = Literal["auto", "flash", "varlen", "segment", "mask"]
Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class RuntimeConfig(Options):
    """Where and in which precision things run."""

    flags: ClassVar[str] = "--runtime."

    precision: Precision = "auto"
    """Compute precision; auto is bf16 where the hardware multiplies it natively, else fp32. Master weights are fp32."""
    attention: Attention = "auto"
    """Attention over packed samples; auto takes the fastest that this machine has."""
    placement: Placement = "auto"
    """Where the pool's tokens lie: on the training device, in pinned host memory, or on disk."""
    checkpointing: Checkpointing = "none"
    """Activations recomputed in the backward pass: none, all but the blocks' inputs (full), or all but matrix products
    (selective)."""
    compile: bool = False
    """Compile every block with torch.compile."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory (FSDP2's CPU offload)."""
    replicate: Annotated[int, Bounds(ge=1)] = 1
    """HSDP: replicas of the model, each sharded over ranks / replicate ranks; 1 shards over all of them."""
    timeout: Annotated[float, Bounds(ge=1, le=1e7)] = 1800.0
    """Seconds that a rank waits for the others before the run stops and says where it stood."""
