"""Adapters."""

from __future__ import annotations

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
    """Layers to adapt: the blocks' linear layers (the head has --lora.head), ends of names (q_proj v_proj), or one regular
    expression for whole names."""
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
        require(
            self.rank > 0 or not self.head, "--lora.head", self.head, "false without adapters: give --lora.rank too"
        )
        require(
            self.rank > 0 or self.quantize == "none",
            "--lora.quantize",
            self.quantize,
            "none without adapters: give --lora.rank too",
        )
        for name in ("target_modules", "dropout", "rslora", "dora", "modules_to_save"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            shown = " ".join(value) if isinstance(value, tuple) else value
            flag, rule = f"--lora.{name.replace('_', '-')}", "left out without adapters: give --lora.rank too"
            require(self.rank > 0 or value == default, flag, shown, rule)
        for name in ("dropout", "dora"):
            rule = "left out beside --lora.head: the head's adapter is computed inside the loss, without it"
            require(not (self.head and getattr(self, name)), f"--lora.{name}", getattr(self, name), rule)
        targets, one = " ".join(self.target_modules), len(self.target_modules) == 1
        plain = all(re.fullmatch(NAME, target) for target in self.target_modules)
        several = len(self.target_modules) > 1 and plain and "all-linear" not in self.target_modules
        rule = "names, or one regular expression alone, or all-linear alone"
        require(one or several, "--lora.target-modules", targets, rule)
        try:
            re.compile(targets if one else "")
        except re.error as error:
            raise UserError(f"--lora.target-modules {targets}: no regular expression ({error})") from None

    @property
    def targets_by_pattern(self) -> bool:
        """Whether `target_modules` is a regular expression: it has a character that no name has."""
        return len(self.target_modules) == 1 and not re.fullmatch(NAME, self.target_modules[0])
