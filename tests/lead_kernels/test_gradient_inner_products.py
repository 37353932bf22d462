"""Signatures and exact inner products, in both forms, against autograd's per-sample gradients in float64."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lead_kernels import grad_inner_product, gradient_signature, linear_cross_entropy, reference

pytestmark = pytest.mark.slow

signature_module = sys.modules[
    "lead_kernels.gradient_signature"
]  # the package's attributes of these names are the functions
product_module = sys.modules["lead_kernels.grad_inner_product"]
segment_module = sys.modules["lead_kernels.segment_reduce"]

T, H, V, B = 90, 10, 37, 6
SIZES = [20, 1, 0, 33, 1, 35]
IDS = torch.repeat_interleave(torch.arange(B), torch.tensor(SIZES))
LOW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def bf16_products_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies bf16 as 16-bit integers; with fp32 copies its products are the hardware's."""
    if not os.environ.get("TRITON_INTERPRET"):
        return
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_dot

    def create_dot(self: Any, *operands: Any) -> Any:
        return original(
            self, *(self.cast_impl(x, float32) if getattr(x, "dtype", None) == bfloat16 else x for x in operands)
        )

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    targets = torch.randint(0, V, (T,), generator=g)
    targets[[0, 5, 20, 60, 89]] = -100  # row 20 is all of sample 1
    return torch.randn(T, H, generator=g).double(), torch.randn(V, H, generator=g).double(), targets


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of several pieces, sketches of width 5 in several tiles, rows of width 40 in several column tiles."""
    cut = segment_module.Tile(rows=8, step=4, columns=16)
    monkeypatch.setattr(signature_module, "tile", lambda width: cut)
    monkeypatch.setattr(segment_module, "tile", lambda width: cut._replace(columns=1) if width == 1 else cut)
    monkeypatch.setattr(
        signature_module, "outer_tile", lambda left, right, dtype: (4, 4 if dtype == torch.float64 else 16)
    )
    monkeypatch.setattr(product_module, "tiles", lambda dtype: product_module.Tiles(16, 16, 16, 128, 1))


def per_sample_gradients(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """m_i: gradient of sample i's mean loss with respect to A, inserted as A h_t before the head, at A = I."""
    gradients = []
    for sample in range(B):
        rows = (sample == IDS) & (targets >= 0)
        matrix = torch.eye(H, dtype=torch.float64, requires_grad=True)
        if rows.any():
            logits = hidden[rows] @ matrix.t() @ weight.t()
            torch.nn.functional.cross_entropy(logits, targets[rows]).backward()
        gradients.append(torch.zeros(H, H).double() if matrix.grad is None else matrix.grad)
    return torch.stack(gradients)


def row_errors(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """e_t by autograd; 0 for ignored rows."""
    leaf = hidden.clone().requires_grad_()
    torch.nn.functional.cross_entropy(leaf @ weight.t(), targets, reduction="sum").backward()
    assert leaf.grad is not None
    return leaf.grad


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def test_signature_is_the_projected_per_sample_gradient(
    form: str, small_tiles: None, case: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, weight, targets = case
    left, right = torch.randn(H, 5).double(), torch.randn(H, 6).double()
    bounds = torch.tensor([0, *SIZES]).cumsum(0)
    counts = torch.stack([((b == IDS) & (targets >= 0)).sum() for b in range(B)])
    errors = row_errors(hidden, weight, targets)
    out = signature_module.signature_from_bounds(hidden, errors, left, right, bounds, counts)
    torch.testing.assert_close(out, left.t() @ per_sample_gradients(hidden, weight, targets) @ right)


def test_heads_signature_is_the_projected_per_sample_gradient(form: str, case: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets = case
    left, right = torch.randn(H, 4).double(), torch.randn(H, 4).double()
    out = linear_cross_entropy(
        hidden, weight, targets, sample_ids=IDS, num_samples=B, signature=(left, right), chunk_bytes=4 * V * 32
    )
    torch.testing.assert_close(out.signature, left.t() @ per_sample_gradients(hidden, weight, targets) @ right)


def test_exact_inner_product_of_per_sample_gradients(form: str, case: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets = case
    gradients = per_sample_gradients(hidden, weight, targets)
    tokens = torch.stack([((b == IDS) & (targets >= 0)).sum() for b in range(B)])
    sample_weight = torch.tensor([0.3, 0.2, 0.1, 0.0, 0.5, 0.7]).double()
    mean_gradient = (sample_weight[:, None, None] * gradients).sum(0)
    expected = (gradients * mean_gradient).sum((1, 2))
    expected[3] = 0  # weight 0: its hidden gradient is 0, and nothing can be said

    hidden_grad = row_errors(hidden, weight, targets) * (sample_weight / tokens.clamp(min=1))[IDS][:, None]
    torch.testing.assert_close(hidden_grad.t() @ hidden, mean_gradient)
    for operator in (grad_inner_product, reference.grad_inner_product):
        torch.testing.assert_close(operator(hidden, hidden_grad, mean_gradient, IDS, B, sample_weight), expected)
    eye = torch.eye(H).double()  # projections that lose nothing
    phi = gradient_signature(hidden, hidden_grad, eye, eye, IDS, B) * torch.tensor(SIZES)[:, None, None]
    by_signature = (phi * mean_gradient).sum((1, 2)) / torch.where(sample_weight > 0, sample_weight, 1.0)
    torch.testing.assert_close(by_signature, expected)


@pytest.mark.parametrize(("rows", "slots"), [(1, 1), (31, 5), (32, 1), (33, 40), (130, 3), (57, 57), (0, 4), (5, 0)])
def test_signature_agrees_with_the_reference(form: str, rows: int, slots: int) -> None:
    g = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, max(slots, 1), (rows,), generator=g).sort().values if rows != 57 else torch.arange(57)
    hidden, errors = torch.randn(rows, H, generator=g).double(), torch.randn(rows, H, generator=g).double()
    left, right = torch.randn(H, 3, generator=g).double(), torch.randn(H, 5, generator=g).double()
    out = gradient_signature(hidden, errors, left, right, ids, slots)
    expected = (
        reference.gradient_signature(hidden, errors, left, right, ids, slots)
        if slots
        else torch.zeros(0, 3, 5).double()
    )
    torch.testing.assert_close(out, expected)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 2, 7, 8, 9, 21]), min_size=1, max_size=5),
    outside=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_signature_of_any_bounds(
    form: str,
    small_tiles: None,
    sizes: list[int],
    outside: tuple[int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Rows of nobody lie before and behind the samples, and the counts are the caller's."""
    g = torch.Generator().manual_seed(seed)
    rows, first = sum(sizes) + sum(outside), outside[0]
    hidden, errors = (torch.randn(rows, 4, generator=g).to(dtype) for _ in range(2))
    left, right = (torch.randn(4, width, generator=g).to(dtype) for width in widths)
    bounds, counts = first + torch.tensor([0, *sizes]).cumsum(0), torch.randint(0, 5, (len(sizes),), generator=g)
    out = signature_module.signature_from_bounds(hidden, errors, left, right, bounds, counts)
    inside = slice(first, rows - outside[1])
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    expected = reference.gradient_signature(hidden[inside], errors[inside], left, right, ids, len(sizes))
    expected = expected * torch.tensor(sizes)[:, None, None] / counts.clamp(min=1)[:, None, None]
    assert out.dtype == dtype
    torch.testing.assert_close(
        out, expected, rtol=2e-5, atol=2e-5
    ) if dtype == torch.float32 else torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("width", [8, 20, 64, 70])
@pytest.mark.parametrize("dtype", LOW)
def test_signature_is_as_exact_as_unfused_products(form: str, dtype: torch.dtype, width: int) -> None:
    """At the real tiles: 150 rows make several pieces, and a sketch of 70 four tiles."""
    g = torch.Generator().manual_seed(width)
    ids = torch.tensor([0] * 100 + [2] * 3 + [3] * 47)
    hidden, errors = (torch.randn(150, 48, generator=g).to(dtype) for _ in range(2))
    left, right = (torch.randn(48, width, generator=g).to(dtype) / width**0.5 for _ in range(2))
    exact = reference.gradient_signature(hidden.double(), errors.double(), left.double(), right.double(), ids, 5)
    unfused = torch.stack(
        [(errors[ids == b] @ left).t() @ (hidden[ids == b] @ right) / max(int((ids == b).sum()), 1) for b in range(5)]
    )
    out = gradient_signature(hidden, errors, left, right, ids, 5)
    assert out.dtype == torch.float32
    assert torch.equal(out[[1, 4]], torch.zeros(2, width, width))
    assert error(out, exact) <= 1.2 * error(unfused, exact) + 2**-24


def test_sketch_estimates_the_inner_product_without_bias() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, errors = torch.randn(40, 32, generator=g), torch.randn(40, 32, generator=g)
    ids = torch.arange(40) // 20
    eye = torch.eye(32)
    m = gradient_signature(hidden, errors, eye, eye, ids, 2)
    exact = float((m[0] * m[0]).sum())
    q, estimates = 64, []
    for _ in range(200):
        left, right = torch.randn(32, q, generator=g) / q**0.5, torch.randn(32, q, generator=g) / q**0.5
        phi = gradient_signature(hidden, errors, left, right, ids, 2)
        estimates.append(float((phi[0] * phi[0]).sum()) / exact)
    mean, spread = torch.tensor(estimates).mean(), torch.tensor(estimates).std()
    # |P^T m Q|^2 is unbiased for |m|^2; three standard errors of 200 draws
    assert abs(float(mean) - 1) < 3 * float(spread) / 200**0.5
    assert float(spread) < 0.6


def random_step(rows: int, width: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, hidden_grad in `dtype` and M in fp32 (float64 for float64), M's entries of size `scale`."""
    g = torch.Generator().manual_seed(rows)
    hidden, grad = (torch.randn(rows, width, generator=g).double().to(dtype) for _ in range(2))
    mean = scale * torch.randn(width, width, generator=g).double()
    mean += scale * (grad.double().t() @ hidden.double()) / rows**0.5  # so that the inner products do not cancel
    return hidden, grad, mean.to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize(("rows", "width"), [(150, 144), (129, 193), (7, 40)])
@pytest.mark.parametrize("dtype", LOW)
def test_inner_product_is_as_exact_as_unfused_products(form: str, dtype: torch.dtype, rows: int, width: int) -> None:
    """At the real tiles: at least two of rows, of columns and in depth in the larger two cases."""
    hidden, grad, mean = random_step(rows, width, dtype)
    ids, weight = torch.arange(rows) // (rows // 3 + 1), torch.tensor([0.5, 2.0, 0.0, 1.0])
    exact = reference.grad_inner_product(hidden.double(), grad.double(), mean.double(), ids, 4, weight.double())
    per_row = ((grad @ mean.to(dtype)) * hidden).sum(1)
    sums = torch.stack([per_row[ids == b].sum() for b in range(4)]).float()
    unfused = torch.where(weight != 0, sums / torch.where(weight != 0, weight, 1.0), 0.0)
    out = grad_inner_product(hidden, grad, mean, ids, 4, weight)
    assert out.dtype == torch.float32
    assert out[2:].tolist() == [0.0, 0.0]
    assert error(out, exact) <= 1.2 * error(unfused, exact) + 2**-23


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1e6])
def test_half_precision_keeps_a_mean_gradient_of_any_size(form: str, scale: float) -> None:
    hidden, grad, mean = random_step(40, 48, torch.float16, scale)
    exact = reference.grad_inner_product(
        *(x.double() for x in (hidden, grad, mean)), torch.zeros(40).long(), 1, torch.ones(1).double()
    )
    assert error(grad_inner_product(hidden, grad, mean, torch.zeros(40).long(), 1, torch.ones(1)), exact) < 1e-3


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 25), min_size=1, max_size=5),
    width=st.integers(1, 40),
    weights=st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=5, max_size=5),
)
def test_inner_product_of_any_shape(
    form: str, small_tiles: None, sizes: list[int], width: int, weights: list[float]
) -> None:
    hidden, grad, mean = random_step(max(sum(sizes), 1), width, torch.float64)
    hidden, grad = hidden[: sum(sizes)], grad[: sum(sizes)]
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    weight = torch.tensor(weights[: len(sizes)]).double()
    out = grad_inner_product(hidden, grad, mean, ids, len(sizes), weight)
    torch.testing.assert_close(
        out, reference.grad_inner_product(hidden, grad, mean, ids, len(sizes), weight), rtol=1e-9, atol=1e-9
    )


def test_more_row_tiles_than_a_group_holds(form: str, small_tiles: None) -> None:
    rows = 16 * (2 * product_module.GROUP + 3) - 5
    hidden, grad, mean = random_step(rows, 40, torch.float32)
    ids, weight = torch.arange(rows) // 100, torch.rand(rows // 100 + 1) + 0.5
    out = grad_inner_product(hidden, grad, mean, ids, len(weight), weight)
    exact = reference.grad_inner_product(*(x.double() for x in (hidden, grad, mean)), ids, len(weight), weight.double())
    assert error(out, exact) < 1e-6


def test_inputs_may_lie_anywhere(form: str) -> None:
    hidden, grad, mean = random_step(20, 32, torch.bfloat16)
    ids, weight = torch.zeros(20, dtype=torch.int32), torch.ones(1)
    shifted = torch.empty(20 * 32 + 1, dtype=torch.bfloat16)[1:].view(20, 32).copy_(hidden)
    assert shifted.data_ptr() % 16
    for width in (32, 48):  # the kernel is compiled for aligned rows of a multiple of 16
        aligned = product_module._aligned(shifted, width)
        assert aligned.data_ptr() % 16 == 0
        assert torch.equal(aligned, torch.nn.functional.pad(hidden, (0, width - 32)))
    expected = grad_inner_product(hidden, grad, mean, ids, 1, weight)
    assert torch.equal(
        grad_inner_product(shifted, grad.t().contiguous().t(), mean.t().contiguous().t(), ids, 1, weight), expected
    )


def test_two_runs_agree_bit_for_bit(form: str) -> None:
    hidden, grad, mean = random_step(150, 144, torch.bfloat16)
    ids, left = torch.arange(150) // 70, torch.randn(144, 20)
    for run in (
        lambda: grad_inner_product(hidden, grad, mean, ids, 3, torch.ones(3)),
        lambda: gradient_signature(hidden, grad, left, left, ids, 3),
    ):
        assert torch.equal(run(), run())


@pytest.mark.parametrize("form", ["kernels"], indirect=True)
def test_kernels_never_look_at_the_device(form: str, small_tiles: None, no_host_reads: Callable[[], Any]) -> None:
    for dtype in LOW:
        hidden, grad, mean = random_step(40, 24, dtype)
        left, bounds = torch.randn(24, 5), torch.tensor([3, 20, 20, 37])
        with no_host_reads():
            signature_module.signature_from_bounds(hidden, grad, left, left, bounds, bounds.diff())
            product_module._row_products_on_gpu(hidden, grad, mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fake_tensors(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    with FakeTensorMode():
        empty = lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
        hidden, ids = empty(9, 16), empty(9, dtype=torch.int64)
        phi = gradient_signature(hidden, hidden, empty(16, 4), empty(16, 5), ids, 3)
        s = grad_inner_product(hidden, hidden, empty(16, 16), ids, 3, empty(3))
    assert (phi.shape, phi.dtype, s.shape, s.dtype) == ((3, 4, 5), wide, (3,), wide)


def test_compiles_without_a_graph_break(form: str) -> None:
    hidden, grad, mean = random_step(20, 12, torch.float32)
    ids, left, weight = torch.arange(20) // 7, torch.randn(12, 4), torch.ones(3)

    def both(h: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        return gradient_signature(h, e, left, left, ids, 3) + 1, grad_inner_product(h, e, mean, ids, 3, weight) + 1

    for compiled, eager in zip(
        torch.compile(both, fullgraph=True, backend="aot_eager")(hidden, grad), both(hidden, grad), strict=True
    ):
        assert torch.equal(compiled, eager)
    torch.library.opcheck(signature_module._gradient_signature, (hidden, grad, left, left, ids, 3))
    torch.library.opcheck(product_module._grad_inner_product, (hidden, grad, mean, ids, 3, weight))


def test_autocast_changes_nothing(form: str) -> None:
    hidden, grad, mean = random_step(20, 12, torch.float32)
    ids, left = torch.arange(20) // 7, torch.randn(12, 4)
    runs = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            phi = gradient_signature(hidden, grad, left, left, ids, 3)
            runs.append((phi, grad_inner_product(hidden, grad, mean, ids, 3, torch.ones(3))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_refusals() -> None:
    hidden, ids, square = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), torch.ones(3, 3)
    with pytest.raises(ValueError, match="hidden_grad has shape"):
        gradient_signature(hidden, torch.ones(5, 3), square, square, ids, 1)
    with pytest.raises(ValueError, match=r"hidden_grad is torch\.float64"):
        gradient_signature(hidden, hidden.double(), square, square, ids, 1)
    with pytest.raises(ValueError, match="right has shape"):
        gradient_signature(hidden, hidden, square, torch.ones(4, 3), ids, 1)
    with pytest.raises(ValueError, match="mean_grad has shape"):
        grad_inner_product(hidden, hidden, torch.ones(3, 4), ids, 1, torch.ones(1))
    with pytest.raises(ValueError, match="sample_weight has shape"):
        grad_inner_product(hidden, hidden, square, ids, 1, torch.ones(2))
    with pytest.raises(ValueError, match="non-decreasing"):
        grad_inner_product(hidden, hidden, square, torch.tensor([0, 1, 0, 0]), 2, torch.ones(2))
