"""Attention over packed samples, as one function that transformers calls for every layer.

A micro-batch is one row of T tokens that holds many samples end to end (`cu_seqlens`); attention must be causal within a sample and
blind across samples. Four ways, one contract:

- `flash`    flash-attn's varlen kernel (CUDA or ROCm, half precision, package installed);
- `varlen`   `torch.nn.attention.varlen` (CUDA, half precision);
- `segment`  SDPA one sample at a time (CPU: reads the segment bounds, which costs no synchronisation there);
- `mask`     SDPA under a block-diagonal causal mask: O(T^2) memory, but static shapes on any device and dtype.
"""
from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from lead_engine.config import Attention
from lead_engine.errors import UserError

NAME = "lead_engine_packed"
"""The `attn_implementation` under which transformers finds `packed_attention`."""


@dataclass
class Packing:
    """Segment bounds of one micro-batch, handed through the model to every attention layer.

    cu_seqlens: int32 [segments + 1], segment s is the token range [cu_seqlens[s], cu_seqlens[s + 1]); the last one is the dummy tail.
    """

    cu_seqlens: Tensor
    max_length: int
    kind: str
    _bounds: list[int] | None = field(default=None, init=False)
    _masks: dict[int | None, Tensor] = field(default_factory=dict, init=False)

    def bounds(self) -> list[int]:
        """Segment bounds as host integers; on the CPU only, where reading them waits for nothing."""
        if self._bounds is None:
            assert self.cu_seqlens.device.type == "cpu"
            self._bounds = self.cu_seqlens.tolist()
        return self._bounds

    def mask(self, length: int, window: int | None) -> Tensor:
        """Bool [length, length], True where query i may see key j: same segment, j <= i, i - j < window."""
        if window not in self._masks:
            place = torch.arange(length, device=self.cu_seqlens.device)
            segment = torch.searchsorted(self.cu_seqlens, place.to(self.cu_seqlens.dtype), right=True)
            allowed = (segment[:, None] == segment[None, :]) & (place[:, None] >= place[None, :])
            if window is not None:
                allowed &= place[:, None] - place[None, :] < window
            self._masks[window] = allowed
        return self._masks[window]


def choose_attention(requested: Attention, device: torch.device, dtype: torch.dtype) -> str:
    """The attention kind for a device and compute dtype.

    Raises UserError if the requested kind cannot run there.
    """
    half_on_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    possible = {
        "flash": half_on_gpu and importlib.util.find_spec("flash_attn") is not None,
        "varlen": half_on_gpu,
        "segment": device.type == "cpu",
        "mask": True,
    }
    if requested == "auto":
        return next(kind for kind, works in possible.items() if works)
    if not possible[requested]:
        works = ", ".join(kind for kind, works in possible.items() if works)
        raise UserError(f"--runtime.attention {requested}: cannot run here ({device.type}, {dtype}); possible: {works}")
    return requested


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within each segment.

    Args: query [1, heads, T, D]; key, value [1, kv_heads, T, D]. Returns [1, T, heads, D] and no weights.
    Raises UserError for attention variants that the chosen kind does not compute (soft-capped scores, sinks).
    """
    if s_aux is not None or (softcap is not None and packing.kind != "flash"):
        name = type(module).__name__
        raise UserError(f"--runtime.attention {packing.kind}: {name} uses soft-capped scores or sinks, which it does not compute")
    if packing.kind == "segment":
        return _segment(query, key, value, packing, scaling, sliding_window), None
    if packing.kind == "mask":
        mask = packing.mask(query.shape[2], sliding_window)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=key.shape[1] != query.shape[1])
        return out.transpose(1, 2), None
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    kernel = _flash if packing.kind == "flash" else _varlen
    return kernel(*rows, packing, scaling, sliding_window, softcap)[None], None


AttentionInterface.register(NAME, packed_attention)


def _segment(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None) -> Tensor:
    bounds = packing.bounds()
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    # split (whose backward is one cat) instead of slices (each of whose backwards would fill a whole [T] gradient with zeros)
    parts = list(zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True))
    tail = parts.pop()
    outputs = [_causal(q, k, v, scaling, window) for q, k, v in parts if q.shape[2]]
    if tail[0].shape[2]:
        # The dummy segment: nobody reads it, but it must hang on all three. In an empty micro-batch their projections would otherwise
        # get no gradient at all, and FSDP's ranks would reduce tensors of different sizes.
        outputs.append(sum(tail).mul(0.0))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """One sample: [1, heads, L, D] -> the same."""
    length = q.shape[2]
    if window is not None and length > window:
        place = torch.arange(length)
        near = (place[:, None] >= place[None, :]) & (place[:, None] - place[None, :] < window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=scaling)
    if q.dtype == torch.float32 or length > 512:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    # The CPU's bf16 flash kernel spends most of its backward pass on a fixed cost: at 128 tokens, forward and backward take 1.6 ms
    # there and 0.4 ms as plain matrix products (fp32: 0.6 and 0.6). At 512 the two meet.
    hidden = torch.full((length, length), -torch.inf, dtype=q.dtype).triu_(1)
    scores = torch.baddbmm(hidden, q[0], k[0].transpose(1, 2), alpha=q.shape[-1] ** -0.5 if scaling is None else scaling)
    return torch.bmm(scores.softmax(-1, dtype=torch.float32).to(q.dtype), v[0])[None]


def _flash(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None, window: int | None, softcap: float | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    bounds = (packing.cu_seqlens, packing.cu_seqlens, packing.max_length, packing.max_length)
    size = (-1, -1) if window is None else (window - 1, 0)
    return flash_attn_varlen_func(q, k, v, *bounds, softmax_scale=scaling, causal=True, window_size=size, softcap=softcap or 0.0)


def _varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None, window: int | None, softcap: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    extra = _varlen_extras(varlen_attn)
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in extra:
            extra["enable_gqa"] = True
        else:  # torch 2.11 has no grouped heads here
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    size = (-1 if window is None else window - 1, 0)
    cu, longest = packing.cu_seqlens, packing.max_length
    return varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), cu, cu, longest, longest, scale=scaling, window_size=size, **extra)


def _varlen_extras(varlen_attn: Callable) -> dict[str, bool]:
    """{"enable_gqa": False} where this torch's varlen_attn takes it (2.12 and later), else {}."""
    return {"enable_gqa": False} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
