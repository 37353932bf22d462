"""What happens to a block of logits between the head's matrix products: losses of its rows, and the logits' gradient in
their place; on a GPU by one kernel. See `row_loss` for what it computes.

Legend: C rows of a chunk, V vocabulary. z logits, p = softmax(z).
"""
from __future__ import annotations

import torch
from torch import Tensor

from lead_kernels.backend import KernelBuild, current_device, tl, triton, uses_kernels, warps, wave_size
from lead_kernels.row_loss import Columns, RowLoss, Rows
from lead_kernels.row_pass_host import row_pass_by_tiles


@triton.jit
def _transform(x, bias, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """softcap(scale * (x + bias)). tanh by one exponential: exact to about 1e-7 of the cap, and right at both infinities."""
    x = x + bias
    if SCALE != 1.0:
        x = x * tl.full((), SCALE, ACC)  # a bare constant would be rounded to fp32 first
    if SOFTCAP is not None:
        cap = tl.full((), SOFTCAP, ACC)
        x = cap * (1.0 - 2.0 / (tl.exp(x * (2.0 / cap)) + 1.0))
    return x


@triton.jit
def _row_pass_kernel(
    z_ptr, z_stride, gradient_ptr, nll_gradient_ptr, gradient_stride, bias_ptr, class_weight_ptr, target_ptr,
    objective_weight_ptr, nll_weight_ptr, nll_ptr, objective_ptr, lse_ptr, entropy_ptr, predicted_ptr,
    vocabulary, width, ignore_index,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    NARROWS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: one sweep for the losses, one for the gradient, which may lie where the logits lie.

    The running maximum m and sum s are kept by groups of eight columns and combined once, after the sweep: no reduction over the program,
    and so no barrier, inside the loop.

    Rows are accessed up to `width`, the vocabulary rounded up to 16: then accesses are 16 bytes wide also at V = 128257. What lies in the
    padding does not count, and its gradient is 0.

    NARROWS: the gradient is half as wide as the logits it overwrites. Blocks go upwards, and block [v0, v1) is written to bytes
    [2 v0, 2 v1) of the row, below the bytes [4 v1, ...) of later blocks; inside a block, the barrier lets all its reads come first.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    counted = target != ignore_index
    target = tl.where(counted, target, 0)
    z_row = z_ptr + row * z_stride
    # Eight neighbours to a thread: 16 bytes of bf16, and a maximum that needs no other thread.
    lane = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]

    m = tl.full((BLOCK // 8,), -3.0e38, ACC)  # finite, so that logits of -inf give exp(-inf) = 0 and never inf - inf
    s = tl.zeros((BLOCK // 8,), ACC)
    total = tl.zeros((BLOCK // 8,), ACC)
    moment = tl.zeros((BLOCK // 8,), ACC)  # sum of exp(z - m) (z - m)
    best = tl.zeros((BLOCK // 8,), tl.int32)
    for start in range(0, tl.where(counted, vocabulary, 0), BLOCK):
        column = start + lane
        inside = column < vocabulary
        z = tl.load(z_row + column, mask=column < width, other=0.0, eviction_policy="evict_last").to(ACC)
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(ACC) if bias_ptr is not None else 0.0
        z = tl.where(inside, _transform(z, bias, SCALE, SOFTCAP, ACC), -float("inf"))
        highest = tl.max(z, 1)
        new = tl.maximum(m, highest)
        if predicted_ptr is not None:
            first = tl.min(tl.where(z == highest[:, None], column, 2147483647), 1)
            best = tl.where(highest > m, first, best)
        if entropy_ptr is not None:
            e = tl.exp(z - new[:, None])
            terms = tl.where(e > 0.0, e * (z - new[:, None]), 0.0)
            moment = (moment + s * (m - new)) * tl.exp(m - new) + tl.sum(terms, 1)
        s = s * tl.exp(m - new) + tl.sum(tl.exp(z - new[:, None]), 1)
        m = new
        if SMOOTHING != 0.0:
            z = tl.where(inside, z, 0.0)
            if class_weight_ptr is not None:
                z = z * tl.load(class_weight_ptr + column, mask=inside, other=0.0).to(ACC)
            total += tl.sum(z, 1)
    if predicted_ptr is not None:
        predicted = tl.min(tl.where(m == tl.max(m, 0), best, 2147483647), 0)
        tl.store(predicted_ptr + row, tl.where(counted, tl.minimum(predicted, vocabulary - 1), -1).to(tl.int64))
    top = tl.where(counted, tl.max(m, 0), 0.0)
    if entropy_ptr is not None:
        moment = tl.sum((moment + s * (m - top)) * tl.exp(m - top), 0)
    s = tl.sum(s * tl.exp(m - top), 0)

    z_target = tl.load(z_row + target).to(ACC)
    bias_target = tl.load(bias_ptr + target).to(ACC) if bias_ptr is not None else 0.0
    z_target = _transform(z_target, bias_target, SCALE, SOFTCAP, ACC)
    log_s = tl.log(s)
    nll = (top - z_target) + log_s  # difference by difference: logits of 1e4 cost no digits
    lse = top + log_s
    smoothing = tl.full((), SMOOTHING, ACC)
    z_loss = tl.full((), Z_LOSS, ACC)
    size = vocabulary.to(ACC)
    class_weight = 1.0
    class_sum = size
    if class_weight_ptr is not None:
        class_weight = tl.load(class_weight_ptr + target).to(ACC)
        class_sum = tl.load(class_weight_ptr + vocabulary).to(ACC)
    tl.store(nll_ptr + row, tl.where(counted, nll, 0.0))
    if lse_ptr is not None:
        tl.store(lse_ptr + row, tl.where(counted, lse, 0.0))
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, tl.where(counted, log_s - moment / s, 0.0))
    if objective_ptr is not None:
        objective = (1.0 - smoothing) * class_weight * nll + z_loss * lse * lse
        if SMOOTHING != 0.0 and class_weight_ptr is not None:
            objective += smoothing / size * ((class_sum * top - tl.sum(total, 0)) + class_sum * log_s)
        elif SMOOTHING != 0.0:
            objective += smoothing * ((top - tl.sum(total, 0) / size) + log_s)
        tl.store(objective_ptr + row, tl.where(counted, objective, 0.0))

    if (gradient_ptr is not None) or (nll_gradient_ptr is not None):
        a = tl.load(objective_weight_ptr + row).to(ACC) if objective_weight_ptr is not None else 1.0
        b = tl.load(nll_weight_ptr + row).to(ACC) if nll_weight_ptr is not None else 0.0
        # Reading the target's logit has to come before any write to its row: all threads of the program meet here.
        tl.debug_barrier()
        inverse = 1.0 / s
        if class_weight_ptr is not None:
            p_factor = a * ((1.0 - smoothing) * class_weight + smoothing * class_sum / size + 2.0 * z_loss * lse) + b
            y_factor = a * (1.0 - smoothing) * class_weight + b
        else:
            p_factor = a * (1.0 + 2.0 * z_loss * lse) + b
            y_factor = a * (1.0 - smoothing) + b
        for start in range(0, width, BLOCK):
            column = start + lane
            inside = column < vocabulary
            z = tl.load(z_row + column, mask=column < width, other=0.0, eviction_policy="evict_first").to(ACC)
            bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(ACC) if bias_ptr is not None else 0.0
            z = _transform(z, bias, SCALE, SOFTCAP, ACC)
            p = tl.exp(z - top) * inverse
            hit = column == target
            slope = 1.0
            if SOFTCAP is not None:
                tanh = z / tl.full((), SOFTCAP, ACC)
                slope = 1.0 - tanh * tanh
            slope = slope * tl.full((), SCALE, ACC)
            if NARROWS:
                tl.debug_barrier()
            if gradient_ptr is not None:
                g = p * p_factor - tl.where(hit, y_factor, 0.0)
                if SMOOTHING != 0.0:
                    uniform = a * (smoothing / size)
                    if class_weight_ptr is not None:
                        uniform *= tl.load(class_weight_ptr + column, mask=inside, other=0.0).to(ACC)
                    g -= uniform
                g = tl.where(counted & inside, g * slope, 0.0)
                tl.store(gradient_ptr + row * gradient_stride + column, g, mask=column < width)
            if nll_gradient_ptr is not None:
                g = tl.where(counted & inside, (p - tl.where(hit, 1.0, 0.0)) * slope, 0.0)
                tl.store(nll_gradient_ptr + row * gradient_stride + column, g, mask=column < width)


def _launch_shape(vocabulary: int, simple: bool) -> tuple[int, int]:
    """(BLOCK, threads): up to 1024 threads with 16 elements each; 512 with 8 where options need their registers.

    In bf16 the simple kernel takes 32 registers (`python -m lead_kernels.aot`): two programs run on an SM of an H200, one of which computes
    while the other waits at the end of a sweep, and together they have 64 KiB of logits in flight, twice what 4.3 TB/s take at a
    microsecond's latency. Smaller programs would be more of them, with more rows in the works than the 60 MB L2 cache holds until they
    are read again: at V = 128k, 2 x 132 rows of 250 KB are 66 MB, on average half of it still to be read again.
    """
    each, most = (16, 1024) if simple else (8, 512)
    block = min(most * each, max(64 * each, triton.next_power_of_2(vocabulary)))
    return block, block // each


def padded(vocabulary: int) -> int:
    """Columns of a buffer of logits: a multiple of 16."""
    return -(-vocabulary // 16) * 16


def _by_kernel(
    z_CV: Tensor, gradient_CV: Tensor | None, nll_gradient_CV: Tensor | None, columns: Columns, rows: Rows,
    loss: RowLoss, ignore_index: int,
) -> None:  # fmt: skip
    vocabulary = z_CV.shape[1]
    extras = (
        columns.bias_V, loss.softcap, nll_gradient_CV, rows.nll_weight_C, rows.entropy_C, rows.predicted_C,
    )  # fmt: skip
    block, threads = _launch_shape(vocabulary, loss.plain and all(x is None for x in extras))
    gradients = [g for g in (gradient_CV, nll_gradient_CV) if g is not None]
    narrows = any(g.element_size() < z_CV.element_size() and g.data_ptr() == z_CV.data_ptr() for g in gradients)
    with current_device(z_CV):
        _row_pass_kernel[(z_CV.shape[0],)](
            z_CV, z_CV.stride(0), gradient_CV, nll_gradient_CV, gradients[0].stride(0) if gradients else 0, *columns,
            *rows, vocabulary,
            min(padded(vocabulary), z_CV.stride(0)), ignore_index,
            SCALE=loss.logit_scale, SOFTCAP=loss.softcap, SMOOTHING=loss.label_smoothing, Z_LOSS=loss.z_loss, NARROWS=narrows,
            ACC=tl.float64 if z_CV.dtype == torch.float64 else tl.float32, BLOCK=block, num_warps=warps(threads, wave_size(z_CV.device)),
        )  # fmt: skip


def row_pass(
    z_CV: Tensor, gradient_CV: Tensor | None, nll_gradient_CV: Tensor | None, columns: Columns, rows: Rows,
    loss: RowLoss, ignore_index: int,
) -> None:  # fmt: skip
    """Fill the rows' losses and, where asked for, the gradients of their losses and of their plain NLL at the logits.

    z_CV: products h W^T, overwritten. One of the gradients may be z_CV itself or, for the kernel, the narrower view of
    it that `in_place_view` gives; both have one row stride. In host memory no row may be ignored (the caller leaves
    them out).
    """
    if uses_kernels(z_CV):
        _by_kernel(z_CV, gradient_CV, nll_gradient_CV, columns, rows, loss, ignore_index)
    else:
        row_pass_by_tiles(z_CV, gradient_CV, nll_gradient_CV, columns, rows, loss)


def in_place_view(z_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """The first bytes of every row of z_CV, as a [C, V] matrix of a dtype that is as wide or narrower."""
    return z_CV if z_CV.dtype == dtype else z_CV.view(dtype)[:, : z_CV.shape[1]]


MODES = ("loss", "gradient", "cap", "bias", "everything")


def builds() -> list[KernelBuild]:
    """The kernel for every dtype and program size, with what models ask for: nothing, a cap (Gemma), a bias (Phi), and everything."""
    pairs = [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16")]
    found = [_build(*pair, 128_256, mode) for pair in pairs for mode in MODES]
    return found + [_build("bf16", "bf16", v, mode) for v in (500, 2000) for mode in ("gradient", "everything")]


def _build(logits: str, gradient: str, vocabulary: int, mode: str) -> KernelBuild:
    everything = mode == "everything"
    block, threads = _launch_shape(vocabulary, mode in ("loss", "gradient"))
    pointers = {"z_ptr": f"*{logits}:16", "target_ptr": "*i64", "nll_ptr": "*fp32"}
    if mode != "loss":
        pointers["gradient_ptr"] = f"*{gradient}:16"
    if everything or mode == "bias":
        pointers["bias_ptr"] = f"*{gradient}"
    if mode == "gradient" and gradient != "fp32":  # the mantissas of the rows' weights
        pointers["objective_weight_ptr"] = "*fp32"
    if everything:
        names = ("objective_weight", "nll_weight", "objective", "class_weight", "lse", "entropy")
        rows = {f"{name}_ptr": "*fp32" for name in names} | {"predicted_ptr": "*i64"}
        pointers |= {"nll_gradient_ptr": f"*{gradient}:16", **rows}
    absent = {name: None for name in _row_pass_kernel.arg_names if name.endswith("_ptr") and name not in pointers}
    constants = {
        **absent, "SCALE": 0.5 if everything else 1.0, "SOFTCAP": 30.0 if everything or mode == "cap" else None,
        "SMOOTHING": 0.1 if everything else 0.0, "Z_LOSS": 1e-4 if everything else 0.0, "NARROWS": logits != gradient and mode != "loss",
        "ACC": tl.float32, "BLOCK": block,
    }  # fmt: skip
    sizes = {"z_stride": "i32:16", "gradient_stride": "i32:16", "width": "i32:16", "vocabulary": "i32", "ignore_index": "i32"}
    signature = {**pointers, **sizes, **dict.fromkeys(constants, "constexpr")}
    name = f"row_pass {logits}{'' if logits == gradient else '->' + gradient} {mode} {block}"
    return KernelBuild(name, _row_pass_kernel, {n: signature[n] for n in _row_pass_kernel.arg_names}, constants, threads)
