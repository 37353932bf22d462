"""What adapters a model can have: targets, modules to save and LM heads that would be computed wrongly are refused."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from lead_engine.base.errors import UserError
from lead_engine.model import dora


def at(file: Path | None, option: str) -> str:
    """What an error names: the file and peft's name of an option, or its flag."""
    return f"{file}: {option}" if file else f"--lora.{option.replace('_', '-')}"


def check_saved(model: PreTrainedModel, config: PeftLoraConfig, saved: set[str], file: Path | None) -> None:
    for target in config.modules_to_save or ():
        if not any(name.endswith(target) for name in saved):
            kind = model.config.model_type
            where = f"{at(file, 'modules_to_save')} {target}"
            raise UserError(f"{where}: this {kind} model has no module whose name ends with {target}")
    if not is_tied(model):
        return
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers has no annotations here
    both = {head, model.get_input_embeddings()}
    for name in saved:
        if both & set(model.get_submodule(name).modules()):
            raise UserError(
                f"{at(file, 'modules_to_save')} {name}: this model's LM head and embedding are one matrix "
                "(tie_word_embeddings). A copy of one alone would part them, and no model of this kind could hold the "
                "result; train all weights, or leave it out"
            )


def check_layers(model: PreTrainedModel, file: Path | None) -> None:
    """Only layers whose forward pass is known here."""
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if type(layer) is not LoraLinear or not isinstance(layer.get_base_layer(), nn.Linear):
            kind = type(layer.get_base_layer()).__name__
            raise UserError(
                f"{at(file, 'target_modules')}: {name} is a {kind}: adapters on linear layers alone are computed here; "
                "leave it out of the targets (--lora.modules-to-save trains it whole)"
            )
        if layer.lora_bias[dora.NAME] and layer.get_base_layer().bias is None:
            raise UserError(
                f"{at(file, 'lora_bias')} on {name}, which has no bias: such an adapter could never be merged; train "
                "it without"
            )


def is_tied(model: PreTrainedModel) -> bool:
    return bool(model.config.get_text_config().tie_word_embeddings or model.config.tie_word_embeddings)


def check_head(model: PreTrainedModel, config: PeftLoraConfig, file: Path | None) -> None:
    if is_tied(model):
        where = at(file, "target_modules") if file else "--lora.head, or the head among --lora.target-modules"
        raise UserError(
            f"{where}: this model's LM head and embedding are one matrix (tie_word_embeddings). An adapter on the head "
            "alone would part them, and no model of this kind could hold the merged result; leave the head out"
        )
    for name in ("lora_dropout", "lora_bias", "use_dora"):
        if getattr(config, name):
            raise UserError(
                f"{at(file, 'target_modules')}: an adapter on the LM head is computed inside the loss, chunk by chunk, "
                f"without {name}; leave the head out, or {name}"
            )
