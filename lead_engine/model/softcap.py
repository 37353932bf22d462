"""Soft-capped attention (Gemma 2): softmax over `cap * tanh(score / cap)`.

Neither SDPA nor torch's varlen kernel computes it.

On a CPU, and under a mask, the products are written out. On a GPU that would cost heads x T x T scores a layer, several
times over for the backward pass (T = 8192, 8 heads, fp32: 2 GiB each); FlexAttention fuses cap, window and segments
into one kernel of O(T) memory that skips blocks between samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def capped_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scaling: float | None, softcap: float) -> Tensor:
    """Attention under a bool mask [L, L], softmax in fp32.

    q [1, heads, L, D], k and v [1, kv_heads, L, D] -> [1, heads, L, D].
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    shares = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32)
    return torch.matmul(shares.to(v.dtype), v)


def flex_capped_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask, scaling: float | None, softcap: float
) -> Tensor:
    """The same by FlexAttention, under a block mask."""

    def cap(score: Tensor, _batch: Tensor, _head: Tensor, _i: Tensor, _j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    # Not compiled it would hold all scores; inside a block that is being compiled it becomes part of that.
    kernel: Callable[..., Tensor] = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        kernel = _compiled_flex()
    return kernel(q, k, v, score_mod=cap, block_mask=blocks, scale=scaling, enable_gqa=k.shape[1] != q.shape[1])


def packed_blocks(segment: Tensor, window: int | None) -> BlockMask:
    """FlexAttention's mask: causal within a segment and a window.

    segment: int [T], the segment of each token; nothing is read from it.
    """

    def visible(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (segment[i] == segment[j]) & (i >= j)
        return seen if window is None else seen & (i - j < window)

    return create_block_mask(visible, None, None, len(segment), len(segment), device=segment.device)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)
