"""A q x q sketch of each sample's last-layer gradient: sketches give inner products between samples and batches.

Both factors are first projected to q columns by a matrix product (cuBLAS), which reads hidden and hidden_grad once: 268
MB and 17.2 GFLOP at (T, H) = (16384, 4096), q = 64, bf16. The outer products are another 0.13 GFLOP and 8.4 MB, and the
pieces' sums at most 4.2 MB plus 16 KiB a sample. The head's three products are 51.6 TFLOP there (V = 128256): the
signature adds 0.03 % to the arithmetic and, being bound by memory, some 75 us at 4 TB/s to their 74 ms at 700 TFLOP/s,
0.1 %.
"""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from lead_kernels.backend import KernelBuild, cdiv, current_device, num_warps, tl, triton, uses_kernels
from lead_kernels.checks import check_device, check_shape, without_autocast
from lead_kernels.dtypes import HALVES, wide
from lead_kernels.products import left_operand, right_operand
from lead_kernels.segment_reduce import find_piece, num_pieces, segment_bounds, sum_of_pieces, tile

THREADS = 128


@triton.jit(do_not_specialize=["num_segments"])
@no_type_check
def outer_piece(
    left_ptr, right_ptr, bounds_ptr, partials_ptr, num_segments, num_left, num_right,
    ROWS: tl.constexpr, STEP: tl.constexpr, SIDE: tl.constexpr, USE_DOT: tl.constexpr,
):  # fmt: skip
    """A piece (see segment_reduce), SIDE x SIDE entries: partials[piece] = sum of left_t right_t^T over its rows t."""
    piece = tl.program_id(0).to(tl.int64)
    tiles_right = tl.cdiv(num_right, SIDE)
    i = tl.program_id(1) // tiles_right * SIDE + tl.arange(0, SIDE)
    j = tl.program_id(1) % tiles_right * SIDE + tl.arange(0, SIDE)
    first, last = find_piece(bounds_ptr, piece, num_segments, ROWS)
    total = tl.zeros((SIDE, SIDE), partials_ptr.dtype.element_ty)
    for start in range(first, last, STEP):
        row = (start + tl.arange(0, STEP)).to(tl.int64)[:, None]
        left = tl.load(left_ptr + row * num_left + i[None, :], mask=(row < last) & (i < num_left)[None, :], other=0.0)
        right = tl.load(
            right_ptr + row * num_right + j[None, :], mask=(row < last) & (j < num_right)[None, :], other=0.0
        )
        if USE_DOT:
            total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
        else:
            total += tl.sum(left[:, :, None] * right[:, None, :], 0)
    entries = partials_ptr + piece * num_left * num_right + i[:, None] * num_right + j[None, :]
    tl.store(entries, total, mask=(i < num_left)[:, None] & (j < num_right)[None, :])


def outer_tile(num_left: int, num_right: int, dtype: torch.dtype) -> tuple[int, int]:
    """(STEP, SIDE): the whole q x q up to q = 64; small tiles in float64, which tl.dot lacks on some GPUs."""
    if dtype == torch.float64:
        return 4, 16
    return 32, min(64, max(16, triton.next_power_of_2(max(num_left, num_right))))


def _outer_products_on_gpu(left_Tq: Tensor, right_Tq: Tensor, bounds: Tensor) -> Tensor:
    """[B, q, q] in the operands' dtype, fp32 or float64."""
    (num_rows, num_left), num_right, segments = left_Tq.shape, right_Tq.shape[1], bounds.shape[0] - 1
    if 0 in (num_rows, num_left, num_right, segments):
        return left_Tq.new_zeros(segments, num_left, num_right)
    cut = tile(num_left * num_right)
    step, side = outer_tile(num_left, num_right, left_Tq.dtype)
    partials = left_Tq.new_empty(num_pieces(num_rows, segments, cut.rows), num_left * num_right)
    with current_device(left_Tq):
        outer_piece[(partials.shape[0], cdiv(num_left, side) * cdiv(num_right, side))](
            left_Tq, right_Tq, bounds, partials, segments, num_left, num_right,
            ROWS=cut.rows, STEP=step, SIDE=side, USE_DOT=left_Tq.dtype != torch.float64,
            num_warps=num_warps(THREADS, left_Tq), num_stages=1,
        )  # fmt: skip
        return sum_of_pieces(partials, bounds, cut).view(segments, num_left, num_right)


def _outer_products_on_host(left_Tq: Tensor, right_Tq: Tensor, bounds: Tensor) -> Tensor:
    """One small matrix product per sample; reads the bounds."""
    out_Bqq = left_Tq.new_zeros(bounds.shape[0] - 1, left_Tq.shape[1], right_Tq.shape[1])
    first, last = int(bounds[0]), int(bounds[-1])
    sizes = bounds.diff().tolist()
    lefts, rights = left_Tq[first:last].t().split(sizes, 1), right_Tq[first:last].split(sizes)
    for out, left, right in zip(out_Bqq.unbind(0), lefts, rights, strict=True):
        torch.mm(left, right, out=out)
    return out_Bqq


def _project(rows_TH: Tensor, matrix_Hq: Tensor) -> Tensor:
    """rows @ matrix in the rows' dtype, to which the matrix is rounded for all samples alike; returned in fp32."""
    rows_TH, matrix_Hq = left_operand(rows_TH), right_operand(matrix_Hq.to(rows_TH.dtype))
    if rows_TH.dtype in HALVES and rows_TH.device.type != "cpu":
        return torch.mm(rows_TH, matrix_Hq, out_dtype=torch.float32)
    return torch.mm(rows_TH, matrix_Hq).to(wide(rows_TH.dtype))


def signature_from_bounds(
    hidden: Tensor,
    hidden_grad: Tensor,
    left: Tensor,
    right: Tensor,
    bounds: Tensor,
    counts: Tensor,
    weight_T: Tensor | None = None,
) -> Tensor:
    """`gradient_signature` of samples given by `bounds` [B+1]; divides by `counts` [B]. Rows not counted must be 0 in
    `hidden_grad`, which holds the rows' gradients times `weight_T`, where given.

    bounds: integers, non-decreasing, within 0 to T; rows before the first and from the last on belong to nobody.
    """
    left_Tq, right_Tq = _project(hidden_grad, left), _project(hidden, right)
    # A row's weight is a factor of its projection: taken out here, of q numbers instead of H.
    if weight_T is not None:
        left_Tq = left_Tq / weight_T[:, None]
    form = _outer_products_on_gpu if uses_kernels(hidden) else _outer_products_on_host
    return form(left_Tq, right_Tq, bounds.contiguous()) / counts.clamp(min=1)[:, None, None]


@torch.library.custom_op("lead_kernels::gradient_signature", mutates_args=())
def _gradient_signature(
    hidden: Tensor, hidden_grad: Tensor, left: Tensor, right: Tensor, sample_ids: Tensor, num_samples: int
) -> Tensor:
    with without_autocast(hidden.device):
        bounds = segment_bounds(sample_ids, num_samples)
        return signature_from_bounds(hidden, hidden_grad, left, right, bounds, bounds.diff())


@_gradient_signature.register_fake
def _(hidden: Tensor, hidden_grad: Tensor, left: Tensor, right: Tensor, sample_ids: Tensor, num_samples: int) -> Tensor:
    return hidden.new_empty(num_samples, left.shape[1], right.shape[1], dtype=wide(hidden.dtype))


def gradient_signature(
    hidden: Tensor, hidden_grad: Tensor, left: Tensor, right: Tensor, sample_ids: Tensor, num_samples: int
) -> Tensor:
    """phi_i = (1/n_i) sum_t (P^T e_t) (Q^T h_t)^T over sample i's n_i rows: fp32 [num_samples, q, q], 0 for no rows.

    With entries of variance 1/q in P and Q, <phi_i, phi_j> is an unbiased estimate of <m_i, m_j>, m_i = (1/n_i) sum_t
    e_t h_t^T. Every row counts; `linear_cross_entropy(signature=...)` leaves out ignored targets. Two runs agree bit
    for bit. Not differentiable.

    Args:
        hidden, hidden_grad: h_t and e_t, [T, H] in one dtype (bf16, fp16, fp32; float64 for tests).
        left, right: P and Q, [H, q] in any dtype; rounded to hidden's.
        sample_ids: int64 or int32 [T], non-decreasing.

    Raises:
        ValueError: shapes, dtypes or devices that do not match and, in host memory, ids that decrease.
    """
    rows, width = hidden.shape
    check_shape("hidden_grad", hidden_grad, (rows, width), (hidden.dtype,))
    check_shape("left", left, (width, left.shape[-1]))
    check_shape("right", right, (width, right.shape[-1]))
    check_shape("sample_ids", sample_ids, (rows,), (torch.int64, torch.int32))
    check_device(hidden.device, hidden_grad=hidden_grad, left=left, right=right, sample_ids=sample_ids)
    phi: Tensor = _gradient_signature(
        hidden.detach(), hidden_grad.detach(), left.detach(), right.detach(), sample_ids, num_samples
    )
    return phi


def builds() -> list[KernelBuild]:
    """Sketches of every tile size; float64 apart."""
    cases = [(width, torch.float32, "fp32") for width in (4, 16, 32, 64)] + [(64, torch.float64, "fp64")]
    listed = []
    for width, dtype, kind in cases:
        step, side = outer_tile(width, width, dtype)
        sizes = {"ROWS": tile(width * width).rows, "STEP": step, "SIDE": side, "USE_DOT": dtype != torch.float64}
        signature = {
            "left_ptr": f"*{kind}", "right_ptr": f"*{kind}", "bounds_ptr": "*i64", "partials_ptr": f"*{kind}",
            "num_segments": "i32", "num_left": "i32", "num_right": "i32", **dict.fromkeys(sizes, "constexpr"),
        }  # fmt: skip
        name = f"gradient_signature.outer_piece {kind} q={width}"
        listed.append(KernelBuild(name, outer_piece, signature, sizes, THREADS))
    return listed
