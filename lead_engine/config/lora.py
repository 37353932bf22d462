"""--lora.*: adapters."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from lead_engine.base.errors import UserError
from lead_engine.config.bounds import Bounds
from lead_engine.config.checks import require
from lead_engine.config.options import Options

Quantize = Literal["none", "nf4"]
NAME = r"[\w.-]+"
"""What a module's name is made of; anything else is a regular expression."""


@dataclass(frozen=True)
class LoraConfig(Options):
    """Low-rank adapters (peft); rank 0 trains all weights."""

    flags: ClassVar[str] = "--lora."

    rank: Annotated[int, Bounds(ge=0, le=2**16, zero="full fine-tuning")] = 0
    """Rank of the adapters; 0 means full fine-tuning."""
    alpha: Annotated[float, Bounds(gt=0)] = 16.0
    """Adapter output is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Layers to adapt: the blocks' linear layers (the head has --lora.head), ends of names (q_proj v_proj), or one
    regular expression for whole names."""
    head: bool = False
    """Give the LM head an adapter too."""
    dropout: Annotated[float, Bounds(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Train the magnitudes of the adapted weights' rows apart (DoRA, arXiv 2402.09353)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules to train whole beside the adapters, by the ends of their names: lm_head, embed_tokens, norm."""
    quantize: Quantize = "none"
    """nf4: keep the frozen base in 4 bits, double quantised (QLoRA, arXiv 2305.14314)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank == 0:
            self._require_defaults()
        if self.head:
            rule = "left out beside --lora.head: the head's adapter is computed inside the loss, without it"
            require(not self.dropout, "--lora.dropout", self.dropout, rule)
            require(not self.dora, "--lora.dora", self.dora, rule)
        self._require_targets()

    def _require_defaults(self) -> None:
        """Without adapters, nothing but their rank may be given. (`alpha` is never read then.)"""
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if option.name not in ("rank", "alpha") and value != option.default:
                shown = " ".join(value) if isinstance(value, tuple) else value
                require(False, self.flag(option.name), shown, "left out without adapters: give --lora.rank too")

    def _require_targets(self) -> None:
        flag, targets = "--lora.target-modules", " ".join(self.target_modules)
        if len(self.target_modules) == 1:
            try:
                re.compile(targets)
            except re.error as error:
                raise UserError(f"{flag} {targets}: no regular expression ({error})") from None
            return
        names = [name for name in self.target_modules if re.fullmatch(NAME, name) and name != "all-linear"]
        are_names = bool(names) and len(names) == len(self.target_modules)
        require(are_names, flag, targets, "names, or one regular expression alone, or all-linear alone")

    @property
    def targets_by_pattern(self) -> bool:
        """Whether `target_modules` is a regular expression: it has a character that no name has."""
        return len(self.target_modules) == 1 and not re.fullmatch(NAME, self.target_modules[0])
