"""Matrix products with fp32 accumulators, as far as the library returns them: cuBLAS does, CPU products round first."""

from __future__ import annotations

import torch
from torch import Tensor

from lead_kernels.backend import cdiv
from lead_kernels.dtypes import HALVES, wide
from lead_kernels.row_pass_host import CPU_TILE_BYTES, split

ROW_STEP = 32
"""On a CPU, rows of bf16 and fp16 are padded to a multiple of this: 64 bytes, one load of its matrix unit."""


def apart(like: Tensor, rows: int, width: int) -> Tensor:
    """An empty [rows, width] matrix of like's dtype and device, for a left operand of a product.

    A CPU's matrix unit (AMX) loads bf16 in pairs and blocks, past the end of a row where its width is odd: what lies
    there is multiplied by zero, and a NaN there makes the whole row NaN. So rows start `ROW_STEP` elements apart there,
    zeros between them.
    """
    if like.device.type != "cpu" or like.dtype not in HALVES or width % ROW_STEP == 0:
        return like.new_empty(rows, width)
    whole = like.new_empty(rows, cdiv(width, ROW_STEP) * ROW_STEP)
    whole[:, width:].zero_()
    return whole[:, :width]


def left_operand(rows: Tensor) -> Tensor:
    """`rows` [T, K] as a product's left operand may lie in memory: see `apart`; on a GPU any strides do."""
    if rows.device.type != "cpu":
        return rows
    if rows.dtype not in HALVES or rows.shape[1] % ROW_STEP == 0:
        return rows.contiguous()
    return apart(rows, *rows.shape).copy_(rows)


def right_operand(matrix: Tensor) -> Tensor:
    """`matrix` [V, H] without gaps between its rows or, transposed, its columns; on a GPU any strides do."""
    return matrix if matrix.device.type != "cpu" or matrix.t().is_contiguous() else matrix.contiguous()


def thin_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * (a @ b), as a left operand of the next product."""
    out = apart(a, a.shape[0], b.shape[1])
    return torch.mm(a, b, out=out).mul_(scale)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, as far as the library allows.

    A CPU rounds a bf16 product first. One in fp16 might be infinite then, so copies in fp32 are multiplied.
    """
    if a.dtype == torch.float16:
        return exact_product(a, b)
    if a.dtype in HALVES and a.device.type != "cpu":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(wide(a.dtype))


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 with no rounding on the way: a CPU multiplies copies in fp32."""
    if a.dtype in HALVES and a.device.type != "cpu":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.to(wide(a.dtype)), b.to(wide(b.dtype)))


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, out as wide as the operands or, for bf16 and fp16, fp32."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type == "cpu":
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cpu":
        # In blocks: the product is a tensor of its own until it has been added. In fp16 it might be infinite.
        product = exact_product if a.dtype == torch.float16 else torch.mm
        for block in row_blocks(total):
            total[block].add_(product(a[block], b))
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def row_blocks(matrix: Tensor) -> list[slice]:
    """Blocks of rows for an operation of mixed dtypes: on a CPU, PyTorch would copy whole operands to the wider one."""
    rows = matrix.shape[0]
    if matrix.device.type != "cpu":
        return [slice(0, rows)]
    width = matrix.numel() // max(rows, 1)
    return split(rows, max(1, CPU_TILE_BYTES // (4 * max(width, 1))))


def scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scale, multiplied in fp32 and rounded once to `dtype`.

    `scale` has as many dimensions as `values`: with fewer, it would be rounded to the dtype of bf16 values first.
    """
    out = torch.empty_like(values, dtype=dtype)
    for block in row_blocks(values):
        torch.mul(values[block], scale if scale.shape[0] == 1 else scale[block], out=out[block])
    return out
