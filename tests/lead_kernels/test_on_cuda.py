"""On a GPU, with every synchronisation an error: the operators give what they give on the CPU. Skipped where there is none."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lead_kernels import gather_batch, linear_cross_entropy, pack_plan, select_topk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

N, H, V, Q = 300, 64, 1003, 16


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
        "P": torch.randn(H, Q, generator=g),
        "Q": torch.randn(H, Q, generator=g),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def step(w: dict[str, Tensor]) -> list[Tensor]:
    order = select_topk(w["utility"], w["eligible"], w["task"], 4, 120)
    plan = pack_plan(order, w["lengths"], num_bins=4, capacity=512, slots=40)
    batch = gather_batch(w["tokens"], w["response"], w["offsets"], plan.sample_ids[0], capacity=512, num_rows=512)
    hidden = w["embedding"][batch.input_ids[batch.rows]].requires_grad_()
    weight = w["weight"].clone().requires_grad_()
    out = linear_cross_entropy(hidden, weight, batch.targets, sample_ids=batch.row_slots, num_samples=40, signature=(w["P"], w["Q"]),
                               chunk_bytes=4 * V * 100)  # fmt: skip
    out.loss.backward()
    return [plan.sample_ids, *batch, *[x.detach() for x in out], hidden.grad, weight.grad]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_same_as_on_the_cpu_without_a_synchronisation(dtype: torch.dtype, tolerance: float) -> None:
    inputs = world("cuda", dtype)
    step(inputs)
    with no_synchronisation():
        device, again = step(inputs), step(inputs)
    for ours, expected, repeated in zip(device, step(world("cpu", dtype)), again, strict=True):
        assert torch.equal(ours, repeated)
        if ours.is_floating_point():
            assert float((ours.cpu().double() - expected.double()).norm()) <= tolerance * float(expected.double().norm()) + 1e-12
        else:
            assert torch.equal(ours.cpu(), expected)
