"""No operator looks at the device from the host: all run on tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from lead_kernels import (
    draw_arm,
    exp3_probabilities,
    exp3_update,
    gather_batch,
    grad_inner_product,
    idu_update,
    linear_cross_entropy,
    pack_plan,
    segment_reduce,
    select_topk,
)

N, K, B, CAPACITY, ROWS, H, V, Q = 50, 4, 5, 64, 40, 16, 99, 8


def one_round(device: str, dtype: torch.dtype, options: dict[str, float]) -> torch.Tensor:
    """Draw, select, pack, gather, loss, backward, score, update: what a round of the engine does."""
    empty = lambda *shape, dtype=torch.float32: torch.empty(*shape, device=device, dtype=dtype)  # noqa: E731
    log_weights, utility, visits = empty(K), empty(N + 1), empty(N + 1, dtype=torch.int32)
    lengths, offsets, cluster, task = (empty(size, dtype=torch.int64) for size in (N, N + 1, N, N))
    tokens, response = empty(1000, dtype=torch.int32), empty(1000, dtype=torch.bool)
    weight = empty(V, H, dtype=dtype).requires_grad_()
    embedding = empty(V, H, dtype=dtype).requires_grad_()

    p = exp3_probabilities(log_weights, torch.ones(K, device=device, dtype=torch.bool), 0.1)
    arm = draw_arm(p, empty(()))
    order = select_topk(utility[:N], cluster == arm, task, 3, 30)
    plan = pack_plan(order, lengths, num_bins=3, capacity=CAPACITY, slots=B, max_tokens=empty((), dtype=torch.int64))
    for ids in plan.sample_ids.unbind(0):
        batch = gather_batch(tokens, response, offsets, ids, capacity=CAPACITY, num_rows=ROWS)
        hidden = embedding[batch.input_ids[batch.rows]]
        hidden.retain_grad()
        token_weight = torch.ones((), device=device) / (batch.targets >= 0).sum()
        out = linear_cross_entropy(
            hidden,
            weight,
            batch.targets,
            sample_ids=batch.row_slots,
            num_samples=B,
            token_weight=token_weight,
            signature=(empty(H, Q), empty(H, Q)),
            chunk_bytes=4 * V * 12,
            **options,
        )
        out.loss.backward()
        sample_weight = out.sample_tokens * token_weight
        mean_grad = hidden.grad.float().t() @ hidden.detach().float()
        s = grad_inner_product(hidden.detach(), hidden.grad, mean_grad, batch.row_slots, B, sample_weight)
        segment_reduce(hidden, batch.row_slots, B)
        idu_update(utility, visits, ids, out.sample_nll, s, 0.1)
    return exp3_update(log_weights, p, arm, empty(()), 0.1, 0.01)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 0.1}], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_runs_without_data(
    blind_host: Callable[[], Any], dtype: torch.dtype, options: dict[str, float]
) -> None:
    with blind_host() as device:
        new = one_round(device, dtype, options)
    assert new.shape == (K,)


def test_the_context_does_catch_a_look(blind_host: Callable[[], Any]) -> None:
    with blind_host() as device:
        x = torch.empty(4, device=device)
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            x[x > 0]
        with pytest.raises(AssertionError, match="to the host"):
            x.cpu()
