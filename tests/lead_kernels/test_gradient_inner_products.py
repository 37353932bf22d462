"""Signatures and exact inner products against the per-sample gradients that autograd finds, in float64."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lead_kernels import grad_inner_product, gradient_signature, linear_cross_entropy, reference

T, H, V, B = 90, 10, 37, 6
SIZES = [20, 1, 0, 33, 1, 35]
IDS = torch.repeat_interleave(torch.arange(B), torch.tensor(SIZES))


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    targets = torch.randint(0, V, (T,), generator=g)
    targets[[0, 5, 20, 60, 89]] = -100  # row 20 is all of sample 1
    return torch.randn(T, H, generator=g).double(), torch.randn(V, H, generator=g).double(), targets


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


def test_signature_is_the_projected_per_sample_gradient(form: str, case: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets = case
    left, right = torch.randn(H, 4).double(), torch.randn(H, 4).double()
    out = linear_cross_entropy(hidden, weight, targets, sample_ids=IDS, num_samples=B, signature=(left, right), chunk_bytes=4 * V * 32)
    torch.testing.assert_close(out.signature, left.t() @ per_sample_gradients(hidden, weight, targets) @ right)


def test_identity_projections_give_the_exact_inner_product(form: str, case: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets = case
    gradients = per_sample_gradients(hidden, weight, targets)
    tokens = torch.stack([((b == IDS) & (targets >= 0)).sum() for b in range(B)])
    sample_weight = torch.tensor([0.3, 0.2, 0.1, 0.0, 0.5, 0.7]).double()
    mean_gradient = (sample_weight[:, None, None] * gradients).sum(0)
    expected = (gradients * mean_gradient).sum((1, 2))
    expected[3] = 0  # weight 0: its hidden gradient is 0, and nothing can be said

    leaf = hidden.clone().requires_grad_()
    token_weight = (sample_weight / tokens.clamp(min=1))[IDS]
    eye = torch.eye(H).double()
    out = linear_cross_entropy(leaf, weight, targets, sample_ids=IDS, num_samples=B, token_weight=token_weight, signature=(eye, eye))
    out.loss.backward()
    s = grad_inner_product(hidden, leaf.grad, leaf.grad.t() @ hidden, IDS, B, sample_weight)
    torch.testing.assert_close(s, expected)
    torch.testing.assert_close(reference.grad_inner_product(hidden, leaf.grad, leaf.grad.t() @ hidden, IDS, B, sample_weight), expected)
    by_signature = (out.signature * (sample_weight[:, None, None] * out.signature).sum(0)).sum((1, 2))
    torch.testing.assert_close(torch.where(sample_weight > 0, by_signature, 0.0), expected)


def test_inner_product_in_fp32_and_bf16(case: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, _, _ = case
    errors, mean = torch.randn(T, H).double(), torch.randn(H, H).double()
    sample_weight = torch.rand(B).double()
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-6)):  # products in fp32 whatever comes in
        h, e = hidden.to(dtype), errors.to(dtype)
        s = grad_inner_product(h, e, mean.float(), IDS, B, sample_weight.float())
        exact = reference.grad_inner_product(h.double(), e.double(), mean.float().double(), IDS, B, sample_weight.float().double())
        assert s.dtype == torch.float32
        assert float((s - exact).norm() / exact.norm()) < tolerance


@pytest.mark.parametrize(("rows", "slots"), [(1, 1), (31, 5), (32, 1), (33, 40), (200, 3), (257, 257), (0, 4)])
def test_both_forms_of_the_signature_agree_with_the_reference(form: str, rows: int, slots: int) -> None:
    g = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, slots, (rows,), generator=g).sort().values if rows != 257 else torch.arange(257)
    hidden, errors = torch.randn(rows, H, generator=g).double(), torch.randn(rows, H, generator=g).double()
    left, right = torch.randn(H, 3, generator=g).double(), torch.randn(H, 5, generator=g).double()
    out = gradient_signature(hidden, errors, left, right, ids, slots)
    torch.testing.assert_close(out, reference.gradient_signature(hidden, errors, left, right, ids, slots))


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
