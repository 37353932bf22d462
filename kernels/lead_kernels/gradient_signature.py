"""A q x q sketch of every sample's last-layer gradient, from which inner products between samples and batches are read off."""
from __future__ import annotations

import torch
from torch import Tensor

from lead_kernels.checks import check_device, check_shape, on_host, without_autocast
from lead_kernels.segment_reduce import segment_bounds, segment_sum

PIECE = 32
"""Rows of a piece in the static-shape form: segments are cut every PIECE rows, which bounds the padding by B * PIECE rows."""


def _project(rows_TH: Tensor, matrix_Hq: Tensor) -> Tensor:
    """rows @ matrix in the rows' dtype, handed on in fp32. The matrix is rounded to it as well, for every sample alike."""
    matrix_Hq = matrix_Hq.to(rows_TH.dtype)
    if rows_TH.dtype in (torch.float16, torch.bfloat16) and rows_TH.device.type != "cpu":
        return torch.mm(rows_TH, matrix_Hq, out_dtype=torch.float32)
    return torch.mm(rows_TH, matrix_Hq).to(torch.promote_types(rows_TH.dtype, torch.float32))


def _outer_products_by_loop(left_Tq: Tensor, right_Tq: Tensor, bounds: Tensor) -> Tensor:
    """One small matrix product per sample; needs the bounds on the host."""
    out_Bqq = left_Tq.new_zeros(bounds.shape[0] - 1, left_Tq.shape[1], right_Tq.shape[1])
    first, last = int(bounds[0]), int(bounds[-1])
    sizes = bounds.diff().tolist()
    lefts, rights = left_Tq[first:last].t().split(sizes, 1), right_Tq[first:last].split(sizes)
    for out, left, right in zip(out_Bqq.unbind(0), lefts, rights, strict=True):
        torch.mm(left, right, out=out)
    return out_Bqq


def _outer_products_by_pieces(left_Tq: Tensor, right_Tq: Tensor, bounds: Tensor) -> Tensor:
    """The same with shapes that depend only on (T, B, q).

    Sample b's rows make ceil(n_b / PIECE) pieces, padded with zeros: at most ceil(T / PIECE) + B pieces in all, whatever the lengths. Their
    products are one batched matrix product; a sample's pieces are neighbours, so that a segment sum puts them together.
    """
    rows, slots = left_Tq.shape[0], bounds.shape[0] - 1
    num_pieces = -(-rows // PIECE) + slots
    device = left_Tq.device
    pieces_B = (bounds.diff() + PIECE - 1) // PIECE
    piece_bounds = torch.cat([bounds.new_zeros(1), pieces_B.cumsum(0)])
    piece = torch.arange(num_pieces, device=device)
    slot = torch.searchsorted(piece_bounds[1:], piece, right=True).clamp(max=slots - 1)
    first = bounds[slot] + (piece - piece_bounds[slot]) * PIECE
    row = first[:, None] + torch.arange(PIECE, device=device)
    inside = (row < bounds[slot + 1][:, None])[..., None]
    row = row.clamp(max=rows - 1)
    left = torch.where(inside, left_Tq[row], 0.0)
    right = torch.where(inside, right_Tq[row], 0.0)
    return segment_sum(torch.bmm(left.transpose(1, 2), right), piece_bounds)


def signature_from_bounds(hidden: Tensor, hidden_grad: Tensor, left: Tensor, right: Tensor, bounds: Tensor, counts: Tensor) -> Tensor:
    """`gradient_signature` of samples given by `bounds` [B+1]; divides by `counts` [B]. Rows not counted must be 0 in `hidden_grad`."""
    left_Tq, right_Tq = _project(hidden_grad, left), _project(hidden, right)
    if hidden.shape[0] == 0:
        sums = left_Tq.new_zeros(counts.shape[0], left.shape[1], right.shape[1])
    elif on_host(hidden):
        sums = _outer_products_by_loop(left_Tq, right_Tq, bounds)
    else:
        sums = _outer_products_by_pieces(left_Tq, right_Tq, bounds)
    return sums / counts.clamp(min=1)[:, None, None]


def gradient_signature(
    hidden: Tensor, hidden_grad: Tensor, left: Tensor, right: Tensor, sample_ids: Tensor, num_samples: int
) -> Tensor:
    """phi_i = (1/n_i) sum_t (P^T e_t) (Q^T h_t)^T over sample i's n_i rows: [num_samples, q, q], fp32; 0 for a sample without rows.

    hidden, hidden_grad: [T, H], h_t and e_t; left, right: [H, q], P and Q; sample_ids: int64 [T], non-decreasing. With entries of variance
    1/q in P and Q, <phi_i, phi_j> is an unbiased estimate of <m_i, m_j>, m_i = (1/n_i) sum_t e_t h_t^T. Every row counts: to leave some
    out, use `linear_cross_entropy(signature=...)`, which does so for ignored targets.
    """
    rows, width = hidden.shape
    check_shape("hidden_grad", hidden_grad, (rows, width))
    check_shape("left", left, (width, left.shape[-1]))
    check_shape("right", right, (width, right.shape[-1]))
    check_shape("sample_ids", sample_ids, (rows,))
    check_device(hidden.device, hidden_grad=hidden_grad, left=left, right=right, sample_ids=sample_ids)
    with torch.no_grad(), without_autocast(hidden.device):
        bounds = segment_bounds(sample_ids, num_samples)
        return signature_from_bounds(hidden, hidden_grad, left, right, bounds, bounds.diff())
