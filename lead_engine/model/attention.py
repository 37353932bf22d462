"""Attention over packed samples, as one function that transformers calls for every layer.

A micro-batch is one row of T tokens that holds many samples end to end (`cu_seqlens`); attention must be causal within
a sample and blind across samples. Four ways, one contract:

- `flash`    flash-attn's varlen kernel (CUDA or ROCm, half precision, package installed);
- `varlen`   `torch.nn.attention.varlen` (CUDA, half precision);
- `segment`  SDPA one sample at a time (CPU: reads the segment bounds, which costs no synchronisation there);
- `mask`     SDPA under a block-diagonal causal mask: O(T^2) memory, but static shapes on any device and dtype.

Layers with soft-capped scores take another way where the kind's own has no cap: softcap.py.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from lead_engine.base.errors import UserError
from lead_engine.config import Attention
from lead_engine.model.segment_attention import segment_attention, traceable_segment_attention
from lead_engine.model.softcap import capped_attention, flex_capped_attention, packed_blocks

NAME = "lead_engine_packed"
"""The `attn_implementation` under which transformers finds `packed_attention`."""


SEGMENT_QUANTUM = 32
"""Segments that the kernels are launched for are a multiple of this, so that few shapes appear."""
LENGTH_QUANTUM = 128
"""The same of the longest segment's tokens; the kernels' blocks have 64 or 128 rows."""


class Held(NamedTuple):
    """What a micro-batch holds, known on the host."""

    slots: int
    """Up to the last one with a sample; those after it are empty."""
    tokens: int
    """Of all samples."""
    longest: int
    """Tokens of the longest sample; 0 without any."""


@dataclass
class Packing:
    """Segment bounds of one micro-batch, handed through the model to every attention layer.

    cu_seqlens: int32 [segments + 1], segment s is the token range [cu_seqlens[s], cu_seqlens[s + 1]); the last one is
    the dummy tail. max_length: no sample is longer. length: T, the token places; the flash and varlen kernels need it.
    held: what is known of the micro-batch on the host; these kernels are then launched for little more.
    """

    cu_seqlens: Tensor
    max_length: int
    kind: str
    length: int | None = None
    held: Held | None = None
    kernel_bounds: Tensor | None = field(default=None, init=False)
    """`cu_seqlens` for kernels that are told the longest segment: see `split_tail`. None for the other kinds."""
    longest: int = field(default=0, init=False)
    """Of the segments in `kernel_bounds`, none is longer."""
    _bounds: list[int] | None = field(default=None, init=False)
    _masks: dict[int | None, Tensor] = field(default_factory=dict, init=False)
    _blocks: dict[int | None, BlockMask] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.kind in ("flash", "varlen") and self.length is not None:
            self.longest = self.max_length
            if self.held is not None:  # as many rows as the kernels' blocks have anyway
                self.longest = min(_rounded(self.held.longest, LENGTH_QUANTUM), self.length)
            self.kernel_bounds = split_tail(self.cu_seqlens, self.length, self.longest, self.held)

    def bounds(self) -> list[int]:
        """Segment bounds as host integers; on the CPU only, where reading them waits for nothing."""
        if self._bounds is None:
            assert self.cu_seqlens.device.type == "cpu"
            self._bounds = self.cu_seqlens.tolist()
        return self._bounds

    def mask(self, length: int, window: int | None) -> Tensor:
        """Bool [length, length], True where query i may see key j: same segment, j <= i, i - j < window."""
        if torch.compiler.is_compiling():
            # In every compiled layer: one kept would be an output of that layer's graph.
            return self._make_mask(length, window)
        if window not in self._masks:
            self._masks[window] = self._make_mask(length, window)
        return self._masks[window]

    def _make_mask(self, length: int, window: int | None) -> Tensor:
        place, segment = self._segments(length)
        allowed = (segment[:, None] == segment[None, :]) & (place[:, None] >= place[None, :])
        if window is not None:
            allowed &= place[:, None] - place[None, :] < window
        return allowed

    def blocks(self, length: int, window: int | None) -> BlockMask:
        """The same mask for FlexAttention."""
        if window not in self._blocks:
            self._blocks[window] = packed_blocks(self._segments(length)[1], window)
        return self._blocks[window]

    def _segments(self, length: int) -> tuple[Tensor, Tensor]:
        """(0 .. length - 1, the segment that each of these tokens lies in)."""
        place = torch.arange(length, device=self.cu_seqlens.device)
        return place, torch.searchsorted(self.cu_seqlens, place.to(self.cu_seqlens.dtype), right=True)


def _rounded(count: int, quantum: int) -> int:
    return max(1, -(-count // quantum)) * quantum


def split_tail(cu_seqlens: Tensor, length: int, max_length: int, held: Held | None = None) -> Tensor:
    """`cu_seqlens` with the dummy tail cut into pieces of at most `max_length` tokens.

    The flash kernels start blocks for `max_length` tokens of every segment. Of a longer one they never write the rest:
    output and gradients there are uninitialised memory, which reaches every weight through the projections.

    The kernels also start blocks for every empty segment. Without `held` their number depends on the shape alone: as
    many as there are slots, and as many pieces as the whole length could need. With it, they are what the micro-batch
    has, its slots beyond the last sample left out, rounded up to SEGMENT_QUANTUM.

    cu_seqlens: int32 [segments + 1], the last segment being the tail; length: its last value. Returns int32
    [segments + ceil(length / max_length)], or [n * SEGMENT_QUANTUM + 1] with `held`.
    """
    slots, pieces = cu_seqlens.shape[0] - 2, -(-length // max_length)
    if held is not None:
        slots, pieces = held.slots, -(-(length - held.tokens) // max_length)
        pieces = _rounded(slots + pieces, SEGMENT_QUANTUM) - slots
    steps = torch.arange(1, pieces + 1, device=cu_seqlens.device, dtype=cu_seqlens.dtype) * max_length
    return torch.cat([cu_seqlens[: slots + 1], (cu_seqlens[slots] + steps).clamp_(max=length)])


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
    Raises UserError for attention sinks, which no kind computes.
    """
    if s_aux is not None:
        raise UserError(
            f"--model: {type(module).__name__} has attention sinks, which packed attention does not compute"
        )
    kind, tracing = packing.kind, torch.compiler.is_compiling()
    # Soft-capped and traced: the mask's form below is the same.
    if kind == "segment" and not (tracing and softcap is not None):
        if tracing:
            return traceable_segment_attention(query, key, value, packing.cu_seqlens, scaling, sliding_window), None
        return segment_attention(query, key, value, packing.bounds(), scaling, sliding_window, softcap), None
    if kind == "varlen" and softcap is not None:
        blocks = packing.blocks(query.shape[2], sliding_window)
        return flex_capped_attention(query, key, value, blocks, scaling, softcap).transpose(1, 2), None
    if kind in ("mask", "segment"):
        mask = packing.mask(query.shape[2], sliding_window)
        if softcap is not None:
            return capped_attention(query, key, value, mask, scaling, softcap).transpose(1, 2), None
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
        return out.transpose(1, 2), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if kind == "flash":
        return _flash(q, k, v, packing, scaling, sliding_window, softcap)[None], None
    return _varlen(q, k, v, packing, scaling, sliding_window)[None], None


AttentionInterface.register(NAME, packed_attention)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    bounds = (packing.kernel_bounds, packing.kernel_bounds, packing.longest, packing.longest)
    size = (-1, -1) if window is None else (window - 1, 0)
    found: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        *bounds,
        softmax_scale=scaling,
        causal=True,
        window_size=size,
        softcap=softcap or 0.0,
        deterministic=_deterministic(),
    )
    return found


def _deterministic() -> bool:
    """Whether backward passes add up in one order: PyTorch's own switch, which its varlen kernel follows by itself."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    extra = _varlen_extras(varlen_attn)
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in extra:
            extra["enable_gqa"] = True
        else:  # torch 2.11 has no grouped heads here
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    size = (-1 if window is None else window - 1, 0)
    cu, longest = packing.kernel_bounds, packing.longest
    attend: Callable[..., Any] = varlen_attn
    # Without an auxiliary request it returns the output alone.
    found: Tensor = attend(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cu,
        cu,
        longest,
        longest,
        scale=scaling,
        window_size=size,
        **extra,
    )
    return found


def _varlen_extras(varlen_attn: Callable[..., Any]) -> dict[str, bool]:
    """{"enable_gqa": False} where this torch's varlen_attn takes it (2.12 and later), else {}."""
    return {"enable_gqa": False} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
