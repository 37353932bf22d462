"""Which transformers architectures are trained, and why others are not.

A packed forward pass that skips something (a scale after the last norm, a state carried along the row) is wrong without
any error. So only architectures are taken whose packed losses and gradients tests/model/test_architectures.py compares
with transformers' own; docs/MODELS.md has the table.
"""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PreTrainedConfig

from lead_engine.base.errors import UserError

DENSE = (
    "llama",
    "mistral",
    "ministral",
    "ministral3",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "smollm3",
    "olmo",
    "olmo2",
    "olmo3",
    "granite",
    "cohere",
    "cohere2",
    "glm",
    "glm4",
    "starcoder2",
    "seed_oss",
    "ernie4_5",
    "exaone4",
)
MIXTURES = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "glm4_moe", "dots1", "minimax_m2")
WITH_IMAGES = ("gemma3",)
"""Multimodal ones, of which the text part is trained and all else is kept."""
SUPPORTED = (*DENSE, *MIXTURES, *WITH_IMAGES)
LAYERS = {"full_attention", "sliding_attention"}
NOISE = ("dropout", "pdrop", "jitter_noise")


def check(config: PreTrainedConfig, folder: Path) -> None:
    """Raise UserError, with the reason, for a model that is not known to be trained rightly."""
    if reason := why_not(config):
        raise UserError(f"--model {folder}: a model of type {config.model_type} cannot be trained here: {reason}")


def why_not(config: PreTrainedConfig) -> str | None:
    """The reason for which a model is refused."""
    text = config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ()) - LAYERS
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, and samples are packed for decoders only"
    if getattr(config, "quantization_config", None):
        return "its checkpoint is quantised; give the one that is not (--lora.quantize nf4 quantises it while loading)"
    if layers:
        return (
            f"it has layers of other kinds than attention within a sample and its window ({', '.join(sorted(layers))})"
        )
    if getattr(text, "use_bidirectional_attention", None):
        return "its attention is bidirectional (use_bidirectional_attention)"
    if text is not config and config.model_type not in WITH_IMAGES:
        known = f"of those only {', '.join(WITH_IMAGES)} is known to be right"
        return f"it is multimodal, and {known}; give its text model alone"
    if config.model_type not in SUPPORTED:
        return f"its packed losses were never compared with transformers' own (those of {', '.join(SUPPORTED)} were)"
    return None


def noise_of(config: PreTrainedConfig) -> dict[str, float]:
    """Dropout and router noise that a config asks for, by name."""
    values = config.get_text_config().to_dict().items()
    return {name: value for name, value in values if name.endswith(NOISE) and isinstance(value, float) and value > 0}


def as_trained(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy with dropout and router noise at 0, and without router logits, which only the auxiliary loss would want.

    Losses would otherwise depend on a random state that no checkpoint keeps, and packed attention has no dropout.
    Almost every published model has them at 0 (phi-2: 0.1).
    """
    copied = copy.deepcopy(config)
    text = copied.get_text_config()
    for name in noise_of(config):
        setattr(text, name, 0.0)
    if getattr(text, "output_router_logits", False):
        text.output_router_logits = False
    return copied


def experts_option(config: PreTrainedConfig) -> dict[str, str]:
    """How a mixture computes its experts: one grouped product, whatever the routing.

    transformers' plain loop asks the device which experts were hit (`nonzero`), once a layer; `batched_mm` copies an
    expert's weights for every token. The grouped product reads nothing, and gives every expert a gradient, so that
    ranks always reduce the same parameters.
    """
    return {"experts_implementation": "grouped_mm"} if config.model_type in MIXTURES else {}
