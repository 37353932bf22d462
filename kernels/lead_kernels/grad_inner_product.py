"""Inner product of every sample's last-layer gradient with the batch's, in its exact form.

s_i = (1/w_i) sum_t g_t^T M h_t. The kernel is a product g @ M in tiles whose epilogue multiplies with h and adds up
each row of the tile, so that the [T, H] product is never written: what leaves is a number per row and column tile.

2 T H^2 FLOP: 0.55 TFLOP at (T, H) = (16384, 4096), 1.1 % of the head's three products there (V = 128256), 0.07 % of a
step of an 8B model on as many tokens (6 FLOP per parameter and token), and as much again where M is computed. It reads
g, M and h, 300 MB, and writes 2 MB.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
from torch import Tensor

from lead_kernels.backend import KernelBuild, cdiv, current_device, num_warps, tl, triton, uses_kernels
from lead_kernels.checks import check_device, check_shape, without_autocast
from lead_kernels.dtypes import wide
from lead_kernels.segment_reduce import segment_bounds, segment_sum


@triton.jit
@no_type_check
def row_products(
    grad_ptr, matrix_ptr, hidden_ptr, partials_ptr, num_rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, USE_DOT: tl.constexpr,
):  # fmt: skip
    """partials[c, t] = sum over column tile c of (g_t^T M)_j h_tj, for ROWS rows t and COLUMNS columns j of the tile.

    Programs go down GROUP row tiles before they turn to the next column tile: those that run at a time share rows of g
    and columns of M in the L2 cache.
    """
    # The programs' numbers run through a group of GROUP row tiles, down its columns; the last group may be smaller.
    row_tiles = tl.cdiv(num_rows, ROWS)
    column_tiles = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    first_row_tile = program // (GROUP * column_tiles) * GROUP
    group_rows = tl.minimum(row_tiles - first_row_tile, GROUP)
    row_tile = first_row_tile + program % (GROUP * column_tiles) % group_rows
    column_tile = program % (GROUP * column_tiles) // group_rows

    row = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    row_mask, column_mask = (row < num_rows)[:, None], (column < width)[None, :]
    grad_tile = grad_ptr + row[:, None] * width + inner[None, :]
    matrix_tile = matrix_ptr + inner[:, None].to(tl.int64) * width + column[None, :]
    product = tl.zeros((ROWS, COLUMNS), partials_ptr.dtype.element_ty)
    for start in range(0, width, DEPTH):
        left = width - start
        g = tl.load(grad_tile, mask=row_mask & (inner < left)[None, :], other=0.0)
        m = tl.load(matrix_tile, mask=(inner < left)[:, None] & column_mask, other=0.0)
        if USE_DOT:
            product = tl.dot(g, m, product, input_precision="ieee")
        else:
            product += tl.sum(g[:, :, None] * m[None, :, :], 1)
        grad_tile += DEPTH
        matrix_tile += DEPTH * width.to(tl.int64)
    # The epilogue: the product's tile never leaves the program.
    h = tl.load(hidden_ptr + row[:, None] * width + column[None, :], mask=row_mask & column_mask, other=0.0)
    h = h.to(product.dtype)
    tl.store(partials_ptr + column_tile.to(tl.int64) * num_rows + row, tl.sum(product * h, 1), mask=row < num_rows)


class Tiles(NamedTuple):
    """What a program works on, and with how many threads and pipeline stages."""

    rows: int
    columns: int
    depth: int
    threads: int
    stages: int


GROUP = 16
"""Row tiles: 264 programs run at a time on an H200, and 16 x 16 tiles of the product need the fewest operands."""


def tiles(dtype: torch.dtype) -> Tiles:
    """Tiles, threads and pipeline stages for a dtype.

    bf16 and fp16 use matrix units, with 96 KiB of shared memory: two programs run on a Hopper SM, and one's epilogue
    overlaps the other's product. fp32 stays in full precision on the ordinary units. float64, which tl.dot does not
    know on every GPU, multiplies and adds.
    """
    if dtype == torch.float64:
        return Tiles(rows=16, columns=16, depth=4, threads=128, stages=1)
    if dtype == torch.float32:
        return Tiles(rows=64, columns=64, depth=16, threads=128, stages=2)
    return Tiles(rows=128, columns=128, depth=64, threads=256, stages=3)


def _scaled_for_fp16(matrix_HH: Tensor) -> tuple[Tensor, Tensor]:
    """(M / p in fp16, p), p the power of two that brings M's largest entry below 1: a small M would be lost in fp16."""
    exponent = torch.frexp(matrix_HH.abs().amax()).exponent.clamp(-100, 100)
    return torch.ldexp(matrix_HH, -exponent).half(), torch.ldexp(matrix_HH.new_ones(()), exponent)


def _aligned(matrix: Tensor, width: int) -> Tensor:
    """Contiguous, with rows of `width` elements, zeros at their end, and an address that 16 divides.

    Without this the kernel can neither load vectors nor copy asynchronously, and spills. A model's tensors are so.
    """
    if matrix.shape[1] != width:
        matrix = torch.nn.functional.pad(matrix, (0, width - matrix.shape[1]))
    matrix = matrix.contiguous()
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()


def _row_products_on_gpu(hidden_TH: Tensor, hidden_grad_TH: Tensor, matrix_HH: Tensor) -> Tensor:
    """g_t^T M h_t for every row, in M's dtype; M is rounded to the dtype of hidden."""
    (rows, true_width), dtype = hidden_TH.shape, hidden_TH.dtype
    if rows == 0 or true_width == 0:
        return matrix_HH.new_zeros(rows)
    width = cdiv(true_width, 16) * 16
    scale = None
    if dtype == torch.float16:
        operand_HH, scale = _scaled_for_fp16(matrix_HH)
    else:
        operand_HH = matrix_HH.to(dtype)
    if width != true_width:
        operand_HH = torch.nn.functional.pad(operand_HH, (0, 0, 0, width - true_width))
    cut = tiles(dtype)
    column_tiles = cdiv(width, cut.columns)
    partials = matrix_HH.new_empty(column_tiles, rows)
    with current_device(hidden_TH):
        row_products[(cdiv(rows, cut.rows) * column_tiles,)](
            _aligned(hidden_grad_TH, width), _aligned(operand_HH, width), _aligned(hidden_TH, width), partials, rows,
            width, ROWS=cut.rows, COLUMNS=cut.columns, DEPTH=cut.depth, GROUP=GROUP, USE_DOT=dtype != torch.float64,
            num_warps=num_warps(cut.threads, hidden_TH), num_stages=cut.stages,
        )  # fmt: skip
    per_row = partials.sum(0)
    return per_row if scale is None else per_row * scale


def _row_products_on_host(hidden_TH: Tensor, hidden_grad_TH: Tensor, matrix_HH: Tensor) -> Tensor:
    """The same in M's precision throughout."""
    return ((hidden_grad_TH.to(matrix_HH.dtype) @ matrix_HH) * hidden_TH.to(matrix_HH.dtype)).sum(1)


@torch.library.custom_op("lead_kernels::grad_inner_product", mutates_args=())
def _grad_inner_product(
    hidden: Tensor, hidden_grad: Tensor, mean_grad: Tensor, sample_ids: Tensor, num_samples: int, sample_weight: Tensor
) -> Tensor:
    sums_dtype = wide(hidden.dtype)
    form = _row_products_on_gpu if uses_kernels(hidden) else _row_products_on_host
    with without_autocast(hidden.device):
        per_row = form(hidden, hidden_grad, mean_grad.to(sums_dtype))
        sums = segment_sum(per_row, segment_bounds(sample_ids, num_samples))
        weight = sample_weight.to(sums_dtype)
        return torch.where(weight != 0, sums / torch.where(weight != 0, weight, 1.0), 0.0)


@_grad_inner_product.register_fake
def _(
    hidden: Tensor, hidden_grad: Tensor, mean_grad: Tensor, sample_ids: Tensor, num_samples: int, sample_weight: Tensor
) -> Tensor:
    return hidden.new_empty(num_samples, dtype=wide(hidden.dtype))


def grad_inner_product(
    hidden: Tensor, hidden_grad: Tensor, mean_grad: Tensor, sample_ids: Tensor, num_samples: int, sample_weight: Tensor
) -> Tensor:
    """s_i = <m_i, M> for a micro-batch's samples, fp32 [num_samples] (float64 for float64 hidden); 0 where w_i is 0.

    With h_t the hidden state and e_t the gradient of row t's loss there, m_i = (1/n_i) sum_t e_t h_t^T is the gradient
    of sample i's mean loss at a matrix A that is inserted as A h_t, at A = I. M = sum_i w_i m_i is the step's. So s_i =
    (1/n_i) sum_t e_t^T M h_t = (1/w_i) sum_t hidden_grad_t^T M h_t.

    One T x H x H product, and no [T, H] or [B, H, H] tensor. On a GPU M is rounded to hidden's dtype and sums are fp32;
    in host memory everything is fp32. Two runs agree bit for bit. Not differentiable.

    Args:
        hidden: [T, H] in bf16, fp16 or fp32 (float64 for tests).
        hidden_grad: [T, H] in the same dtype: w_i / n_i * e_t, what autograd leaves at `hidden` for the loss sum_i w_i
            L_i.
        mean_grad: M, [H, H], preferably fp32: the sum of hidden_grad^T hidden over the step.
        sample_ids: int64 or int32 [T], non-decreasing.
        sample_weight: w, [num_samples].

    Raises:
        ValueError: shapes, dtypes or devices that do not match and, in host memory, ids that decrease.
    """
    rows, width = hidden.shape
    check_shape("hidden_grad", hidden_grad, (rows, width), (hidden.dtype,))
    check_shape("mean_grad", mean_grad, (width, width))
    check_shape("sample_ids", sample_ids, (rows,), (torch.int64, torch.int32))
    check_shape("sample_weight", sample_weight, (num_samples,))
    check_device(
        hidden.device, hidden_grad=hidden_grad, mean_grad=mean_grad, sample_ids=sample_ids, sample_weight=sample_weight
    )
    detached = (hidden.detach(), hidden_grad.detach(), mean_grad.detach())
    products: Tensor = _grad_inner_product(*detached, sample_ids, num_samples, sample_weight.detach())
    return products


def builds() -> list[KernelBuild]:
    """One configuration a dtype."""
    kinds = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
    listed = []
    for dtype, kind in kinds.items():
        cut, out = tiles(dtype), "fp64" if dtype == torch.float64 else "fp32"
        sizes = {
            "ROWS": cut.rows, "COLUMNS": cut.columns, "DEPTH": cut.depth, "GROUP": GROUP,
            "USE_DOT": dtype != torch.float64,
        }  # fmt: skip
        signature = {
            "grad_ptr": f"*{kind}:16", "matrix_ptr": f"*{kind}:16", "hidden_ptr": f"*{kind}:16",
            "partials_ptr": f"*{out}:16", "num_rows": "i32", "width": "i32:16", **dict.fromkeys(sizes, "constexpr"),
        }  # fmt: skip
        name = f"grad_inner_product.row_products {kind}"
        listed.append(KernelBuild(name, row_products, signature, sizes, cut.threads, cut.stages))
    return listed
