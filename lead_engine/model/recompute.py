"""Activation checkpointing: which of a block's activations are kept, and which are computed again.

`full` keeps a block's input and nothing else. `selective` also keeps what costs most to compute, the outputs of matrix
products and of attention kernels, and computes norms, rotary embeddings and elementwise work again. Gradients are those
of `none`, bit for bit in eager mode: the same operations see the same numbers twice.

`block.forward` is replaced, not the block: parameter names stay, and the hooks that FSDP puts around the call stay
outside of what runs twice (they would gather the block's parameters twice).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lead_engine.config import Checkpointing
from lead_engine.model.dropout import draws_random_numbers

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._grouped_mm.default,  # a mixture's experts
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._flash_attention_forward.default,
}
"""Operators whose outputs `selective` keeps.

Not bmm and baddbmm: those make attention scores, of which there are L x L.
"""
KEPT_BY_NAME = (
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "lead_engine::segment_attention",
    "transformers::grouped_mm_fallback",
)
"""The same of libraries that may be missing or register their operators late; by name, without overload."""


def recompute(block: nn.Module, mode: Checkpointing) -> None:
    """Make `block` recompute in its backward pass, in place; `none` leaves it alone.

    Forward passes without gradients run as they are.
    """
    if mode == "none":
        return
    # The second forward pass must be given the first one's random numbers, if there are any: it costs a copy of the
    # generator's state.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws_random_numbers(block)}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep_products)
    block.forward = _checkpointed(block.forward, options)


def keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of `selective`."""
    kept = operator in KEPT or getattr(operator, "name", str)().rsplit(".", 1)[0] in KEPT_BY_NAME
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return call
