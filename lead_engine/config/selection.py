"""What all selection methods share. A method's own options stand in its file in lead_engine/selection/methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from lead_engine.base.errors import UserError
from lead_engine.config.bounds import Bounds
from lead_engine.config.old_names import moved_option
from lead_engine.config.options import Options


@dataclass(frozen=True)
class SelectionConfig(Options):
    """What all selection methods share."""

    flags: ClassVar[str] = "--selection."

    round_steps: Annotated[int, Bounds(ge=1, le=2**16)] = 4
    """S, optimizer steps trained on one decision of the method."""

    def __new__(cls, *values: Any, **named: Any) -> SelectionConfig:
        for name in named:
            moved = moved_option(f"selection.{name}")
            if moved:
                raise UserError(f"SelectionConfig({name}=...): {moved}")
        return super().__new__(cls)
