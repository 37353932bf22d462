"""Attention over packed samples, one sample at a time, for the CPU.

Reading the segments' bounds waits for nothing there.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lead_engine.model.softcap import capped_attention


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: list[int],
    scaling: float | None,
    window: int | None,
    softcap: float | None = None,
) -> Tensor:
    """[1, heads, T, D] -> [1, T, heads, D]; segment s is [bounds[s], bounds[s + 1]), the last one the dummy tail."""
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    # split (whose backward is one cat) instead of slices (each of whose backwards would fill a whole [T] gradient with
    # zeros)
    parts = list(zip(*(torch.split(x, sizes, dim=2) for x in (query, key, value)), strict=True))
    tail = parts.pop()
    outputs = [_causal(q, k, v, scaling, window, softcap) for q, k, v in parts if q.shape[2]]
    if tail[0].shape[2]:
        # The dummy segment: nobody reads it, but it must hang on all three. In an empty micro-batch their projections
        # would otherwise get no gradient at all, and FSDP's ranks would reduce tensors of different sizes.
        outputs.append(sum(tail).mul(0.0))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _causal(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """One sample: [1, heads, L, D] -> the same."""
    length = q.shape[2]
    if softcap is not None or (window is not None and length > window):
        place = torch.arange(length)
        near = (place[:, None] >= place[None, :]) & (place[:, None] - place[None, :] < (window or length))
        if softcap is not None:
            return capped_attention(q, k, v, near, scaling, softcap)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=scaling)
    if q.dtype == torch.float32 or length > 512:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    # The CPU's bf16 flash kernel spends most of its backward pass on a fixed cost: at 128 tokens, forward and backward
    # take 1.6 ms there and 0.4 ms as plain matrix products (fp32: 0.6 and 0.6). At 512 the two meet.
    hidden = torch.full((length, length), -torch.inf, dtype=q.dtype).triu_(1)
    scores = torch.baddbmm(
        hidden, q[0], k[0].transpose(1, 2), alpha=q.shape[-1] ** -0.5 if scaling is None else scaling
    )
    return torch.bmm(scores.softmax(-1, dtype=torch.float32).to(q.dtype), v[0])[None]


@torch.library.custom_op("lead_engine::segment_attention", mutates_args=())
def traceable_segment_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """The same as one operator, which torch.compile takes into its graph unopened.

    A loop over bounds cannot be traced.
    """
    return segment_attention(query, key, value, cu_seqlens.tolist(), scaling, window).contiguous()


@traceable_segment_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    _, heads, length, width = query.shape
    return query.new_empty(1, length, heads, width)


@torch.library.custom_op("lead_engine::segment_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, all contiguous; arithmetic is fp32."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    found = [torch.zeros(x.shape, dtype=torch.float32) for x in (query, key, value)]
    # The last segment is the dummy tail, whose output is 0 whatever goes in.
    for start, end in itertools.pairwise(cu_seqlens.tolist()[:-1]):
        if start == end:
            continue
        q, k, v = (x[0, :, start:end].float() for x in (query, key, value))
        k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
        upstream = gradient[0, start:end].transpose(0, 1).float()
        place = torch.arange(end - start)
        seen = place[:, None] >= place[None, :]
        if window is not None:
            seen &= place[:, None] - place[None, :] < window
        weights = (q @ k.transpose(1, 2) * scale).masked_fill_(~seen, -torch.inf).softmax(-1)
        # d softmax(s) = p * (dp - sum(p * dp)), with dp the gradient of the weights
        of_weights = upstream @ v.transpose(1, 2)
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
        parts = (of_scores @ k, of_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ upstream)
        for whole, part in zip(found, parts, strict=True):
            # Grouped heads share their keys and values.
            whole[0, :, start:end] = part.view(whole.shape[1], -1, *part.shape[1:]).sum(1)
    of_query, of_key, of_value = (whole.to(query.dtype) for whole in found)
    return of_query, of_key, of_value


@_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, cu_seqlens, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(query, key, value, cu_seqlens)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(gradient, *ctx.saved_tensors, ctx.scaling, ctx.window), None, None, None


traceable_segment_attention.register_autograd(_differentiate, setup_context=_keep)
