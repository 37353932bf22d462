"""The last-layer gradient of one optimizer step and of each of its samples, in the two forms `loss_change` works with.

With h_t the final-norm output at a response position and e_t = W^T (softmax(W h_t) - onehot(y_t)) the loss gradient
there, sample i's gradient is m_i = (1/n_i) sum_t e_t h_t^T (H x H), and the step's is M = sum_i w_i m_i over all
micro-batches and ranks, w_i = n_i / response tokens of the whole step. Both classes collect one micro-batch after
another and give M (or its sketch) and s_i = <m_i, M>.

A = this rank's micro-batches, B = slots, R = rows, H = hidden size, q = sketch width, D = q*q or H*H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lead_kernels import HeadLoss, grad_inner_product
from lead_kernels.products import exact_product

AllReduce = Callable[[Tensor], object]
"""Sums a tensor over the ranks, in place."""


class SketchGradient:
    """phi_i = P^T m_i Q: q x q numbers a sample, by-products of the head loss; <phi_i, phi_j> estimates <m_i, m_j>.

    P and Q are H x q with independent entries N(0, 1/q), which makes the estimate unbiased. They are drawn on the
    CPU from the seed: the same on every rank and device.
    """

    wants_hidden = False

    def __init__(self, hidden_size: int, sketch_dim: int, device: torch.device, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        left, right = torch.randn(2, hidden_size, sketch_dim, generator=generator) / sketch_dim**0.5
        self.signature: tuple[Tensor, Tensor] | None = (left.to(device), right.to(device))
        self.size = sketch_dim**2
        self._parts: list[tuple[Tensor, Tensor]] = []

    def collect(
        self,
        head_loss: HeadLoss,
        sample_weight: Tensor,
        hidden: Tensor | None,
        hidden_grad: Tensor | None,
        row_slots: Tensor | None,
    ) -> None:
        if head_loss.signature is None:
            raise ValueError("the head loss has no signature; give linear_cross_entropy this estimator's `signature`")
        self._parts.append((head_loss.signature.flatten(1), sample_weight))

    def take(self, all_reduce: AllReduce, per_sample: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """(step gradient [D], s [A, B] if `per_sample`, sample weights [A, B]); then forgets what it has collected."""
        phi_ABD, weight_AB = (torch.stack(part) for part in zip(*self._parts, strict=True))
        self._parts = []
        step_D = torch.einsum("ab,abd->d", weight_AB, phi_ABD)
        all_reduce(step_D)
        return step_D, phi_ABD @ step_D if per_sample else None, weight_AB


class ExactGradient:
    """m_i itself, never built: hidden states and their gradients, [R, H] each, are kept for a whole optimizer step.

    The gradient that autograd leaves at h_t is w_i / n_i * e_t, so M = sum_t grad_t h_t^T needs no weights.
    """

    wants_hidden = True

    def __init__(self, hidden_size: int) -> None:
        self.signature: tuple[Tensor, Tensor] | None = None
        self.size = hidden_size**2
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def collect(
        self,
        head_loss: HeadLoss,
        sample_weight: Tensor,
        hidden: Tensor | None,
        hidden_grad: Tensor | None,
        row_slots: Tensor | None,
    ) -> None:
        if hidden is None or hidden_grad is None or row_slots is None:
            raise ValueError("the exact form needs hidden, hidden_grad and row_slots, after the backward pass")
        self._parts.append((hidden.detach(), hidden_grad, row_slots, sample_weight))

    def take(self, all_reduce: AllReduce, per_sample: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """(step gradient [D], s [A, B] if `per_sample`, sample weights [A, B]); then forgets what it has collected."""
        parts, self._parts = self._parts, []
        step_HH = exact_product(parts[0][1].T, parts[0][0])
        for hidden_RH, grad_RH, _, _ in parts[1:]:
            step_HH += exact_product(grad_RH.T, hidden_RH)
        all_reduce(step_HH)
        s_AB = None
        if per_sample:
            s_AB = torch.stack([grad_inner_product(h, g, step_HH, slots, len(w), w) for h, g, slots, w in parts])
        return step_HH.flatten(), s_AB, torch.stack([weight for *_, weight in parts])
