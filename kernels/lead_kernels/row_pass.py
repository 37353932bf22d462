"""The pass over a block of logits between the head's matrix products: losses of its rows, gradients at the logits.

On a GPU one kernel, which may write the gradient in the logits' place; on a CPU tile by tile. See `row_loss` for what
is computed.

Legend: C rows of a chunk, V vocabulary. z logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lead_kernels.backend import KernelBuild, cdiv, current_device, num_warps, tl, triton, uses_kernels
from lead_kernels.row_loss import Columns, RowLoss, Rows
from lead_kernels.row_pass_host import row_pass_by_tiles
from lead_kernels.row_pass_kernel import row_pass_kernel


def _folded(softcap: float | None, scale: float) -> tuple[float, float]:
    """(SCALE, FOLDED): a positive scale without a cap after it keeps the order of the logits, and may wait."""
    return (1.0, scale) if softcap is None and scale > 0 else (scale, 1.0)


def _launch_shape(vocabulary: int, simple: bool) -> tuple[int, int]:
    """(BLOCK, threads): up to 1024 threads of 16 elements; 512 of 8 where options or fp32 logits need registers.

    In bf16 the simple kernel takes 32 registers (`python -m lead_kernels.aot`): two programs run on an SM of an H200,
    one of which computes while the other waits at the end of a sweep, and together they have 64 KiB of logits in
    flight, twice what 4.3 TB/s take at a microsecond's latency. Smaller programs would be more of them, with more rows
    in the works than the 60 MB L2 cache holds until they are read again: at V = 128k, 2 x 132 rows of 250 KB are 66 MB,
    on average half of it still to be read again.
    """
    each, most = (16, 1024) if simple else (8, 512)
    block = min(most * each, max(64 * each, triton.next_power_of_2(vocabulary)))
    return block, block // each


def padded(vocabulary: int) -> int:
    """Columns of a buffer of logits: a multiple of 16."""
    return cdiv(vocabulary, 16) * 16


def in_place_view(z_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """The first bytes of every row of z_CV, as a [C, V] matrix of a dtype that is as wide or narrower."""
    return z_CV if z_CV.dtype == dtype else z_CV.view(dtype)[:, : z_CV.shape[1]]


def _is_simple(z_CV: Tensor, nll_gradient_CV: Tensor | None, columns: Columns, rows: Rows, loss: RowLoss) -> bool:
    """Whether the kernel needs few registers: no options, and logits of two bytes."""
    extras = (columns.bias_V, loss.softcap, nll_gradient_CV, rows.nll_weight_C, rows.entropy_C, rows.predicted_C)
    return z_CV.element_size() == 2 and loss.plain and all(x is None for x in extras)


def _by_kernel(
    z_CV: Tensor,
    gradient_CV: Tensor | None,
    nll_gradient_CV: Tensor | None,
    columns: Columns,
    rows: Rows,
    loss: RowLoss,
    ignore_index: int,
) -> None:
    vocabulary = z_CV.shape[1]
    block, threads = _launch_shape(vocabulary, _is_simple(z_CV, nll_gradient_CV, columns, rows, loss))
    gradients = [g for g in (gradient_CV, nll_gradient_CV) if g is not None]
    gradient_stride = gradients[0].stride(0) if gradients else 0
    narrows = any(g.element_size() < z_CV.element_size() and g.data_ptr() == z_CV.data_ptr() for g in gradients)
    width = min(padded(vocabulary), z_CV.stride(0))
    scale, folded = _folded(loss.softcap, loss.logit_scale)
    accumulator = tl.float64 if z_CV.dtype == torch.float64 else tl.float32
    with current_device(z_CV):
        row_pass_kernel[(z_CV.shape[0],)](
            z_CV, z_CV.stride(0), gradient_CV, nll_gradient_CV, gradient_stride, columns.bias_V, columns.class_weight,
            rows.target_C, rows.objective_weight_C, rows.nll_weight_C, rows.nll_C, rows.objective_C, rows.lse_C,
            rows.entropy_C, rows.predicted_C, vocabulary, width, ignore_index,
            SCALE=scale, FOLDED=folded, SOFTCAP=loss.softcap, SMOOTHING=loss.label_smoothing, Z_LOSS=loss.z_loss,
            NARROWS=narrows, ACC=accumulator, BLOCK=block, num_warps=num_warps(threads, z_CV),
        )  # fmt: skip


def row_pass(
    z_CV: Tensor,
    gradient_CV: Tensor | None,
    nll_gradient_CV: Tensor | None,
    columns: Columns,
    rows: Rows,
    loss: RowLoss,
    ignore_index: int,
) -> None:
    """Fill the rows' losses and, where asked for, the gradients of their losses and of their plain NLL at the logits.

    z_CV: products h W^T, overwritten. One of the gradients may be z_CV itself or, for the kernel, the narrower view of
    it that `in_place_view` gives; both have one row stride. In host memory no row may be ignored (the caller leaves
    them out).
    """
    if uses_kernels(z_CV):
        _by_kernel(z_CV, gradient_CV, nll_gradient_CV, columns, rows, loss, ignore_index)
    else:
        row_pass_by_tiles(z_CV, gradient_CV, nll_gradient_CV, columns, rows, loss)


MODES = ("loss", "gradient", "cap", "bias", "everything")
MOST_INSTRUCTIONS = {"loss": 8.5, "gradient": 17.0}
"""An element, of the first sweep (8) or both (15.4) and the zeros of an ignored row (0.9). 15.4 for 4096 x 128256
elements are issued in 0.3 ms on an H200, where memory takes 0.7."""


def builds() -> list[KernelBuild]:
    """Every dtype and program size, with what models ask for: nothing, a cap (Gemma), a bias (Phi), and everything."""
    pairs = [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16")]
    found = [_build(*pair, 128_256, mode) for pair in pairs for mode in MODES]
    found += [_build("bf16", "bf16", v, mode) for v in (500, 2000) for mode in ("gradient", "everything")]
    return [*found, _build("bf16", "bf16", 1, "everything")]


def _build(logits: str, gradient: str, vocabulary: int, mode: str) -> KernelBuild:
    simple = mode in ("loss", "gradient") and logits != "fp32"
    block, threads = _launch_shape(vocabulary, simple)
    pointers = _pointers(logits, gradient, mode)
    constants = _constants(mode, narrows=logits != gradient and mode != "loss")
    constants |= {"ACC": tl.float32, "BLOCK": block}
    for name in row_pass_kernel.arg_names:
        if name.endswith("_ptr") and name not in pointers:
            constants[name] = None
    if vocabulary == 1:  # an argument of 1 is a constant to the compiler
        constants["vocabulary"] = 1
    strides = dict.fromkeys(("z_stride", "gradient_stride", "width"), "i32:16")
    kinds = pointers | strides | {"vocabulary": "i32", "ignore_index": "i32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds[name] for name in row_pass_kernel.arg_names}
    dtypes = logits if logits == gradient else f"{logits}->{gradient}"
    name = f"row_pass {dtypes} {mode} {block}{' V=1' if vocabulary == 1 else ''}"
    most = MOST_INSTRUCTIONS[mode] if simple else float("inf")
    return KernelBuild(name, row_pass_kernel, signature, constants, threads, columns=block, instructions=most)


def _pointers(logits: str, gradient: str, mode: str) -> dict[str, str]:
    """The types of the tensors that a mode gives the kernel."""
    pointers = {"z_ptr": f"*{logits}:16", "target_ptr": "*i64", "nll_ptr": "*fp32"}
    if mode != "loss":
        pointers["gradient_ptr"] = f"*{gradient}:16"
    if mode in ("bias", "everything"):
        pointers["bias_ptr"] = f"*{gradient}"
    if mode == "gradient" and gradient != "fp32":  # the mantissas of the rows' weights
        pointers["objective_weight_ptr"] = "*fp32"
    if mode == "everything":
        pointers["nll_gradient_ptr"] = f"*{gradient}:16"
        pointers["predicted_ptr"] = "*i64"
        for name in ("objective_weight", "nll_weight", "objective", "class_weight", "lse", "entropy"):
            pointers[f"{name}_ptr"] = "*fp32"
    return pointers


def _constants(mode: str, narrows: bool) -> dict[str, Any]:
    constants = {"SCALE": 1.0, "FOLDED": 1.0, "SOFTCAP": None, "SMOOTHING": 0.0, "Z_LOSS": 0.0, "NARROWS": narrows}
    if mode == "cap":
        constants["SOFTCAP"] = 30.0
    if mode == "everything":
        constants |= {"SCALE": 0.5, "SOFTCAP": 30.0, "SMOOTHING": 0.1, "Z_LOSS": 1e-4}
    return constants
