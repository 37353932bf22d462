"""adapter_config.json, of the engine or of peft: which adapters are read, and why others are not.

An option that is not known to be computed here is refused by name, whatever it is: what peft adds later is never
ignored.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import peft
from peft import LoraConfig as PeftLoraConfig

from lead_engine.base.errors import UserError
from lead_engine.model.find import ADAPTER_CONFIG, find_model, hub_name

INSTEAD = "merge it into its base with peft (merge_and_unload), if peft can, and give the merged model"
READ = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "lora_bias",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
}
"""Options that are computed here, or that change nothing once an adapter is trained."""
WHY = {
    "bias": "it trains biases of the base in place, which no adapter could leave again",
    "target_parameters": "adapters on parameters that are no linear layer's (a mixture's experts) are not computed",
    "trainable_token_indices": "single rows of an embedding are not trained here; modules_to_save trains all of them",
    "layer_replication": "the base would have other layers than its config.json says",
    "ensure_weight_tying": "adapters on an embedding that is the LM head as well are not computed here",
    "alora_invocation_tokens": "it adapts a part of a sample, by its tokens",
}
SAFE_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to draw new adapters that leave the base as it is."""


def read_config(folder: Path) -> PeftLoraConfig:
    """The config of the LoRA adapter in `folder`.

    Raises UserError, naming the file, for adapters of another kind, for options that are not computed here, and for
    values that no adapter can have.
    """
    file, values = folder / ADAPTER_CONFIG, read_values(folder)
    if values.get("peft_type") != "LORA":
        kind = values.get("peft_type")
        what = f"an adapter of kind {kind}" if kind else "it names no peft_type"
        raise UserError(f"{file}: {what}; only LoRA is trained, evaluated and merged here; {INSTEAD}")
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{file}: task_type {values['task_type']}: only adapters of causal language models are read")
    known = {field.name: field for field in dataclasses.fields(PeftLoraConfig)}
    for name, value in values.items():
        if name in READ or _same(value, known.get(name)):
            continue
        why = WHY.get(name, f"it is not computed here (peft {peft.__version__})")
        raise UserError(f"{file}: {name} is {json.dumps(value)}: {why}; {INSTEAD}")
    init = values.get("init_lora_weights", True)
    if init not in SAFE_INITS and init is not None:
        raise UserError(
            f"{file}: init_lora_weights is {json.dumps(init)}, which changes the base's weights when the adapter is "
            f"loaded; convert it to plain LoRA (peft: path_initial_model_for_weight_conversion), or {INSTEAD}"
        )
    _check_numbers(file, values)
    drawn = {"init_lora_weights": True, "eva_config": None}  # the weights are loaded, not drawn
    options = {name: value for name, value in values.items() if name in READ and value is not None} | drawn
    del options["peft_type"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftLoraConfig(**options)
    except Exception as error:  # of any type: peft reads what it is given as it goes along
        raise UserError(f"{file}: not a config of peft's ({_first_line(error)}); {INSTEAD}") from None


def read_values(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says. Raises UserError, naming it, if it cannot be read."""
    file = folder / ADAPTER_CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # also UnicodeDecodeError
        raise UserError(f"{file}: cannot be read ({_first_line(error)}); copy or download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds no object, as an adapter's config is; copy or download it again")
    return values


def find_base(folder: Path) -> Path:
    """The folder of an adapter's base model, by the name and revision in its config.

    Raises UserError if its config does not name one, or if there is no such model.
    """
    values, file = read_values(folder), folder / ADAPTER_CONFIG
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not base or not isinstance(base, str):
        raise UserError(f"{file}: names no base_model_name_or_path; write the base model's folder or hub name there")
    named = f"{base}@{revision}" if revision and not Path(base).exists() and hub_name(Path(base)) is None else base
    return find_model(named, f"{file}: base_model_name_or_path")


def name_base(config: PeftLoraConfig, base: Path) -> None:
    """Write into a config where the base is.

    That is name and commit of a model from the hub, else the folder's absolute path.
    """
    named = hub_name(base)
    name, commit = named.split("@") if named else (str(base.resolve()), None)
    config.base_model_name_or_path, config.revision = name, commit


def _same(value: Any, field: dataclasses.Field[Any] | None) -> bool:
    """Whether a value is as good as not given."""
    default = None if field is None or field.default is dataclasses.MISSING else field.default
    return value == default or not (value or default)


def _check_numbers(file: Path, values: dict[str, Any]) -> None:
    rank, alpha, dropout = values.get("r", 8), values.get("lora_alpha", 8), values.get("lora_dropout", 0.0)
    ranks = {"r": rank, **_pattern(file, values, "rank_pattern")}
    alphas = {"lora_alpha": alpha, **_pattern(file, values, "alpha_pattern")}
    for name, value in ranks.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{file}: {name} is {json.dumps(value)}: a rank is a whole number above 0")
    for name, value in alphas.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"{file}: {name} is {json.dumps(value)}: an alpha is a finite number")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"{file}: lora_dropout is {json.dumps(dropout)}: it is a probability, 0 or more and below 1")


def _pattern(file: Path, values: dict[str, Any], name: str) -> dict[str, Any]:
    pattern = values.get(name) or {}
    if not isinstance(pattern, dict):
        raise UserError(f"{file}: {name} is {json.dumps(pattern)}: it is an object of layers' names")
    return {f"{name} of {layer}": value for layer, value in pattern.items()}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
