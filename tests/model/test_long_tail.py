"""Micro-batches whose dummy tail is longer than any sample, under kernels that are told the longest segment."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen

from lead_engine.config import BatchConfig, RuntimeConfig, SelectionConfig, TrainConfig
from lead_engine.model import attention
from lead_engine.model.attention import Held, Packing, packed_attention, split_tail
from lead_engine.model.load import build_model
from lead_engine.model.scoring import score_store
from lead_engine.pool.store import TokenStore
from lead_engine.training.build import build
from lead_engine.training.distributed import process_group
from lead_engine.training.rounds import read_header

pytestmark = pytest.mark.slow

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is here")


class AsFlashKernelsDo(torch.autograd.Function):
    """Causal attention that writes only the first `longest` rows of every segment, as the flash kernels do; the rest is
    NaN.
    """

    @staticmethod
    def forward(ctx, q, k, v, bounds, longest, window, scale):
        ctx.save_for_backward(q, k, v)
        ctx.spans = [(start, min(end, start + longest)) for start, end in itertools.pairwise(bounds.tolist())]
        ctx.window, ctx.scale = window, scale
        out = torch.full_like(q, torch.nan)
        for start, end in ctx.spans:
            out[start:end] = one_segment(*(x[start:end] for x in (q, k, v)), window, scale)
        return out

    @staticmethod
    def backward(ctx, gradient):
        whole = ctx.saved_tensors
        found = [torch.full_like(x, torch.nan) for x in whole]
        for start, end in ctx.spans:
            with torch.enable_grad():
                parts = [x[start:end].detach().requires_grad_() for x in whole]
                out = one_segment(*parts, ctx.window, ctx.scale)
                for place, part in zip(found, torch.autograd.grad(out, parts, gradient[start:end]), strict=True):
                    place[start:end] = part
        return *found, None, None, None, None


def one_segment(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """[L, heads, D]; window: keys to the left, -1 for all."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))[None, :]
    seen = (distance >= 0) & ((distance <= window) if window >= 0 else True)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.fixture
def flash_like(monkeypatch) -> None:
    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert window_size[1] == 0
        assert cu_q is cu_k
        assert max_q == max_k
        return AsFlashKernelsDo.apply(q, k, v, cu_q, max_q, window_size[0], scale)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


@pytest.mark.parametrize("ids", [[0], [], [3, 1, 2]], ids=["one sample", "empty", "three samples"])
def test_nothing_of_the_tail_reaches_a_weight(ids: list[int], make_model, make_pool, flash_like) -> None:
    """The same losses and gradients as a sample at a time, and all of them finite."""
    folder, store = make_model("llama"), TokenStore.open(make_pool(samples=30) / "store")
    slots = torch.tensor(ids + [store.num_samples] * (4 - len(ids)))
    packed = store.batch(slots, capacity=512, num_rows=128)
    longest = int(store.lengths.max())
    assert 512 - int(packed.cu_seqlens[-2]) > 2 * longest
    losses, gradients = [], []
    for kind in ("segment", "varlen"):
        model = load(folder, longest)
        model.attention = kind
        head = model(packed)
        head.loss.backward()
        losses.append(head.sample_nll)
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for ours, other in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


def load(folder: Path, longest: int) -> nn.Module:
    return build_model(folder, device=torch.device("cpu"), runtime=RuntimeConfig(precision="fp32"), max_length=longest)


@pytest.mark.parametrize("samples", [[], [5], [5, 0, 7], [16], [7, 7, 2]])
@pytest.mark.parametrize("longest", [1, 7, 16, 40])
def test_split_tail(samples: list[int], longest: int) -> None:
    """Samples' bounds stay; pieces cover the tail, none longer than the longest sample; the
    shape is always the same.
    """
    samples = [min(size, longest) for size in samples]
    samples += [0] * (4 - len(samples))
    bounds = torch.tensor([0, *itertools.accumulate(samples), 16], dtype=torch.int32)
    split = split_tail(bounds, 16, longest)
    assert split.dtype == torch.int32
    assert split.tolist()[:5] == bounds.tolist()[:5]
    assert split[-1] == 16
    assert len(split) == 5 + -(-16 // longest)
    assert 0 <= int(split.diff().min()) <= int(split.diff().max()) <= longest


@pytest.mark.parametrize("quantum", [1, 4, 32])
@pytest.mark.parametrize("samples", [[], [5], [5, 1, 7], [16], [7, 7, 2]])
@pytest.mark.parametrize("longest", [7, 16, 40])
def test_split_tail_of_what_is_held(samples: list[int], longest: int, quantum: int, monkeypatch) -> None:
    """Slots after the last sample are left out; segments are the least multiple of the quantum that holds all."""
    monkeypatch.setattr(attention, "SEGMENT_QUANTUM", quantum)
    samples = [min(size, longest) for size in samples]
    used = sum(samples)
    bounds = torch.tensor([0, *itertools.accumulate(samples), *[used] * (60 - len(samples)), 16], dtype=torch.int32)
    split = split_tail(bounds, 16, longest, Held(len(samples), used, max(samples, default=0)))
    assert split[: len(samples) + 1].tolist() == [0, *itertools.accumulate(samples)]
    assert split[-1] == 16
    wanted = len(samples) + -(-(16 - used) // longest)
    assert len(split) - 1 == max(1, -(-wanted // quantum)) * quantum
    assert 0 <= int(split.diff().min()) <= int(split.diff().max()) <= longest


def test_kernels_are_launched_for_what_is_there(make_model, make_pool, flash_like, monkeypatch) -> None:
    """In training and in scoring: segments and longest segment of every launch; losses are
    those of a sample at a time.
    """
    launched = []
    seen = varlen.varlen_attn

    def counting(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        launched.append((len(cu_q) - 1, max_q))
        return seen(q, k, v, cu_q, cu_k, max_q, max_k, **options)

    monkeypatch.setattr(varlen, "varlen_attn", counting)
    folder, pool = make_model("llama"), make_pool(samples=90)
    batch = BatchConfig(capacity=2048, micro_batches=2)
    config = TrainConfig(
        pool=pool,
        model=str(folder),
        out=Path("unused"),
        method="lead",
        batch=batch,
        selection=SelectionConfig(round_steps=2),
        options={"sketch_dim": 8},
        runtime=RuntimeConfig(precision="fp32"),
    )
    losses, scores = [], []
    for kind in ("segment", "varlen"):
        with process_group() as ranks:
            trainer = build(config, ranks).trainer
            trainer.model.attention = kind
            plan = trainer.selector.plan(0, 3000)
            header = read_header(plan, trainer.selector)
            losses.append([trainer.train_step(plan, header, step, step, 1e-3).loss for step in range(2)])
            ours = launched.copy()
            scores.append(score_store(trainer.model, trainer.store, batch=batch)[0])
    layers = trainer.model.config.num_hidden_layers
    wanted = [launch_of(held) for step in header.held for held in step for _ in range(layers)]
    assert ours == wanted
    assert header.held[1][1] == Held(0, 0, 0)
    assert ours[-1] == (32, 128)  # of the plan's last micro-batch, which is empty
    whole = 64 + -(-2048 // int(trainer.store.lengths.max()))  # slots, and pieces of a tail that may be all there is
    assert max(segments for segments, _ in launched) < whole
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-6)


def launch_of(held: Held) -> tuple[int, int]:
    longest = max(128, 128 * -(-held.longest // 128))
    return 32 * max(1, -(-(held.slots + -(-(2048 - held.tokens) // longest)) // 32)), longest


def test_flash_attn_is_told_to_be_deterministic(monkeypatch) -> None:
    """By PyTorch's own switch; "warn only" leaves both kernels as they are."""
    told = []

    def flash_attn_varlen_func(q, k, v, *bounds, deterministic=False, **options):
        told.append(deterministic)
        return q

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    packing = Packing(torch.tensor([0, 5, 8], dtype=torch.int32), 5, "flash", 8)
    qkv = [torch.zeros(1, 2, 8, 16) for _ in range(3)]
    try:
        for options in ((False,), (True,), (True, True)):
            torch.use_deterministic_algorithms(options[0], warn_only=len(options) > 1)
            packed_attention(nn.Identity(), *qkv, None, packing=packing)
    finally:
        torch.use_deterministic_algorithms(False)
    assert told == [False, True, False]


KERNELS = [
    "varlen",
    pytest.param(
        "flash",
        marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed"),
    ),
]


@CUDA
@pytest.mark.parametrize("kind", KERNELS)
def test_deterministic_backward(kind: str) -> None:
    """Under PyTorch's switch two backward passes are equal bit for bit, long samples and many blocks of keys each."""
    cu = torch.tensor([0, 3000, 3001, 3001, 4096], dtype=torch.int32, device="cuda")
    qkv = [torch.randn(1, heads, 4096, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)]
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(4):
            inputs = [x.clone().requires_grad_() for x in qkv]
            packing = Packing(cu, 3000, kind, 4096, Held(2, 3001, 3000))
            out, _ = packed_attention(nn.Identity(), *inputs, None, packing=packing)
            out.float().square().sum().backward()
            found.append([out.detach(), *(x.grad for x in inputs)])
    finally:
        torch.use_deterministic_algorithms(False)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@CUDA
@pytest.mark.parametrize("trimmed", [False, True], ids=["all slots", "trimmed"])
@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize("kind", KERNELS)
def test_kernels_agree_with_the_mask(kind: str, window: int | None, trimmed: bool) -> None:
    """Forward and backward with grouped heads and a long tail, the allocator's free memory filled with NaN before."""
    samples, length = ([96, 1, 33, 96, 64] if trimmed else [96, 1, 0, 33, 96, 64]), 2048
    ends = [*itertools.accumulate(samples), *[sum(samples)] * 58]  # and empty slots
    cu = torch.tensor([0, *ends, length], dtype=torch.int32, device="cuda")
    held = Held(len(samples), sum(samples), max(samples)) if trimmed else None
    generator = torch.Generator("cuda").manual_seed(0)
    exact = [
        torch.randn(1, heads, length, 64, device="cuda", generator=generator, dtype=torch.float64)
        for heads in (8, 2, 2)
    ]
    upstream = torch.randn(1, length, 8, 64, device="cuda", generator=generator, dtype=torch.float64)
    found = []
    for form, dtype in (("mask", torch.float64), (kind, torch.bfloat16), ("mask", torch.bfloat16)):
        qkv = [x.to(dtype).detach().requires_grad_() for x in exact]
        poison = torch.full((1 << 26,), torch.nan, device="cuda", dtype=torch.bfloat16)
        del poison  # to the allocator, which hands it out again
        packing = Packing(cu, max(samples), form, length, held)
        out, _ = packed_attention(nn.Identity(), *qkv, None, packing=packing, sliding_window=window)
        out.backward(upstream.to(dtype))
        found.append([out.detach().double(), *(x.grad.double() for x in qkv)])
    for truth, ours, other in zip(*found, strict=True):
        assert ours.isfinite().all()
        assert (ours - truth).abs().max() <= 1.5 * (other - truth).abs().max() + 1e-3
