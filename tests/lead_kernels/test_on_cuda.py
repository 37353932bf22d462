"""On a GPU, with every synchronisation an error: operators as on the CPU, the head as exact as unfused PyTorch.

Skipped where there is none. Kernels are compiled before synchronisation is forbidden, by a first run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_round import CAPACITY, CASES, TOLERANCE, assert_agree, select, step, world
from lead_kernels import gather_batch, linear_cross_entropy, select_topk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_same_as_on_the_cpu_without_a_synchronisation(dtype: torch.dtype, case: str) -> None:
    inputs = world("cuda", dtype)
    step(inputs, case)
    with no_synchronisation():
        device, again = step(inputs, case), step(inputs, case)
    assert all(torch.equal(a, b) for a, b in zip(device, again, strict=True))
    assert_agree(device, step(world("cpu", dtype), case), dtype)


@pytest.mark.parametrize("weights", [None, [3, 0, 2**28, 1], [0, 0, 0, 0]])
def test_an_order_by_weight_without_a_synchronisation(weights: list[int] | None) -> None:
    w = world("cpu", torch.float32)
    host = (w["utility"], w["eligible"], w["task"], None if weights is None else torch.tensor(weights))
    device = [None if x is None else x.cuda() for x in host]

    def order(utility: Tensor, eligible: Tensor, task: Tensor, weight: Tensor | None) -> Tensor:
        return select_topk(utility, eligible, task, 4, 120, weight)

    order(*device)
    with no_synchronisation():
        ours = order(*device)
    assert torch.equal(ours.cpu(), order(*host))


def test_a_pinned_pool_is_read_over_the_bus() -> None:
    w = world("cuda", torch.float32)
    pinned = {name: w[name].cpu().pin_memory() for name in ("tokens", "response", "offsets")}
    for ids in select(w).sample_ids.unbind(0):
        expected = gather_batch(w["tokens"], w["response"], w["offsets"], ids, capacity=CAPACITY, num_rows=CAPACITY)
        ours = gather_batch(
            pinned["tokens"], pinned["response"], pinned["offsets"], ids, capacity=CAPACITY, num_rows=CAPACITY
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"), [(700, 192, 32_000), (700, 192, 128_257), (300, 128, 262_144), (300, 8192, 32_000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_error_is_that_of_unfused_pytorch(
    dtype: torch.dtype, rows: int, width: int, vocabulary: int, logits_dtype: torch.dtype | None
) -> None:
    g = torch.Generator(device="cuda").manual_seed(0)
    hidden = torch.randn(rows, width, generator=g, device="cuda").to(dtype)
    weight = (3 * width**-0.5 * torch.randn(vocabulary, width, generator=g, device="cuda")).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=g, device="cuda")
    token_weight = torch.rand(rows, generator=g, device="cuda") / rows

    def unfused(kind: torch.dtype) -> dict[str, Tensor]:
        h, w = hidden.to(kind).requires_grad_(), weight.to(kind).requires_grad_()
        nll = F.cross_entropy((h @ w.t()).to(torch.promote_types(kind, torch.float32)), targets, reduction="none")
        (nll * token_weight.to(nll.dtype)).sum().backward()
        return {"token_nll": nll.detach(), "dhidden": h.grad, "dweight": w.grad}

    exact, theirs = unfused(torch.float64), unfused(dtype)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_cross_entropy(
        h,
        w,
        targets,
        cu_seqlens=torch.tensor([0, rows], device="cuda"),
        num_samples=1,
        token_weight=token_weight,
        logits_dtype=logits_dtype,
        chunk_bytes=4 * vocabulary * 256,
    )
    out.loss.backward()
    mine = {"token_nll": out.token_nll.detach(), "dhidden": h.grad, "dweight": w.grad}
    for name in exact:
        assert relative_error(mine[name], exact[name]) <= 1.2 * relative_error(theirs[name], exact[name]) + 2e-6, name


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options_are_those_of_the_cpu(dtype: torch.dtype, reduction: str) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 50, 64, generator=g).to(dtype), (0.3 * torch.randn(3001, 64, generator=g)).to(dtype)
    targets, classes = torch.randint(0, 3001, (4, 50), generator=g), torch.rand(3001, generator=g)
    targets[:, ::7] = -100
    found = []
    for device in ("cpu", "cuda"):
        h, w, y, c = (x.to(device, copy=True) for x in (hidden, weight, targets, classes))
        out = linear_cross_entropy(
            h.requires_grad_(),
            w.requires_grad_(),
            y,
            class_weight=c,
            label_smoothing=0.1,
            z_loss=1e-3,
            softcap=20.0,
            shift=True,
            reduction=reduction,
            return_lse=True,
            return_entropy=True,
            return_predicted=True,
            logits_dtype=torch.float32,
        )
        out.loss.sum().backward()
        found.append([x.detach().cpu() for x in (*out, h.grad, w.grad) if x is not None])
    for host, device in zip(*found, strict=True):
        tolerance = 2**-6 if host.dtype == torch.bfloat16 else 2e-5
        largest = float(host.abs().max()) if host.numel() else 0.0
        torch.testing.assert_close(device, host, rtol=tolerance, atol=tolerance * largest)


def test_memory_beside_inputs_and_gradients_is_a_chunk() -> None:
    rows, width, vocabulary, chunk = 4096, 256, 64_000, 256 * 2**20
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device="cuda")

    def run() -> None:
        linear_cross_entropy(
            hidden,
            weight,
            targets,
            cu_seqlens=torch.tensor([0, rows], device="cuda"),
            num_samples=1,
            gradients="forward",
            chunk_bytes=chunk,
        ).loss.backward()

    run()  # cuBLAS takes its workspace once
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = hidden.numel() * 2 * 2 + weight.numel() * (
        2 + 4
    )  # dh before and after scaling; dW in bf16 and its fp32 sum
    assert extra <= gradients + chunk + 32 * 2**20
