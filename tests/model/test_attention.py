"""Soft-capped attention: the three forms agree, with windows and shared key heads; what no form computes is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lead_engine.base.errors import UserError
from lead_engine.model.attention import Packing, packed_attention
from lead_engine.model.softcap import packed_blocks

CU = [0, 5, 5, 26, 40, 48]
"""Samples of 5, 0, 21 and 14 tokens, and a tail of 8."""
CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is here")
)


def inputs(device: str, dtype: torch.dtype, width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 48, width), (1, 2, 48, width), (1, 2, 48, width)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def attend(kind: str, qkv: list[Tensor], window: int | None, softcap: float | None = 0.7) -> Tensor:
    packing = Packing(torch.tensor(CU, dtype=torch.int32, device=qkv[0].device), 21, kind)
    return packed_attention(
        nn.Identity(), *qkv, None, packing=packing, scaling=0.4, sliding_window=window, softcap=softcap
    )[0][:, : CU[-2]]


def by_hand(qkv: list[Tensor], window: int | None, softcap: float) -> Tensor:
    """A query at a time."""
    q, k, v = (x[0] for x in qkv)
    out = torch.zeros(CU[-2], 4, q.shape[-1], dtype=q.dtype)
    for start, end in itertools.pairwise(CU[:-1]):
        for i in range(start, end):
            low = start if window is None else max(start, i - window + 1)
            for head in range(4):
                scores = softcap * torch.tanh(0.4 * k[head // 2, low : i + 1] @ q[head, i] / softcap)
                out[i, head] = scores.softmax(0) @ v[head // 2, low : i + 1]
    return out[None]


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kind", ["segment", "mask", "varlen"])
def test_soft_caps(kind: str, window: int | None) -> None:
    """`varlen` is FlexAttention here, not compiled on a CPU."""
    qkv = inputs("cpu", torch.float64)
    torch.testing.assert_close(attend(kind, qkv, window), by_hand(qkv, window, 0.7), rtol=1e-6, atol=1e-7)
    assert (attend("mask", qkv, window, softcap=None) - by_hand(qkv, window, 0.7)).abs().max() > 0.05


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("window", [None, 6])
def test_soft_caps_on_a_gpu(device: str, window: int | None) -> None:
    """The compiled kernel, forward and backward, as near to float64 as the masked form in bf16."""
    exact, flex, masked = (
        [x.requires_grad_() for x in inputs(device, dtype)] for dtype in (torch.float64, torch.bfloat16, torch.bfloat16)
    )
    found = []
    for kind, qkv in (("mask", exact), ("varlen", flex), ("mask", masked)):
        out = attend(kind, qkv, window)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view_as(out))
        found.append([out.detach().double(), *(x.grad.double() for x in qkv)])
    for truth, ours, other in zip(*found, strict=True):
        assert (ours - truth).abs().max() <= 1.5 * (other - truth).abs().max() + 1e-3


def test_blocks_read_nothing() -> None:
    with FakeTensorMode():
        packing = Packing(torch.tensor(CU, dtype=torch.int32), 21, "varlen")
        blocks = packed_blocks(packing._segments(48)[1], 6)
        assert blocks.kv_num_blocks.shape == (1, 1, 1)


@pytest.mark.parametrize("kind", ["segment", "mask", "varlen", "flash"])
def test_sinks_are_refused(kind: str) -> None:
    packing = Packing(torch.tensor(CU, dtype=torch.int32), 21, kind)
    with pytest.raises(UserError, match="sinks"):
        packed_attention(nn.Identity(), *inputs("cpu", torch.float32), None, packing=packing, s_aux=torch.zeros(4))
