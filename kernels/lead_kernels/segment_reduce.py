"""Sums over contiguous segments of rows: deterministic, and without a device read.

Two kernels. Rows are cut into blocks of a fixed number; a *piece* is the part of a segment that lies in one block. The
first kernel sums the rows of every piece, the second the pieces of every segment, so that one segment of 128k rows is
as parallel as many short ones. Going through the rows, the next piece lies in the next block, in the next segment, or
in both: block + segment grows from piece to piece. It is the piece's number, which makes a segment's pieces neighbours
and needs no table.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
from torch import Tensor

from lead_kernels.backend import KernelBuild, cdiv, current_device, num_warps, tl, triton, uses_kernels
from lead_kernels.checks import check_device, check_shape
from lead_kernels.dtypes import wide

THREADS = 128


@triton.jit
@no_type_check
def find_piece(bounds_ptr, piece, num_segments, ROWS: tl.constexpr):
    """First row of a piece and the one after its last; not above the first where no piece has this number."""
    low = piece * 0  # by binary search, in the type of `piece`
    high = low + num_segments
    while low < high:  # segments whose first piece comes no later than this one
        middle = (low + high) // 2
        begun = tl.load(bounds_ptr + middle) // ROWS + middle <= piece
        low = tl.where(begun, middle + 1, low)
        high = tl.where(begun, high, middle)
    segment = tl.maximum(low - 1, 0)
    block = piece - segment  # what a piece's number is made of; past a segment's last block its range is empty
    first = tl.maximum(tl.load(bounds_ptr + segment), block * ROWS)
    last = tl.minimum(tl.load(bounds_ptr + segment + 1), (block + 1) * ROWS)
    return first, last


@triton.jit(do_not_specialize=["num_segments"])
@no_type_check
def sum_piece(
    values_ptr, bounds_ptr, partials_ptr, num_segments, width,
    ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partials[piece] = sum of the piece's rows, in COLUMNS columns: STEP rows at a time, then over the STEP lanes."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first, last = find_piece(bounds_ptr, piece, num_segments, ROWS)
    total = tl.zeros((STEP, COLUMNS), partials_ptr.dtype.element_ty)
    for start in range(first, last, STEP):
        row = (start + tl.arange(0, STEP)).to(tl.int64)
        mask = (row < last)[:, None] & (column < width)[None, :]
        total += tl.load(values_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(total.dtype)
    tl.store(partials_ptr + piece * width + column, tl.sum(total, 0), mask=column < width)


@triton.jit
@no_type_check
def sum_pieces(partials_ptr, bounds_ptr, out_ptr, width, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    """One segment and COLUMNS columns: out[segment] = sum of the segment's pieces."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first_row = tl.load(bounds_ptr + segment)
    last_row = tl.load(bounds_ptr + segment + 1)
    first = first_row // ROWS + segment  # the segment's pieces are neighbours
    last = tl.where(last_row > first_row, (last_row + ROWS - 1) // ROWS + segment, first)
    total = tl.zeros((STEP, COLUMNS), out_ptr.dtype.element_ty)
    for start in range(first, last, STEP):
        piece = (start + tl.arange(0, STEP)).to(tl.int64)
        mask = (piece < last)[:, None] & (column < width)[None, :]
        total += tl.load(partials_ptr + piece[:, None] * width + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + segment * width + column, tl.sum(total, 0), mask=column < width)


class Tile(NamedTuple):
    """What a program of the kernels works on."""

    rows: int
    """Rows of a block, hence the most of a piece."""
    step: int
    """Rows added side by side."""
    columns: int


def tile(width: int) -> Tile:
    """Some 2048 values side by side in every case; blocks small enough that 16k rows of any width occupy a GPU."""
    if width == 1:
        return Tile(rows=1024, step=1024, columns=1)
    if width <= 16:
        return Tile(rows=512, step=128, columns=16)
    return Tile(rows=64, step=16, columns=128)


def num_pieces(rows: int, segments: int, block: int) -> int:
    """Numbers that pieces can have: every block and every segment begins at most one."""
    return cdiv(rows, block) + segments


def sum_of_pieces(partials: Tensor, bounds: Tensor, cut: Tile) -> Tensor:
    """Second kernel: [pieces, D] -> [segments, D], for the pieces of blocks of `cut.rows` rows."""
    width, segments = partials.shape[1], bounds.shape[0] - 1
    out = partials.new_empty(segments, width)
    sum_pieces[(segments, cdiv(width, cut.columns))](
        partials, bounds, out, width, *cut, num_warps=num_warps(THREADS, out)
    )
    return out


def _segment_sum_on_gpu(values: Tensor, bounds: Tensor) -> Tensor:
    """values [T, D], contiguous, any floating dtype."""
    (num_rows, width), segments = values.shape, bounds.shape[0] - 1
    sums = wide(values.dtype)
    if 0 in (num_rows, width, segments):
        return values.new_zeros(segments, width, dtype=sums)
    cut = tile(width)
    partials = values.new_empty(num_pieces(num_rows, segments, cut.rows), width, dtype=sums)
    with current_device(values):
        sum_piece[(partials.shape[0], cdiv(width, cut.columns))](
            values, bounds, partials, segments, width, *cut, num_warps=num_warps(THREADS, values)
        )
        return sum_of_pieces(partials, bounds, cut)


def _segment_sum_on_host(values: Tensor, bounds: Tensor) -> Tensor:
    """values [T, D]. Rows are added one after the other, hence in float64; unsafe=True skips checks of the bounds."""
    if values.shape[0] == 0:
        return values.new_zeros(bounds.shape[0] - 1, values.shape[1], dtype=wide(values.dtype))
    return torch.segment_reduce(values.double(), "sum", offsets=bounds, axis=0, unsafe=True).to(wide(values.dtype))


def segment_bounds(sample_ids_T: Tensor, num_samples: int) -> Tensor:
    """First rows of the samples, int64 [num_samples + 1]: sample b owns rows [bounds[b], bounds[b+1]).

    Raises ValueError, for ids in host memory, unless they are non-decreasing.
    """
    if not uses_kernels(sample_ids_T) and bool((sample_ids_T.diff() < 0).any()):
        raise ValueError("sample_ids must be non-decreasing: the rows of a sample lie side by side")
    edges = torch.arange(num_samples + 1, device=sample_ids_T.device, dtype=sample_ids_T.dtype)
    return torch.searchsorted(sample_ids_T.contiguous(), edges)


def segment_sum(values: Tensor, bounds: Tensor) -> Tensor:
    """Sum of `values[bounds[b]:bounds[b+1]]` for every b: [B, ...] from [T, ...], in fp32, float64 for float64 values.

    bounds: integers [B + 1], non-decreasing, within 0 to T; rows before the first and from the last on belong to
    nobody.
    """
    trailing = values.shape[1:]
    flat = values.reshape(values.shape[0], trailing.numel()).contiguous()
    form = _segment_sum_on_gpu if uses_kernels(values) else _segment_sum_on_host
    return form(flat, bounds.contiguous()).view(bounds.shape[0] - 1, *trailing)


@torch.library.custom_op("lead_kernels::segment_reduce", mutates_args=())
def _segment_reduce(values: Tensor, sample_ids: Tensor, num_samples: int) -> Tensor:
    return segment_sum(values, segment_bounds(sample_ids, num_samples))


@_segment_reduce.register_fake
def _(values: Tensor, sample_ids: Tensor, num_samples: int) -> Tensor:
    return values.new_empty(num_samples, *values.shape[1:], dtype=wide(values.dtype))


def segment_reduce(values: Tensor, sample_ids: Tensor, num_samples: int) -> Tensor:
    """Sum the rows of each sample: [num_samples, ...], fp32 (float64 for float64 values); 0 for a sample without rows.

    The order of addition depends on lengths alone: two runs agree bit for bit. Not differentiable.

    Args:
        values: floating [T, ...].
        sample_ids: int64 or int32 [T], non-decreasing, in [0, num_samples).

    Raises:
        ValueError: integer values, lengths or devices that do not match and, in host memory, ids that decrease.
    """
    if not values.is_floating_point():
        raise ValueError(f"values is {values.dtype}, expected a floating-point dtype")
    check_shape("sample_ids", sample_ids, (values.shape[0],), (torch.int64, torch.int32))
    check_device(values.device, sample_ids=sample_ids)
    sums: Tensor = _segment_reduce(values.detach(), sample_ids, num_samples)
    return sums


def builds() -> list[KernelBuild]:
    """Both kernels for vectors, narrow and wide rows."""
    listed = []
    for label, width in (("D=1", 1), ("D<=16", 16), ("D>16", 4096)):
        rows, step, columns = tile(width)
        sizes = {"ROWS": rows, "STEP": step, "COLUMNS": columns}
        if width == 1:  # an argument of 1 is a constant to the compiler
            sizes["width"] = 1
        kinds = {"width": "i32"} | dict.fromkeys(sizes, "constexpr")
        for dtype in ("bf16", "fp16", "fp32"):
            pointers = {"values_ptr": f"*{dtype}", "bounds_ptr": "*i64", "partials_ptr": "*fp32"}
            signature = {**pointers, "num_segments": "i32", **kinds}
            name = f"segment_reduce.sum_piece {dtype} {label}"
            listed.append(KernelBuild(name, sum_piece, signature, sizes, THREADS))
        signature = {"partials_ptr": "*fp32", "bounds_ptr": "*i64", "out_ptr": "*fp32", **kinds}
        listed.append(KernelBuild(f"segment_reduce.sum_pieces {label}", sum_pieces, signature, sizes, THREADS))
    return listed
