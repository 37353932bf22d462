"""Inner product of every sample's last-layer gradient with the batch's, in its exact form."""
from __future__ import annotations

import torch
from torch import Tensor

from lead_kernels.checks import check_device, check_shape, without_autocast
from lead_kernels.segment_reduce import segment_bounds, segment_sum


def grad_inner_product(
    hidden: Tensor, hidden_grad: Tensor, mean_grad: Tensor, sample_ids: Tensor, num_samples: int, sample_weight: Tensor
) -> Tensor:
    """s_i = <m_i, M> for the samples of a micro-batch, fp32 [B].

    With h_t the hidden state and e_t the gradient of row t's loss there, m_i = (1/n_i) sum_t e_t h_t^T is the gradient of sample i's mean
    loss with respect to a matrix A inserted as A h_t at A = I, and M = sum_i w_i m_i (H x H, `mean_grad`) is the step's.

    hidden: [T, H]; hidden_grad: [T, H], what autograd leaves at `hidden` when the loss is sum_i w_i L_i, that is w_i / n_i * e_t;
    mean_grad: fp32 [H, H], sum of hidden_grad^T hidden over the step; sample_ids: int64 [T], non-decreasing; sample_weight: [B], w_i.
    s_i = (1/n_i) sum_t e_t^T M h_t = (1/w_i) sum_t hidden_grad_t^T M h_t; 0 where w_i is 0.
    Two T x H x H products and no [B, H, H] tensor.
    """
    rows, width = hidden.shape
    check_shape("hidden_grad", hidden_grad, (rows, width))
    check_shape("mean_grad", mean_grad, (width, width))
    check_shape("sample_ids", sample_ids, (rows,))
    check_shape("sample_weight", sample_weight, (num_samples,))
    check_device(hidden.device, hidden_grad=hidden_grad, mean_grad=mean_grad, sample_ids=sample_ids, sample_weight=sample_weight)
    with torch.no_grad(), without_autocast(hidden.device):
        wide = torch.promote_types(mean_grad.dtype, torch.float32)
        moved_TH = hidden_grad.to(wide) @ mean_grad.to(wide)
        per_row = (moved_TH * hidden.to(wide)).sum(1)
        sums = segment_sum(per_row, segment_bounds(sample_ids, num_samples))
        weight = sample_weight.to(wide)
        return torch.where(weight != 0, sums / torch.where(weight != 0, weight, 1.0), 0.0)
