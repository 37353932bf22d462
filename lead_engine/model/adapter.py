"""LoRA adapters in peft's format: put into a model, initialised, named, merged.

An adapter is what is trained beside a frozen base: low-rank layers (`lora_A`, `lora_B`, DoRA's magnitudes), and modules
that are trained whole (`modules_to_save`). These are the base's own parameters here, not a copy beside them: what the
base's file says is replaced by what the adapter's says, and the adapter's file is where they are written.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from lead_engine.base.errors import UserError
from lead_engine.config import LoraConfig
from lead_engine.model import adapter_config, dora
from lead_engine.model.adapter_checks import at, check_head, check_layers, check_saved
from lead_engine.model.find import ADAPTER_CONFIG
from lead_engine.model.shards import local_part
from lead_engine.model.stored import Checkpoint
from lead_kernels import Lora

CONFIG, WEIGHTS, NAME = ADAPTER_CONFIG, "adapter_model.safetensors", dora.NAME
ALL_LINEAR = "all-linear"


def is_adapter(name: str) -> bool:
    """Whether a parameter is a low-rank layer's or a magnitude; those of modules that are trained whole are not."""
    return "lora_" in name


def stored_name(name: str) -> str:
    """Name of an adapter's tensor in peft's file, from its Hugging Face parameter name."""
    name = name.replace(f".{NAME}.", ".")
    return "base_model.model." + (name.removesuffix(".weight") if _is_magnitude(name) else name)


def _is_magnitude(name: str) -> bool:
    return "lora_magnitude_vector" in name


def new_config(lora: LoraConfig) -> PeftLoraConfig:
    """What peft calls these options. `inject` resolves "all-linear", and adds the LM head where it is asked to."""
    names = list(lora.target_modules)
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft declares a whole number, and scales by any
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=names[0] if names == [ALL_LINEAR] or lora.targets_by_pattern else names,
        modules_to_save=list(lora.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )


def check_options(model: PreTrainedModel, folder: Path, lora: LoraConfig) -> None:
    """Raise UserError where options are given for a new adapter, other than those of the one in `folder`."""
    if not lora.rank:
        return
    config: Any = model.peft_config[NAME]
    has: dict[str, tuple[object, object]] = {
        "--lora.rank": (lora.rank, config.r),
        "--lora.alpha": (lora.alpha, config.lora_alpha),
        "--lora.head": (lora.head, isinstance(_lm_head(model), LoraLayer)),
        "--lora.dropout": (lora.dropout, config.lora_dropout),
        "--lora.rslora": (lora.rslora, config.use_rslora),
        "--lora.dora": (lora.dora, config.use_dora),
        "--lora.modules-to-save": (sorted(lora.modules_to_save), sorted(config.modules_to_save or [])),
    }
    if lora.target_modules != (ALL_LINEAR,):
        targets = config.target_modules
        wanted = lora.target_modules[0] if lora.targets_by_pattern else set(lora.target_modules)
        has["--lora.target-modules"] = (wanted, targets if isinstance(targets, str) else set(targets))
    for flag, (given, there) in has.items():
        if given != there:
            raise UserError(
                f"{flag} {_text(given)}: --model {folder} is an adapter already ({describe(config)}; here: "
                f"{_text(there)}), and it is trained on as it is. Give the same options or leave all of --lora out; to "
                "train a new adapter on top of it, merge it first (lead-engine merge)"
            )


def _text(value: object) -> str:
    if isinstance(value, list | set):
        return " ".join(sorted(value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def inject(model: PreTrainedModel, config: PeftLoraConfig, file: Path | None = None, *, head: bool = False) -> None:
    """Put adapters into `model` in place; all other parameters but those of modules to save are frozen.

    `model.peft_config` keeps the config. file: where the config is from; None: the flags --lora. head: on the LM head
    too, where the config's target is all linear layers (peft means the blocks' by that), or beside its other targets.
    Raises UserError for targets that are not there or no linear layers, or where the model's LM head cannot follow.
    """
    last = _lm_head(model)
    last_name = next(name for name, module in model.named_modules() if module is last)
    ends = tuple(config.modules_to_save or ())
    saved = {name for name, _ in model.named_modules() if name and name.endswith(ends)}  # as peft does
    check_saved(model, config, saved, file)
    if config.target_modules == ALL_LINEAR:
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in saved}
        names = {name.rsplit(".", 1)[-1] for name in linear if name != last_name}
        config.target_modules = names  # type: ignore[assignment]  # peft keeps a set, but declares a list
    if head:
        if last_name in saved:
            raise UserError(f"--lora.head: --lora.modules-to-save {last_name} trains the head whole already; give one")
        if isinstance(config.target_modules, str):
            raise UserError(
                "--lora.head: beside a pattern of targets, let the pattern name the head too, and leave this off"
            )
        names = set(config.target_modules or ()) | {last_name}
        config.target_modules = names  # type: ignore[assignment]
    config.inference_mode = False  # as it is saved; peft would freeze the adapters, too
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, model)
    except Exception as error:  # of any type: peft reads names and patterns as it goes along
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        kind = model.config.model_type
        raise UserError(
            f"{at(file, 'target_modules')}: this {kind} model cannot have that adapter ({reason})"
        ) from None
    check_layers(model, file)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and NAME in layer.lora_magnitude_vector:
            dora.install(layer)
    for name, wrapper in list(model.named_modules()):
        if isinstance(wrapper, ModulesToSaveWrapper):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, wrapper.original_module.requires_grad_(True))
    model.peft_config = {NAME: config}  # type: ignore[dict-item]  # transformers declares less than peft's class has
    if isinstance(_lm_head(model), LoraLayer):
        check_head(model, config, file)


def _lm_head(model: PreTrainedModel) -> nn.Module:
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def base_layer(module: nn.Module) -> nn.Module:
    """The layer under an adapter, or the layer itself."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def lora_of(module: nn.Module) -> Lora | None:
    """A linear layer's adapter as `linear_cross_entropy` takes it; None where it has none."""
    if not isinstance(module, LoraLayer):
        return None
    layer: Any = module  # peft declares few of its layers' attributes
    return Lora(layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME])


@torch.no_grad()
def initialise(model: nn.Module, seed: int, *, skip: bool) -> None:
    """Initialise new adapters so that training starts at the base model.

    A is Kaiming-uniform, B zero (LoRA, arXiv 2106.09685), and magnitudes are the base's.

    Every rank draws the whole A from a generator of its own and keeps its shard: the same on any number of ranks.
    skip: the adapter's weights were loaded; draw nothing.
    """
    if skip:
        return
    adapters = [(name, parameter) for name, parameter in model.named_parameters() if is_adapter(name)]
    for _, magnitude in (pair for pair in adapters if _is_magnitude(pair[0])):
        magnitude.zero_()
    for number, (name, parameter) in enumerate(pair for pair in adapters if not _is_magnitude(pair[0])):
        if "lora_B" in name:
            parameter.zero_()
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        bound = 1 / math.sqrt(parameter.shape[1])  # what kaiming_uniform_(a=sqrt(5)) comes to
        whole = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        local, place = local_part(parameter)
        local.copy_(whole[place])


@torch.no_grad()
def load(model: nn.Module, names: dict[str, str], folder: Path) -> None:
    """Fill an adapter's parameters from its folder. names: of all of them, by the model's and by Hugging Face's.

    Raises UserError naming the file that cannot be read, or whose tensor is missing, of another shape, or has no place.
    """
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{folder / 'adapter_model.bin'}: only {WEIGHTS} is read, which runs no code; load the adapter with peft "
            "and save it again"
        )
    file, checkpoint = folder / WEIGHTS, Checkpoint(folder, WEIGHTS)
    parameters = dict(model.named_parameters())
    wanted = {stored_name(theirs): ours for ours, theirs in names.items()}
    strange = sorted(checkpoint.file_of.keys() - wanted.keys())
    missing = sorted(wanted.keys() - checkpoint.file_of.keys())
    if missing or strange:
        what = f"no tensor {missing[0]}" if missing else f"{strange[0]} has no place in the model"
        more = len(missing or strange) - 1
        raise UserError(
            f"{file}: {what}{f' (and {more} more)' if more else ''}; the file does not fit the base model and "
            f"{CONFIG}: is it the base that the adapter was trained on?"
        )
    for stored, ours in sorted(wanted.items()):
        parameter = parameters[ours]
        if checkpoint.shape(stored) != tuple(parameter.shape):
            shapes = f"{list(checkpoint.shape(stored))}, the model wants {list(parameter.shape)}"
            raise UserError(f"{file}: {stored} has shape {shapes}: is it the base that the adapter was trained on?")
        checkpoint.dtype(stored)  # floats alone
        local, place = local_part(parameter)
        if local.numel():
            value = checkpoint.tensor(stored)[place]
            local.copy_(value.float().to(local.device) - _base_of(model, ours)[place] if _is_magnitude(ours) else value)


def as_stored(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """A whole tensor of an adapter as peft's file has it."""
    return value + _base_of(model, name).to(value.dtype) if _is_magnitude(name) else value


def _base_of(model: nn.Module, magnitude: str) -> Tensor:
    owner: Any = model.get_submodule(magnitude.rpartition(".")[0])
    base: Tensor = owner.base
    return base


@torch.no_grad()
def merge(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge the adapter in `folder` into a plain model, in place.

    Layers are plain ones with adapted weights afterwards. Returns the model.

    Raises UserError for everything that is wrong with the adapter.
    """
    inject(model, adapter_config.read_config(folder), folder / CONFIG)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):  # sums of the adapter are made in fp32 whatever the base's dtype
            for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                part.float()
    dora.measure(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    load(model, {name: name.replace(".base_layer.", ".") for name in trained}, folder)
    layers: list[tuple[str, Any]] = [pair for pair in model.named_modules() if isinstance(pair[1], LoraLayer)]
    for name, layer in layers:
        base = layer.get_base_layer()
        weight = base.weight.float() + layer.get_delta_weight(NAME)
        if NAME in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[NAME]
            norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).clamp(min=1e-12)
            weight = weight * ((magnitude.base + magnitude.weight) / norms)[:, None]
        base.weight.copy_(weight)
        if layer.lora_bias[NAME]:
            base.bias.add_(layer.lora_B[NAME].bias * layer.scaling[NAME])
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, base)
    del model.peft_config
    return model


def describe(config: PeftLoraConfig | None) -> str:
    """For a run's first screen: kind, rank, alpha, and what is not as usual."""
    if config is None:
        return ""
    kind = ("DoRA" if config.use_dora else "LoRA") + (", rank-stabilised" if config.use_rslora else "")
    ranks = f"rank {config.r}" + (" (others by pattern)" if config.rank_pattern else "")
    extra = f", dropout {config.lora_dropout:g}" if config.lora_dropout else ""
    extra += f", trained whole: {' '.join(sorted(config.modules_to_save))}" if config.modules_to_save else ""
    return f"{kind} {ranks}, alpha {config.lora_alpha:g}{extra}"
