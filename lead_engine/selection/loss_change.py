"""dL: what an optimizer step does to the losses of the samples it is taken on.

Three estimators with one interface, driven by the training loop:

    for each optimizer step:
        for each micro-batch:  head loss (with `signature`), backward, `collect`
        optimizer.step()
        change = estimate(cluster, lr, all_reduce, first_order, grad_norm)     # [A, B], 0 in empty slots
    after the round's last step:  finish_round(cluster)

Nothing here reads the device. A = this rank's micro-batches, B = slots, D = q*q numbers (sketch) or H*H (exact).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lead_engine.config.bounds import Count, Seed
from lead_engine.config.options import argument, device_argument
from lead_engine.selection.step_gradient import AllReduce, ExactGradient, SketchGradient
from lead_kernels import HeadLoss

LossChangeKind = Literal["inner", "paper", "none"]
KEEP = 0.7  # share of the old calibration that survives a new measurement


def make_loss_change(
    kind: LossChangeKind,
    hidden_size: int,
    num_clusters: int,
    device: torch.device | str,
    seed: int,
    *,
    sketch_dim: int = 64,
    calibrate_every: int = 8,
) -> LossChange:
    """The estimator of this name; `num_clusters` is the selector's `num_arms`, `sketch_dim` 0 the exact form.

    UserError for arguments that are out of range or of another type.
    """
    kind = argument(LossChangeKind, kind, "make_loss_change(kind)")
    hidden_size = argument(Count, hidden_size, "make_loss_change(hidden_size)")
    num_clusters = argument(Count, num_clusters, "make_loss_change(num_clusters)")
    at, seed = device_argument(device, "make_loss_change(device)"), argument(Seed, seed, "make_loss_change(seed)")
    if kind == "none":
        return LossChange()
    if sketch_dim == 0:
        gradient: SketchGradient | ExactGradient = ExactGradient(hidden_size)
    else:
        gradient = SketchGradient(hidden_size, sketch_dim, at, seed)
    if kind == "paper":
        return PaperLossChange(gradient, num_clusters, at)
    return InnerLossChange(gradient, calibrate_every, at)


class LossChange:
    """The interface, and the estimator `none`: every change is 0, so U follows the loss alone."""

    signature: tuple[Tensor, Tensor] | None = None
    """(P, Q), each [H, q], for linear_cross_entropy; None where no sketch is wanted."""
    wants_hidden: bool = False
    """Whether `collect` needs hidden states and their gradients."""

    def __init__(self) -> None:
        self._zeros: list[Tensor] = []

    def wants_first_order(self, step: int) -> bool:
        """Whether `estimate` should be given the measured <gradient, parameter update> of optimizer step `step`."""
        return False

    def collect(
        self,
        head_loss: HeadLoss,
        sample_weight: Tensor,
        hidden: Tensor | None = None,
        hidden_grad: Tensor | None = None,
        row_slots: Tensor | None = None,
    ) -> None:
        """Take in one micro-batch, in order.

        `sample_weight` fp32 [B]: the sample's response tokens over those of the whole step on all ranks, 0 in empty
        slots. Only where `wants_hidden`: `hidden` and `hidden_grad` [R, H], the gradient of the step's loss (each
        token weighs 1 / response tokens of the whole step), and `row_slots` int64 [R].
        """
        self._zeros.append(torch.zeros_like(sample_weight))

    def estimate(
        self, cluster: Tensor, lr: float, all_reduce: AllReduce, first_order: Tensor | None, grad_norm: Tensor
    ) -> Tensor:
        """Estimated change of each sample's mean loss, fp32 [A, B]; 0 in empty slots.

        `cluster` 0-d int64, the round's arm; `lr` the step's learning rate; `all_reduce` sums over the ranks in place;
        `first_order` 0-d, <gradient, parameter update> of this step, the same on all ranks, or None; `grad_norm` 0-d,
        the norm of the whole model's gradient before clipping. Where that is not finite the step was not taken: every
        change is 0, and nothing of the step enters later estimates.
        """
        change, self._zeros = torch.stack(self._zeros), []
        return change

    def finish_round(self, cluster: Tensor) -> None:
        """Close a round that was trained on `cluster`."""

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that later estimates depend on, not copies."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


class _FromGradient(LossChange):
    """What the two estimators that look at last-layer gradients share."""

    def __init__(self, gradient: SketchGradient | ExactGradient) -> None:
        self.gradient = gradient
        self.signature, self.wants_hidden = gradient.signature, gradient.wants_hidden

    def collect(
        self,
        head_loss: HeadLoss,
        sample_weight: Tensor,
        hidden: Tensor | None = None,
        hidden_grad: Tensor | None = None,
        row_slots: Tensor | None = None,
    ) -> None:
        self.gradient.collect(head_loss, sample_weight, hidden, hidden_grad, row_slots)


class InnerLossChange(_FromGradient):
    """Gradient inner product at the last hidden state, calibrated to the optimizer (`inner`, the default).

    To first order a step dtheta changes L_i by <grad L_i, dtheta>, of which the last layer's part is taken to be in
    proportion to s_i = <m_i, M>. The factor follows from one number that can be measured, the step's true first-order
    change of the batch loss <G, dtheta>: dL_i = kappa s_i with kappa = <G, dtheta> / <M, M>, for then
    sum_i w_i dL_i = <G, dtheta> under any optimizer.

    Between measurements <G, dtheta> is taken to be lr * |G| * c, where |G| is the whole gradient's norm and c the
    bias-corrected exponential mean (`KEEP` of the old) of <G, dtheta> / (lr |G|). It is |G| and not |G|^2 because
    AdamW and clipping make a step's length nearly independent of the gradient's.
    """

    def __init__(self, gradient: SketchGradient | ExactGradient, calibrate_every: int, device: torch.device) -> None:
        super().__init__(gradient)
        self.calibrate_every = calibrate_every
        # What the host knows of it: whether there was a measurement, though it may have been of a skipped step.
        self._measured = False
        self.measured = torch.zeros((), dtype=torch.bool, device=device)  # the same, for checkpoints
        self.ratio_sum = torch.zeros((), device=device)  # exponentially weighted sum of the measured ratios
        self.ratio_weight = torch.zeros((), device=device)  # and of their weights, 1 - KEEP**measurements

    def wants_first_order(self, step: int) -> bool:
        """Every `calibrate_every` steps, and until there is a first measurement."""
        return not self._measured or step % self.calibrate_every == 0

    def estimate(
        self, cluster: Tensor, lr: float, all_reduce: AllReduce, first_order: Tensor | None, grad_norm: Tensor
    ) -> Tensor:
        step_D, s_AB, _ = self.gradient.take(all_reduce, per_sample=True)
        assert s_AB is not None  # asked for
        norm = step_D.dot(step_D)
        # A step that is empty or was skipped has no change, and measures nothing.
        happened = (norm > 0) & grad_norm.isfinite()
        if first_order is None or lr == 0:
            weight = torch.where(self.ratio_weight > 0, self.ratio_weight, 1.0)
            expected = lr * grad_norm * self.ratio_sum / weight
        else:
            ratio = first_order / (lr * torch.where(grad_norm > 0, grad_norm, 1.0))
            measured_sum = KEEP * self.ratio_sum + (1 - KEEP) * ratio
            measured_weight = KEEP * self.ratio_weight + (1 - KEEP)
            # It is not finite where a weight is not, though the gradient there is 0.
            counts = happened & first_order.isfinite()
            self.ratio_sum.copy_(torch.where(counts, measured_sum, self.ratio_sum))
            self.ratio_weight.copy_(torch.where(counts, measured_weight, self.ratio_weight))
            expected = torch.where(counts, first_order, 0.0)
            self.measured.fill_(True)
            self._measured = True
        return torch.where(happened, expected / torch.where(happened, norm, 1.0) * s_AB, 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        return {"ratio_sum": self.ratio_sum, "ratio_weight": self.ratio_weight, "measured": self.measured}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._measured = bool(self.measured)


class PaperLossChange(_FromGradient):
    """The estimate of LEAD's paper (arXiv 2505.07437): one dL for a whole cluster, from earlier rounds (`paper`).

    g_k is the last-layer gradient of cluster k's previous round and g that of the last round, whichever its cluster;
    delta_k = <g_k, g_k>, delta = <g, g>, c = <g_k, g>. The shortest convex combination beta g_k + (1 - beta) g has
    beta = clamp((delta - c) / (delta_k + delta - 2c), 0, 1), and
        dL = -lr * |beta g_k + (1 - beta) g|^2 = -lr * (beta^2 delta_k + (1 - beta)^2 delta + 2 beta (1 - beta) c).
    On a cluster's first visit dL = -lr * delta; in the very first round dL = 0. A round's gradient is the mean of its
    steps' gradients.

    The authors' public code differs: it takes c from the cosine of two *scalars*, the gradients' norms, which is
    always 1, so that its dL is identically 0. Here gradients are vectors, sketched (q*q numbers) or exact (H*H) as
    `sketch_dim` says; K + 2 of them are kept.
    """

    def __init__(self, gradient: SketchGradient | ExactGradient, num_clusters: int, device: torch.device) -> None:
        super().__init__(gradient)
        self.by_cluster = torch.zeros(num_clusters, gradient.size, device=device)
        self.visited = torch.zeros(num_clusters, dtype=torch.bool, device=device)
        self.last = torch.zeros(gradient.size, device=device)  # 0 before the first round, which makes its dL 0
        self.round_sum = torch.zeros(gradient.size, device=device)
        self.round_steps = torch.zeros((), device=device)

    def estimate(
        self, cluster: Tensor, lr: float, all_reduce: AllReduce, first_order: Tensor | None, grad_norm: Tensor
    ) -> Tensor:
        step_D, _, weight_AB = self.gradient.take(all_reduce, per_sample=False)
        step_D = torch.where(grad_norm.isfinite(), step_D, 0.0)
        self.round_sum += step_D
        self.round_steps += (step_D != 0).any()  # a step that the budget left empty is none
        row = cluster.view(1)
        own_D = torch.where(self.visited.index_select(0, row), self.by_cluster.index_select(0, row)[0], self.last)
        gap_D = own_D - self.last  # 0 on a first visit, or if the last round was this cluster's: any beta does
        gap = gap_D.dot(gap_D)
        beta = (-self.last.dot(gap_D) / torch.where(gap > 0, gap, 1.0)).clamp(0, 1)
        shortest_D = self.last + beta * gap_D
        change = -lr * shortest_D.dot(shortest_D)
        return torch.where((weight_AB > 0) & grad_norm.isfinite(), change, 0.0)

    def finish_round(self, cluster: Tensor) -> None:
        happened = self.round_steps > 0
        mean, row = self.round_sum / self.round_steps.clamp(min=1), cluster.view(1)
        self.last.copy_(torch.where(happened, mean, self.last))
        self.by_cluster.index_copy_(0, row, torch.where(happened, mean, self.by_cluster.index_select(0, row)))
        self.visited.index_copy_(0, row, self.visited.index_select(0, row) | happened)
        self.round_sum.zero_()
        self.round_steps.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "by_cluster": self.by_cluster,
            "visited": self.visited,
            "last": self.last,
            "round_sum": self.round_sum,
            "round_steps": self.round_steps,
        }
