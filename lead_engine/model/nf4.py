"""Frozen linear layers in 4 bits (NF4 with double quantisation, QLoRA, arXiv 2305.14314), sharded by FSDP2.

bitsandbytes keeps what it takes to read its 4-bit weights in attributes of a tensor subclass, which unsharding loses.
Here all of it is plain tensors of the module. Blocks of 64 weights lie within a row and FSDP shards rows, so every rank
quantises its own rows of the checkpoint; the second quantisation, of the blocks' scales, spans the whole weight: they
are gathered for it, a 64th of the weight. So the result does not depend on the number of ranks, and is what
`bitsandbytes.nn.Linear4bit(compress_statistics=True, quant_type="nf4")` holds.

Memory: 4 bits a weight, 8 / 64 of its block's scale, 32 / (64 x 256) of the scale's scale: 4.127 bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from lead_engine.base.errors import UserError
from lead_engine.model.bnb import bitsandbytes_functional
from lead_engine.model.shards import local_part, shards_integers, whole

FLAG = "--lora.quantize nf4"
CONFIG = "quantization_config.json"
"""The file beside an adapter that says that its base is in 4 bits.

It holds the arguments of `transformers.BitsAndBytesConfig` that load that base.
"""
_BLOCK, _NESTED_BLOCK = 64, 256

Rows = Callable[[Tensor, tuple[slice, slice]], None]
"""Fills a tensor with the part of a weight [out, in] that lies at these rows and columns."""


class NF4Linear(nn.Linear):
    """y = x W^T + bias with W [out, in] in 4 bits, both frozen: gradients reach x alone. Computes in x's dtype.

    `weight` and `scale_codes` are parameters, so that FSDP shards and gathers them (as they are: mixed precision casts
    floats only). The buffers are the same on all ranks; they are worked out again from the checkpoint whenever the
    model is built.
    """

    scale_scales: Tensor
    scale_offset: Tensor
    levels: Tensor

    def __init__(self, out_features: int, in_features: int, bias: nn.Parameter | None):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight of floats
        self.out_features, self.in_features = out_features, in_features
        codes, scales = (
            torch.empty(out_features, n, dtype=torch.uint8, device="meta")
            for n in (in_features // 2, in_features // _BLOCK)
        )
        self.weight = nn.Parameter(codes, requires_grad=False)
        """uint8 [out, in / 2]: two weights' codes a byte."""
        self.scale_codes = nn.Parameter(scales, requires_grad=False)
        """uint8 [out, in / 64]: of the blocks' largest magnitudes."""
        self.bias = bias  # type: ignore[assignment]  # nn.Linear declares it as never None
        nested = -(-scales.numel() // _NESTED_BLOCK)
        self.register_buffer("scale_scales", torch.zeros(nested), persistent=False)
        self.register_buffer("scale_offset", torch.zeros(()), persistent=False)
        self.register_buffer("levels", _levels(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # torch does not annotate Function.apply.
        product: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, self.bias, self.weight, self.scale_codes, self.scale_scales, self.scale_offset, self.levels
        )
        return product

    @property
    def shape(self) -> tuple[int, int]:
        """Of W, as it stands in a checkpoint."""
        return self.out_features, self.in_features

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W, dequantised: [out, in]; a collective where the layer is sharded (and not gathered by FSDP)."""
        codes, scale_codes = whole(self.weight), whole(self.scale_codes)
        return dequantize(codes, scale_codes, self.scale_scales, self.scale_offset, self.levels, dtype)

    @torch.no_grad()
    def fill(self, read: Rows) -> None:
        """Quantise this rank's rows; a collective where the layer is sharded."""
        codes, (rows, _) = local_part(self.weight)
        weight = torch.empty(codes.shape[0], self.in_features, device=codes.device)
        if weight.numel():
            read(weight, (rows, slice(0, self.in_features)))
        own_codes, own_scales = _quantize(weight)
        codes.copy_(own_codes)
        scales, self.scale_scales[...], self.scale_offset[...] = _quantize_scales(
            _whole(own_scales, self.scale_codes), self.levels
        )
        local_part(self.scale_codes)[0].copy_(scales[rows])


class _Product(torch.autograd.Function):
    """x W^T + bias. W is dequantised in the forward pass and once more in the backward pass, never kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        scale_codes: Tensor,
        scale_scales: Tensor,
        scale_offset: Tensor,
        levels: Tensor,
    ) -> Tensor:
        weight = (codes, scale_codes, scale_scales, scale_offset, levels)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*weight)
        return nn.functional.linear(x, dequantize(*weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inward = None
        if ctx.needs_input_grad[0]:
            codes, scale_codes, scale_scales, scale_offset, levels = ctx.saved_tensors
            weight = dequantize(codes, scale_codes, scale_scales, scale_offset, levels, gradient.dtype)
            inward = gradient @ weight
        return inward, None, None, None, None, None, None


def dequantize(
    codes: Tensor, scale_codes: Tensor, scale_scales: Tensor, scale_offset: Tensor, levels: Tensor, dtype: torch.dtype
) -> Tensor:
    """A weight [out, in] from what an NF4Linear holds."""
    shape = [codes.shape[0], 2 * codes.shape[1]]
    scales = torch.ops.bitsandbytes.dequantize_blockwise(
        scale_codes.reshape(-1), scale_scales, levels, _NESTED_BLOCK, torch.float32
    )
    whole_scales = scales + scale_offset
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes.view(-1, 1), whole_scales, _BLOCK, "nf4", shape, dtype
    )
    return weight


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n, in] -> codes uint8 [n, in / 2], scales fp32 [n, in / 64]; n may be 0."""
    rows, columns = weight.shape
    if not weight.numel():
        return weight.new_empty(rows, columns // 2, dtype=torch.uint8), weight.new_empty(rows, columns // _BLOCK)
    codes, scales = torch.ops.bitsandbytes.quantize_4bit(weight, _BLOCK, "nf4", torch.uint8)
    return codes.view(rows, -1), scales.view(rows, -1)


def _quantize_scales(scales: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 [out, in / 64] -> codes uint8 of that shape, their scales fp32 [k], what was taken off before: fp32, 0-d."""
    flat = scales.reshape(-1)
    offset = flat.mean()
    codes, nested = torch.ops.bitsandbytes.quantize_blockwise(flat - offset, levels.to(flat.device), _NESTED_BLOCK)
    return codes.view(scales.shape), nested, offset


def _whole(local: Tensor, like: Tensor) -> Tensor:
    """The tensor of which `local` is this rank's part, where `like` is sharded; a collective."""
    if not isinstance(like, DTensor):
        return local
    shape, stride = like.shape, (like.shape[1], 1)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()


def _levels() -> Tensor:
    """The 256 numbers that codes of scales stand for."""
    levels: Tensor = bitsandbytes_functional(FLAG).create_dynamic_map(signed=True)
    return levels


def quantize_blocks(model: PreTrainedModel, *, sharded: bool) -> None:
    """Put an NF4Linear, not yet filled, in the place of every frozen linear layer of the blocks.

    Layers that are trained stay as they are.

    Raises UserError where bitsandbytes is missing, where torch's FSDP cannot shard integers, and for blocks whose
    weights cannot all be quantised.
    """
    if sharded and not shards_integers():
        raise UserError(
            f"{FLAG}: FSDP shards and offloads integers from torch 2.12 on, and this is {torch.__version__}; "
            "train on one rank without --runtime.offload, or pip install 'torch>=2.12'"
        )
    for name, layer in _linear_layers(model):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, NF4Linear(layer.out_features, layer.in_features, layer.bias))


@torch.no_grad()
def round_blocks(model: PreTrainedModel) -> None:
    """Replace the weights that `quantize_blocks` would quantise by their values in 4 bits.

    In place, in their own dtype.
    """
    levels = _levels()
    for _, layer in _linear_layers(model):
        codes, scales = _quantize(layer.weight.float())
        weight = dequantize(codes, *_quantize_scales(scales, levels), levels.to(scales.device), layer.weight.dtype)
        layer.weight.copy_(weight)


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Name and layer of the blocks' linear layers but adapters and those that are trained whole (modules to save).

    Raises UserError for those that NF4 cannot hold.
    """
    blocks = model.get_decoder().layers  # type: ignore[no-untyped-call]  # transformers has no annotations here
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    names = [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear) and "lora_" not in name]
    for name, parameter in blocks.named_parameters():
        if parameter.ndim >= 2 and "lora_" not in name and name.rpartition(".")[0] not in names:
            raise UserError(
                f"{FLAG}: {prefix}.{name} is a weight {list(parameter.shape)} of no linear layer (a mixture's "
                "experts?), which bitsandbytes cannot quantise; train this model with --lora.quantize none"
            )
    for name in names:
        layer = blocks.get_submodule(name)
        if hasattr(model, "peft_config") and layer.weight.requires_grad:
            continue
        if layer.in_features % _BLOCK:
            raise UserError(
                f"{FLAG}: {prefix}.{name.removesuffix('.base_layer')} has {layer.in_features} inputs, no multiple of "
                f"{_BLOCK}, the weights that share a scale; train this model with --lora.quantize none"
            )
        yield f"{prefix}.{name}", layer


def layers(model: nn.Module) -> Iterator[tuple[str, NF4Linear]]:
    """Name and module of every NF4Linear."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, NF4Linear))


def was_trained_on(folder: Path | None) -> bool:
    """Whether the adapter in `folder` was trained on a 4-bit base."""
    return folder is not None and (folder / CONFIG).exists()


def write_config(folder: Path, dtype: torch.dtype) -> None:
    """Say beside an adapter that its base is in 4 bits."""
    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
