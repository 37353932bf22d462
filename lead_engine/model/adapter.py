"""LoRA adapters in peft's format: put into a model, initialised, named."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from lead_engine.config import LoraConfig
from lead_engine.errors import UserError
from lead_engine.files import read_json
from lead_engine.model.find import ADAPTER_CONFIG, find_model, hub_name
from lead_engine.model.shards import local_part
from lead_kernels import Lora

CONFIG, WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"


def is_adapter(name: str) -> bool:
    return "lora_" in name


def stored_name(name: str) -> str:
    """Name of an adapter tensor in peft's file, from its Hugging Face parameter name."""
    return "base_model.model." + name.replace(".default.", ".")


def new_config(lora: LoraConfig, base: Path) -> PeftLoraConfig:
    """Adapters on every linear layer of the blocks; `inject` adds the LM head where it is asked to."""
    return PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM", base_model_name_or_path=str(base)
    )


def read_config(folder: Path) -> PeftLoraConfig:
    """The adapter's config. Raises UserError for adapters other than plain LoRA."""
    config = PeftLoraConfig.from_pretrained(folder)
    if config.peft_type != "LORA" or config.use_dora or config.modules_to_save:
        raise UserError(f"{folder / CONFIG}: only plain LoRA adapters are read (no DoRA, no modules_to_save)")
    return config


def find_base(folder: Path) -> Path:
    """The folder of an adapter's base model, by the name and revision in its config.

    Raises UserError if its config does not name one, or if there is no such model.
    """
    config = _read(folder)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base or not isinstance(base, str):
        raise UserError(f"{folder / CONFIG}: names no base_model_name_or_path; write the base model's folder or hub name there")
    named = f"{base}@{revision}" if revision and not Path(base).exists() and hub_name(Path(base)) is None else base
    return find_model(named, f"{folder / CONFIG}: base_model_name_or_path")


def name_base(config: PeftLoraConfig, base: Path) -> None:
    """Write into an adapter's config where its base is: name and commit of a model from the hub, else the folder's absolute path."""
    named = hub_name(base)
    name, commit = named.split("@") if named else (str(base.resolve()), None)
    config.base_model_name_or_path, config.revision = name, commit


def _read(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG)


def check_options(model: PreTrainedModel, folder: Path, lora: LoraConfig) -> None:
    """Raise UserError where options for a new adapter are given, other than those of the adapter in `folder` that is trained on."""
    config, head = model.peft_config["default"], isinstance(model.get_output_embeddings(), LoraLayer)
    if lora.rank and (lora.rank, lora.alpha, lora.head) != (config.r, config.lora_alpha, head):
        raise UserError(
            f"--lora.rank {lora.rank}: --model {folder} is an adapter already (rank {config.r}, alpha {config.lora_alpha:g}, "
            f"{'with' if head else 'without'} the LM head), and it is trained on as it is. Give the same options or leave them out; to "
            "train a new adapter on top of it, merge it first (lead-engine merge)"
        )


def inject(model: PreTrainedModel, config: PeftLoraConfig, *, head: bool = False) -> None:
    """Put adapters into `model` in place; all other parameters are frozen. `model.peft_config` keeps the config.

    head: on the LM head too, where the config's target is all linear layers (peft means the blocks' by that).
    Raises UserError for adapters on an LM head that cannot have one.
    """
    if config.target_modules == "all-linear":
        last = model.get_output_embeddings()
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        config.target_modules = {name.rsplit(".", 1)[-1] for name, module in linear.items() if head or module is not last}
    config.inference_mode = False  # as it is saved; peft would freeze the adapters, too
    inject_adapter_in_model(config, model)
    model.peft_config = {"default": config}
    if isinstance(model.get_output_embeddings(), LoraLayer):
        _check_head(model, config)


def _check_head(model: PreTrainedModel, config: PeftLoraConfig) -> None:
    if model.config.get_text_config().tie_word_embeddings or model.config.tie_word_embeddings:
        raise UserError(
            "--lora.head: this model's LM head and embedding are one matrix (tie_word_embeddings). An adapter on the head alone would part "
            "them, and no model of this kind could hold the merged result; leave --lora.head off"
        )
    if config.lora_dropout or config.lora_bias:
        raise UserError(f"{CONFIG}: an adapter on the LM head is read without lora_dropout and lora_bias only: 0 and false")


def base_layer(module: nn.Module) -> nn.Module:
    """The layer under an adapter, or the layer itself."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def lora_of(module: nn.Module) -> Lora | None:
    """A linear layer's adapter as `linear_cross_entropy` takes it; None where it has none."""
    if not isinstance(module, LoraLayer):
        return None
    return Lora(module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"])


@torch.no_grad()
def initialise(model: nn.Module, seed: int, *, skip: bool) -> None:
    """New adapters: A Kaiming-uniform, B zero (LoRA, arXiv 2106.09685), so that training starts at the base model.

    Every rank draws the whole A from a generator of its own and keeps its shard: the same weights on any number of ranks.
    skip: the adapter's weights were loaded; draw nothing.
    """
    if skip:
        return
    adapters = [(name, parameter) for name, parameter in model.named_parameters() if is_adapter(name)]
    for number, (name, parameter) in enumerate(adapters):
        if "lora_B" in name:
            parameter.zero_()
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        bound = 1 / math.sqrt(parameter.shape[1])  # what kaiming_uniform_(a=sqrt(5)) comes to
        whole = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        local, place = local_part(parameter)
        local.copy_(whole[place])
