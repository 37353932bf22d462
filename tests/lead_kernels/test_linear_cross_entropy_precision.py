"""bf16 and fp16: the head's error against float64 is at most 1.2 times that of unfused PyTorch in this precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lead_kernels import chunk_size, gradient_signature, linear_cross_entropy
from lead_kernels.chunk_size import chunk_rows
from lead_kernels.row_pass_host import split

pytestmark = pytest.mark.slow

T, H, V, B, Q = 301, 48, 777, 6, 8
EPSILON = 2e-6  # relative; below it, both are exact for every purpose
LOW = [torch.bfloat16, torch.float16]


def case(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=g).to(dtype)
    weight = (0.5 * torch.randn(V, H, generator=g)).to(dtype)
    weight[: V // 8] *= 3  # some rows with confident predictions
    return hidden, weight, torch.randint(0, V, (T,), generator=g), torch.arange(T) * B // T


def unfused(hidden: Tensor, weight: Tensor, targets: Tensor, token_weight: Tensor) -> dict[str, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    nll = F.cross_entropy(
        (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32)), targets, reduction="none"
    )
    loss = (nll * token_weight).sum()
    loss.backward()
    return {"loss": loss.detach(), "token_nll": nll.detach(), "dhidden": hidden.grad, "dweight": weight.grad}


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def small(dtype: torch.dtype, signal: float, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that say little, for a small `signal`: then rounding hardly changes the gradients at the logits,
    and every other rounding shows."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = signal * torch.randn(rows, 32, generator=g), 0.5 * torch.randn(257, 32, generator=g)
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, 257, (rows,), generator=g)


def check_errors(
    dtype: torch.dtype,
    signal: float,
    counted: int,
    weights: str,
    upstream: str,
    chunk_rows: int,
    gradients: str = "auto",
) -> None:
    """All errors are at most 1.2 times those of unfused PyTorch. `weights` are those of the rows; upstream gradients
    come from a power of two, a loss scale, or from the rows' own losses.

    The weight's gradient of several chunks, on a CPU, may have sqrt(2) times more: PyTorch's product of bf16 there is
    rounded to bf16, once a chunk, as large an error as that of the sum.
    """
    hidden, weight, targets = small(dtype, signal, counted + 3)
    targets[counted:] = -100
    g = torch.Generator().manual_seed(5)
    rows = {"mean": torch.full((counted + 3,), 1 / counted), "rows": torch.rand(counted + 3, generator=g) / counted}
    factors = {"unit": 1.0, "loss scale": 2.0**12, "rows": torch.randn(counted + 3, generator=g)}[upstream]

    def gradients_of(kind: torch.dtype, ours: bool) -> dict[str, Tensor]:
        h, w = (x.to(kind, copy=True).requires_grad_() for x in (hidden, weight))
        if ours:
            out = linear_cross_entropy(
                h,
                w,
                targets,
                token_weight=None if weights == "mean" else rows[weights],
                gradients=gradients,
                chunk_bytes=4 * 257 * chunk_rows,
            )
            nll = out.token_nll
            loss = (nll * rows[weights] * factors).sum() if upstream == "rows" else out.loss * factors
        else:
            wide = torch.promote_types(kind, torch.float32)
            nll = F.cross_entropy((h @ w.t()).to(wide), targets, reduction="none")
            loss = (nll * (rows[weights] * factors).to(wide)).sum()
        loss.backward()
        return {"loss": loss.detach(), "token_nll": nll.detach(), "dhidden": h.grad, "dweight": w.grad}

    exact, theirs, mine = gradients_of(torch.float64, False), gradients_of(dtype, False), gradients_of(dtype, True)
    for name in exact:
        assert mine[name].dtype == (dtype if name.startswith("d") else torch.float32)
        in_parts = name == "dweight" and chunk_rows < counted
        bound = (1.2 * 2**0.5 if in_parts else 1.2) * error(theirs[name], exact[name]) + EPSILON
        assert error(mine[name], exact[name]) <= bound, (name, counted, weights, upstream)


@pytest.mark.parametrize("dtype", LOW)
def test_error_is_that_of_unfused_pytorch(form: str, dtype: torch.dtype) -> None:
    """A weight such as 1/50 rounds nothing that was rounded before it; whole batches and parts of them."""
    for weights, upstream in (("mean", "unit"), ("rows", "unit"), ("mean", "rows")):
        check_errors(dtype, 0.05, 50, weights, upstream, chunk_rows=30 if weights == "rows" else 10_000)
    check_errors(dtype, 1.0, 32, "mean", "loss scale", chunk_rows=16)


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(LOW),
    signal=st.sampled_from([0.02, 0.3, 2.0]),
    counted=st.integers(100, 400),
    weights=st.sampled_from(["mean", "rows"]),
    upstream=st.sampled_from(["unit", "loss scale", "rows"]),
    chunk_rows=st.sampled_from([10_000, 64]),
    gradients=st.sampled_from(["auto", "recompute"]),
)
def test_error_for_any_number_of_rows(
    dtype: torch.dtype, signal: float, counted: int, weights: str, upstream: str, chunk_rows: int, gradients: str
) -> None:
    check_errors(dtype, signal, counted, weights, upstream, chunk_rows, gradients)


@pytest.mark.parametrize("dtype", LOW)
def test_frozen_weight(dtype: torch.dtype) -> None:
    hidden, weight, targets, _ = case(dtype)
    leaf = hidden.clone().requires_grad_()
    linear_cross_entropy(leaf, weight, targets, cu_seqlens=torch.tensor([0, T]), num_samples=1).loss.backward()
    exact = unfused(hidden.double(), weight.double(), targets, torch.tensor(1.0 / T))["dhidden"]
    assert (
        error(leaf.grad, exact)
        <= 1.2 * error(unfused(hidden, weight, targets, torch.tensor(1.0 / T))["dhidden"], exact) + EPSILON
    )
    assert weight.grad is None


@pytest.mark.parametrize("dtype", LOW)
def test_signature_error(form: str, dtype: torch.dtype) -> None:
    hidden, weight, targets, ids = case(dtype)
    g = torch.Generator().manual_seed(2)
    left, right = torch.randn(H, Q, generator=g) / Q**0.5, torch.randn(H, Q, generator=g) / Q**0.5

    def phi(
        errors: Tensor, p: Tensor, q: Tensor, states: Tensor
    ) -> Tensor:  # every operand and product in the states' precision
        rows = [(errors[ids == b] @ p).t() @ (states[ids == b] @ q) / int((ids == b).sum()) for b in range(B)]
        return torch.stack(rows)

    exact_e = unfused(hidden.double(), weight.double(), targets, torch.ones(()).double())["dhidden"]
    exact = phi(exact_e, left.double(), right.double(), hidden.double())
    theirs = phi(unfused(hidden, weight, targets, torch.ones(()))["dhidden"], left.to(dtype), right.to(dtype), hidden)
    mine = linear_cross_entropy(
        hidden, weight, targets, sample_ids=ids, num_samples=B, signature=(left, right)
    ).signature
    assert mine.dtype == torch.float32
    assert error(mine, exact) <= 1.2 * error(theirs, exact) + EPSILON


@pytest.mark.parametrize("dtype", LOW)
def test_small_target_gradient_survives(form: str, dtype: torch.dtype) -> None:
    """1 - p_y = 6.7e-4, which vanishes in bf16 if p_y is rounded before the one-hot is subtracted."""
    hidden = torch.ones(5, 1, dtype=dtype, requires_grad=True)
    weight = torch.tensor([[8.0], [0.0], [0.0]], dtype=dtype)
    targets = torch.zeros(5, dtype=torch.int64)
    out = linear_cross_entropy(
        hidden, weight, targets, cu_seqlens=torch.tensor([0, 5]), num_samples=1, token_weight=1.0
    )
    out.loss.backward()
    p = torch.softmax(weight.double().flatten(), 0)
    torch.testing.assert_close(hidden.grad.double(), (8 * (p[0] - 1)).expand(5, 1), rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", LOW)
def test_weight_gradient_is_added_up_in_fp32(dtype: torch.dtype) -> None:
    """600 chunks of one row, each adding -7/8: a sum in bf16 stops at -224, where its steps are too coarse."""
    weight = torch.zeros(8, 4, dtype=dtype, requires_grad=True)
    hidden, targets, cu = torch.ones(600, 4, dtype=dtype), torch.zeros(600, dtype=torch.int64), torch.tensor([0, 600])
    out = linear_cross_entropy(hidden, weight, targets, cu_seqlens=cu, num_samples=1, token_weight=1.0, chunk_bytes=1)
    out.loss.backward()
    torch.testing.assert_close(weight.grad[0].double(), torch.full((4,), -525.0).double(), rtol=2**-8, atol=0)
    torch.testing.assert_close(weight.grad[1:].double(), torch.full((7, 4), 75.0).double(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("chunk_bytes", [None, 4096])
def test_fp16_sums_may_leave_its_range_before_they_are_scaled(chunk_bytes: int | None) -> None:
    """-0.75 x 1000 rows x 100 is beyond 65504; the mean's gradient is -75."""
    weight = torch.zeros(4, 2, dtype=torch.float16, requires_grad=True)
    hidden, targets = torch.full((1000, 2), 100.0, dtype=torch.float16), torch.zeros(1000, dtype=torch.int64)
    linear_cross_entropy(hidden, weight, targets, chunk_bytes=chunk_bytes).loss.backward()
    expected = torch.tensor([-75.0, 25.0, 25.0, 25.0])[:, None].expand(4, 2)
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2**-9, atol=0)


def test_upstream_gradient_is_not_rounded_before_it_scales() -> None:
    """A loss scale or a 1/denominator has more digits than bf16: it must enter in fp32."""
    hidden, weight, targets, _ = case(torch.bfloat16)

    def grad_at(scale: float) -> tuple[Tensor, Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        (linear_cross_entropy(h, w, targets, cu_seqlens=torch.tensor([0, T]), num_samples=1).loss * scale).backward()
        return h.grad.double(), w.grad.double()

    for at_one, at_third in zip(grad_at(1.0), grad_at(1.0 + 1 / 300), strict=True):
        ratio = float((at_third * at_one).sum() / at_one.square().sum())
        assert abs(ratio - (1 + 1 / 300)) < 1e-3  # 1 + 1/300 itself rounds to 1 or 1 + 1/128 in bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_intermediate_is_larger_than_a_chunk(recorder: Callable, form: str, dtype: torch.dtype) -> None:
    rows, width, vocabulary, budget = 130, 8, 512, 32768  # 16 rows of fp32 logits; hidden and weight are smaller
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=g).to(dtype).requires_grad_()
    targets, ids = torch.randint(0, vocabulary, (rows,), generator=g), torch.arange(rows) * 9 // rows
    targets[::7] = -100
    for options in ({}, {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 0.1, "logit_scale": 0.5}):
        with recorder() as record:
            linear_cross_entropy(
                hidden,
                weight,
                targets,
                sample_ids=ids,
                num_samples=9,
                chunk_bytes=budget,
                **options,
                signature=(torch.randn(width, 4), torch.randn(width, 4)),
            ).loss.backward()
        assert record.largest <= budget
    with recorder() as record:
        unfused(hidden.detach(), weight.detach(), targets.clamp(min=0), torch.tensor(1.0))
    assert record.largest >= rows * vocabulary * hidden.element_size()  # the recorder does see a [T, V] tensor


def test_chunk_rows_follow_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(chunk_size, "_total_memory", lambda device: 80 * 2**30)
    assert chunk_rows(None, 128_256, torch.bfloat16, gpu, False) >= 5000
    monkeypatch.setattr(chunk_size, "_total_memory", lambda device: 0)  # no GPU at hand
    assert chunk_rows(64 * 2**20, 32_000, torch.float32, gpu, False) == 524
    assert chunk_rows(512 * 2**20, 131_072, torch.bfloat16, gpu, False) == 2048
    assert chunk_rows(512 * 2**20, 131_072, torch.bfloat16, gpu, True) == 1024
    assert chunk_rows(None, 262_144, torch.float32, gpu, False) == 2048  # never fewer by default
    assert chunk_rows(None, 131_072, torch.bfloat16, gpu, False) == 4096
    assert chunk_rows(64 * 2**20, 4096, torch.bfloat16, cpu, False) == 1024
    assert chunk_rows(1, 4096, torch.float32, cpu, False) == 1


@settings(deadline=None, max_examples=100)
@given(rows=st.integers(0, 5000), most=st.integers(1, 1500), multiple=st.sampled_from([1, 16, 128]))
def test_parts_cover_the_rows_in_order(rows: int, most: int, multiple: int) -> None:
    parts = split(rows, most, multiple)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    sizes = [part.stop - part.start for part in parts]
    assert all(0 < size <= most for size in sizes)
    if multiple > 1 and most >= multiple:
        assert all(size % multiple == 0 for size in sizes[:-1])
        assert len(sizes) <= -(-rows // (most // multiple * multiple))
    else:
        assert max(sizes, default=0) - min(sizes, default=0) <= 1


def test_signature_function_rounds_like_the_head() -> None:
    hidden, weight, targets, ids = case(torch.bfloat16)
    left, right = torch.randn(H, Q), torch.randn(H, Q)
    leaf = hidden.clone().requires_grad_()
    out = linear_cross_entropy(
        leaf, weight, targets, sample_ids=ids, num_samples=B, token_weight=1.0, signature=(left, right)
    )
    out.loss.backward()
    assert torch.equal(gradient_signature(hidden, leaf.grad, left, right, ids, B), out.signature)
