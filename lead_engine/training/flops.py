"""Model FLOPs of a training step, exactly from its plan, and the share of the hardware's peak that they are (MFU).

Counted is what the mathematics of the step needs (PaLM, arXiv 2204.02311, appendix B), each multiply-add as two:

- every matrix of the blocks, once a token: 2 for the forward product, 2 for the gradient of its input, 2 for its own
  gradient. A frozen matrix has no gradient of its own (4, as LoRA's base has), one whose input depends on nothing
  trained has no gradient of its input;
- the experts of a mixture: only those a token is sent to;
- attention: 12 x heads x head_dim for every pair of a query and a key it may see. A sample of L tokens has
  L (L + 1) / 2 pairs, fewer under a sliding window; packed samples do not see each other, so a micro-batch has its
  samples' pairs and no more;
- the LM head, once a response token: the engine computes no other rows.

Not counted: recomputation by activation checkpointing, padding and dummy rows, norms, softmax, the optimizer,
selection. docs/METRICS.md has the formula with an example.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lead_engine.model.packed import PackedLM

PEAKS = {
    # Part of the device's name, lower case; the first that fits -> dense bf16 TFLOP/s (no sparsity), from the makers'
    # data sheets.
    "gb300": 2500.0,
    "gb200": 2500.0,
    "b300": 2250.0,
    "b200": 2250.0,
    "gh200": 989.0,
    "h200": 989.0,
    "h100 pcie": 756.0,
    "h100 nvl": 835.0,
    "h100": 989.0,
    "h800": 989.0,
    "h20": 148.0,
    "a100": 312.0,
    "a800": 312.0,
    "a10g": 70.0,
    "a10": 125.0,
    "a40": 149.7,
    "a30": 165.0,
    "l40s": 362.0,
    "l40": 181.0,
    "l4": 121.0,
    "rtx 6000 ada": 364.0,
    "rtx 4090": 165.2,
    "rtx 3090": 71.0,
    "mi355x": 2500.0,
    "mi350x": 2300.0,
    "mi325x": 1307.4,
    "mi300x": 1307.4,
    "mi300a": 980.6,
    "mi250x": 383.0,
    "mi250": 362.1,
}


@dataclass(frozen=True)
class Peak:
    """The figure that MFU is a share of."""

    tflops: float | None
    """Of one device, TFLOP/s; None where none is known: then no MFU is reported."""
    reason: str


def find_peak(device: torch.device) -> Peak:
    """The peak of one rank's device, its data sheet's where it is known."""
    if device.type != "cuda":
        return Peak(None, "none is known of a CPU")
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> Peak:
    """Dense bf16 peak of a device by its name."""
    words = name.lower().replace("-", " ")
    for part, tflops in PEAKS.items():
        if part in words:
            return Peak(tflops, f"data sheet of {name}, dense bf16")
    return Peak(None, f"{name} is not in the table of lead_engine/training/flops.py; add it there")


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of forward and backward pass, as sums over what is trained."""

    per_token: int
    """Matrices of the blocks."""
    per_row: int
    """LM head, for each response token."""
    attention: tuple[tuple[int | None, int], ...]
    """(window, FLOPs for each pair of query and visible key), summed over layers of one window.

    A window of None is the whole past.
    """

    @staticmethod
    def of(model: PackedLM) -> ModelFlops:
        """Read off a model's modules and config; sharded or whole, with or without adapters.
        Reads no tensor's values.
        """
        text = model.config.get_text_config()
        dead = _inputs_without_gradient(model)
        per_token = sum(m.flops(name not in dead) for name, m in _matrices(model.decoder, text))
        per_row = sum(m.flops(True) for _, m in _matrices(model.head, text))
        windows: dict[int | None, int] = {}
        for window in _windows(text):
            windows[window] = windows.get(window, 0) + 12 * text.num_attention_heads * _head_dim(text)
        return ModelFlops(per_token, per_row, tuple(windows.items()))

    def samples(self, lengths: Tensor, rows: Tensor) -> Tensor:
        """FLOPs of each sample: float64, of the shape of `lengths` (tokens) and `rows` (response tokens)."""
        lengths = lengths.double()
        total = self.per_token * lengths + self.per_row * rows.double()
        for window, per_pair in self.attention:
            total += per_pair * visible_pairs(lengths, window)
        return total


def visible_pairs(lengths: Tensor, window: int | None) -> Tensor:
    """Pairs (query, key) with key <= query < key + window in samples of so many tokens: float64, of the same shape."""
    lengths = lengths.double()
    seen = lengths if window is None else lengths.clamp(max=window)
    # The first `seen` queries see 1, 2, ... keys; the others `window` each.
    return seen * (seen + 1) / 2 + (lengths - seen) * seen


def utilisation(flops: float, seconds: float, devices: int, peak: Peak) -> float | None:
    """MFU: model FLOPs over what `devices` could have done in that time; None where no peak is known."""
    if peak.tflops is None or seconds <= 0:
        return None
    return flops / (seconds * devices * peak.tflops * 1e12)


@dataclass(frozen=True)
class _Matrix:
    numel: float
    """Multiply-adds a token."""
    trained: bool

    def flops(self, input_gradient: bool) -> int:
        return round(self.numel * (2 + 2 * input_gradient + 2 * self.trained))


def _matrices(module: nn.Module, text: PretrainedConfig) -> Iterator[tuple[str, _Matrix]]:
    """The matrices that a token is multiplied with, each once.

    Linear layers (by their features: a 4-bit weight is stored flat), other two-dimensional parameters that are no table
    (routers), and stacks of experts, of which a token meets some.
    """
    for name, owner in module.named_modules():
        if isinstance(owner, nn.Linear):
            # In a list of experts, each a module of its own, a token meets as large a share as it does of a stack.
            share = text.num_experts_per_tok / _number_of_experts(text) if ".experts." in f".{name}." else 1
            yield name, _Matrix(owner.in_features * owner.out_features * share, owner.weight.requires_grad)
        elif not isinstance(owner, nn.Embedding):
            for own, parameter in owner.named_parameters(recurse=False):
                if parameter.ndim == 2:
                    yield f"{name}.{own}", _Matrix(parameter.numel(), parameter.requires_grad)
                elif parameter.ndim == 3:
                    share = text.num_experts_per_tok / parameter.shape[0]
                    yield f"{name}.{own}", _Matrix(parameter.numel() * share, parameter.requires_grad)


def _number_of_experts(text: PretrainedConfig) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return int(next(getattr(text, name) for name in names if getattr(text, name, None)))


def _inputs_without_gradient(model: PackedLM) -> set[str]:
    """Names (in the decoder) of linear layers whose input depends on nothing trained.

    They read the first block's input, where the embedding and the norm before it are frozen.
    """
    first = model.decoder.layers[0]
    norm = getattr(first, "input_layernorm", None)
    upstream = [model.decoder.embed_tokens, *([norm] if norm is not None else [])]
    if any(p.requires_grad for part in upstream for p in part.parameters()):
        return set()
    own = {id(module) for name, module in first.named_modules() if _reads_block_input(name)}
    return {name for name, module in model.decoder.named_modules() if id(module) in own}


def _reads_block_input(name: str) -> bool:
    """Query, key and value projections, fused or not, and the A of their adapters; not B, whose input depends on A."""
    words = name.split(".")
    return (
        words[0] == "self_attn"
        and len(words) > 1
        and words[1].startswith(("q", "k", "v", "W"))
        and "lora_B" not in words
    )


def _head_dim(text: PretrainedConfig) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _windows(text: PretrainedConfig) -> list[int | None]:
    """Each layer's sliding window."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return [window] * text.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds[: text.num_hidden_layers]]
