"""--batch.*: how samples are packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from lead_engine.config.bounds import Bounds
from lead_engine.config.checks import require
from lead_engine.config.options import Options


@dataclass(frozen=True)
class BatchConfig(Options):
    """How samples are packed: an optimizer step has `micro_batches` x `capacity` token places, over all ranks."""

    flags: ClassVar[str] = "--batch."

    capacity: Annotated[int, Bounds(ge=16, le=2**24)] = 4096
    """Token places in one packed micro-batch; also the longest sample that can be trained."""
    micro_batches: Annotated[int, Bounds(ge=1, le=2**16)] = 1
    """Micro-batches in one optimizer step, over all ranks; a multiple of the number of ranks."""
    slots: Annotated[int, Bounds(ge=0, le=2**20, zero="automatic")] = 0
    """Most samples in one micro-batch; 0 means capacity / 32."""

    @property
    def num_slots(self) -> int:
        """Most samples in one micro-batch."""
        return self.slots or max(1, self.capacity // 32)

    def require_room(self, tokens: int, flag: str) -> None:
        """UserError naming `flag` where a sample of so many tokens does not fit a micro-batch."""
        require(tokens <= self.capacity, flag, tokens, "at most --batch.capacity")
