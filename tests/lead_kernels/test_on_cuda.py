"""On a GPU, with every synchronisation an error: the operators give what they give on the CPU, and the head is as exact as unfused PyTorch.

Skipped where there is none. Kernels are compiled before synchronisation is forbidden, by a first run.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lead_kernels import (
    Lora,
    gather_batch,
    grad_inner_product,
    idu_update,
    linear_cross_entropy,
    pack_plan,
    segment_reduce,
    select_topk,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

N, H, V, Q, R = 300, 64, 1003, 16, 4
CAPACITY, SLOTS, BINS = 512, 40, 4


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def world(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 60, (N,), generator=g)
    total = int(lengths.sum())
    tensors = {
        "lengths": lengths,
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "tokens": torch.randint(0, V, (total,), generator=g, dtype=torch.int32),
        "response": torch.rand(total, generator=g) < 0.6,
        "utility": torch.randn(N, generator=g),
        "eligible": torch.rand(N, generator=g) < 0.8,
        "task": torch.randint(0, 4, (N,), generator=g),
        "embedding": torch.randn(V, H, generator=g).to(dtype),
        "weight": (0.4 * torch.randn(V, H, generator=g)).to(dtype),
        "lora_a": torch.randn(R, H, generator=g).to(dtype),
        "lora_b": (0.1 * torch.randn(V, R, generator=g)).to(dtype),
        "P": torch.randn(H, Q, generator=g) / Q**0.5,
        "Q": torch.randn(H, Q, generator=g) / Q**0.5,
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def select(w: dict[str, Tensor]) -> Any:
    order = select_topk(w["utility"], w["eligible"], w["task"], 4, 120)
    return pack_plan(order, w["lengths"], num_bins=BINS, capacity=CAPACITY, slots=SLOTS)


def step(w: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    plan = select(w)
    batch = gather_batch(w["tokens"], w["response"], w["offsets"], plan.sample_ids[0], capacity=CAPACITY, num_rows=CAPACITY)
    hidden = w["embedding"][batch.input_ids[batch.rows]].requires_grad_()
    trained = {name: w[name].clone().requires_grad_() for name in ("weight", "lora_a", "lora_b")}
    adapter = {"lora": Lora(trained["lora_a"], trained["lora_b"], 0.5)} if options.pop("adapter", False) else {}
    upstream = options.pop("upstream", "loss")
    out = linear_cross_entropy(
        hidden, trained["weight"], batch.targets, sample_ids=batch.row_slots, num_samples=SLOTS, signature=(w["P"], w["Q"]),
        chunk_bytes=4 * V * 100, max_rows=CAPACITY, **adapter, **options,
    )  # fmt: skip
    (out.loss if upstream == "loss" else out.loss + out.sample_nll.square().sum()).backward()
    exact = grad_inner_product(hidden.detach(), hidden.grad, hidden.grad.float().t() @ hidden.detach().float(), batch.row_slots, SLOTS,
                               torch.ones(SLOTS, device=hidden.device))  # fmt: skip
    utility, visits = F.pad(w["utility"], (0, 1)), torch.zeros(N + 1, dtype=torch.int32, device=hidden.device)
    idu_update(utility, visits, plan.sample_ids[0], out.sample_nll.detach(), exact, 0.1)
    sums = segment_reduce(hidden.detach(), batch.row_slots, SLOTS)
    grads = [x.grad for x in trained.values() if x.grad is not None]
    return [plan.sample_ids, *batch, *[x.detach() for x in out], hidden.grad, *grads, utility, visits, sums]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "forward": {"gradients": "forward"},
    "recompute": {"gradients": "recompute"},
    "rows": {"upstream": "sample"},
    "adapter": {"adapter": True},
    "all options": {"softcap": 6.0, "label_smoothing": 0.1, "z_loss": 1e-3, "logit_scale": 0.7},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_same_as_on_the_cpu_without_a_synchronisation(dtype: torch.dtype, tolerance: float, case: str) -> None:
    inputs = world("cuda", dtype)
    step(inputs, dict(CASES[case]))
    with no_synchronisation():
        device, again = step(inputs, dict(CASES[case])), step(inputs, dict(CASES[case]))
    for ours, expected, repeated in zip(device, step(world("cpu", dtype), dict(CASES[case])), again, strict=True):
        assert torch.equal(ours, repeated)
        if ours.is_floating_point():
            assert float((ours.cpu().double() - expected.double()).norm()) <= tolerance * float(expected.double().norm()) + 1e-6
        else:
            assert torch.equal(ours.cpu(), expected)


def test_a_pinned_pool_is_read_over_the_bus() -> None:
    w = world("cuda", torch.float32)
    pinned = {name: w[name].cpu().pin_memory() for name in ("tokens", "response", "offsets")}
    for ids in select(w).sample_ids.unbind(0):
        expected = gather_batch(w["tokens"], w["response"], w["offsets"], ids, capacity=CAPACITY, num_rows=CAPACITY)
        ours = gather_batch(pinned["tokens"], pinned["response"], pinned["offsets"], ids, capacity=CAPACITY, num_rows=CAPACITY)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("vocabulary", [32_000, 128_257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_error_is_that_of_unfused_pytorch(dtype: torch.dtype, vocabulary: int, logits_dtype: torch.dtype | None) -> None:
    rows, width = 700, 192
    g = torch.Generator(device="cuda").manual_seed(0)
    hidden = torch.randn(rows, width, generator=g, device="cuda").to(dtype)
    weight = (0.2 * torch.randn(vocabulary, width, generator=g, device="cuda")).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=g, device="cuda")
    token_weight = torch.rand(rows, generator=g, device="cuda") / rows

    def unfused(kind: torch.dtype) -> dict[str, Tensor]:
        h, w = hidden.to(kind).requires_grad_(), weight.to(kind).requires_grad_()
        nll = F.cross_entropy((h @ w.t()).to(torch.promote_types(kind, torch.float32)), targets, reduction="none")
        (nll * token_weight.to(nll.dtype)).sum().backward()
        return {"token_nll": nll.detach(), "dhidden": h.grad, "dweight": w.grad}

    exact, theirs = unfused(torch.float64), unfused(dtype)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_cross_entropy(h, w, targets, cu_seqlens=torch.tensor([0, rows], device="cuda"), num_samples=1, token_weight=token_weight,
                               logits_dtype=logits_dtype, chunk_bytes=4 * vocabulary * 256)  # fmt: skip
    out.loss.backward()
    mine = {"token_nll": out.token_nll.detach(), "dhidden": h.grad, "dweight": w.grad}
    for name in exact:
        assert relative_error(mine[name], exact[name]) <= 1.2 * relative_error(theirs[name], exact[name]) + 2e-6, name


def test_memory_beside_inputs_and_gradients_is_a_chunk() -> None:
    rows, width, vocabulary, chunk = 4096, 256, 64_000, 256 * 2**20
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device="cuda")

    def run() -> None:
        linear_cross_entropy(hidden, weight, targets, cu_seqlens=torch.tensor([0, rows], device="cuda"), num_samples=1, gradients="forward",
                             chunk_bytes=chunk).loss.backward()  # fmt: skip

    run()  # cuBLAS takes its workspace once
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = hidden.numel() * 2 * 2 + weight.numel() * (2 + 4)  # dh before and after scaling; dW in bf16 and its fp32 sum
    assert extra <= gradients + chunk + 32 * 2**20
