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
def _transform(x, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """softcap(scale * x). tanh by one exponential: exact to about 1e-7 of the cap, and right at both infinities."""
    if SCALE != 1.0:
        x = x * tl.full((), SCALE, ACC)  # a bare constant would be rounded to fp32 first
    if SOFTCAP is not None:
        cap = tl.full((), SOFTCAP, ACC)
        x = cap * (1.0 - 2.0 / (tl.exp2(x * (2.0 * 1.4426950408889634 / cap)) + 1.0))
    return x


@triton.jit
def _logits(
    z_row, bias_ptr, column, vocabulary, width, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
    MASKED: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """A block of transformed logits."""
    if MASKED:
        z = tl.load(z_row + column, mask=column < width, other=0.0, eviction_policy=EVICT).to(ACC)
    else:
        z = tl.load(z_row + column, eviction_policy=EVICT).to(ACC)
    if bias_ptr is not None:
        z += _of_columns(bias_ptr, column, vocabulary, ACC, MASKED)
    return _transform(z, SCALE, SOFTCAP, ACC)


@triton.jit
def _of_columns(pointer, column, vocabulary, ACC: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        values = tl.load(pointer + column, mask=column < vocabulary, other=0.0)
    else:
        values = tl.load(pointer + column)
    return values.to(ACC)


@triton.jit
def _add_block(
    m, s, total, moment, best, z_row, bias_ptr, class_weight_ptr, entropy_ptr, predicted_ptr, column, vocabulary, width,
    unit, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, ACC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The first sweep's sums with one more block of columns in them."""
    z = _logits(z_row, bias_ptr, column, vocabulary, width, SCALE, SOFTCAP, ACC, MASKED, "evict_last")
    if MASKED:
        z = tl.where(column < vocabulary, z, -float("inf"))
    highest = tl.max(z, 1)
    new = tl.maximum(m, highest)
    if predicted_ptr is not None:
        first = tl.min(tl.where(z == highest[:, None], column, 2147483647), 1)
        best = tl.where(highest > m, first, best)
    below = (z - new[:, None]) * unit
    rescale = (m - new) * unit
    e = tl.exp2(below)
    if entropy_ptr is not None:
        terms = tl.where(e > 0.0, e * below, 0.0)
        moment = (moment + tl.where(s > 0.0, s * rescale, 0.0)) * tl.exp2(rescale) + tl.sum(terms, 1)
    s = s * tl.exp2(rescale) + tl.sum(e, 1)
    if SMOOTHING != 0.0:
        if MASKED:
            z = tl.where(column < vocabulary, z, 0.0)
        if class_weight_ptr is not None:
            z = z * _of_columns(class_weight_ptr, column, vocabulary, ACC, MASKED)
        total += tl.sum(z, 1)
    return new, s, total, moment, best


@triton.jit
def _write_block(
    z_row, gradient_row, nll_gradient_row, bias_ptr, class_weight_ptr, column, vocabulary, width, top, unit, p_factor,
    nll_factor, uniform, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, NARROWS: tl.constexpr,
    ACC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The second sweep: gradients of one block of columns, as if none of them were the target."""
    z = _logits(z_row, bias_ptr, column, vocabulary, width, SCALE, SOFTCAP, ACC, MASKED, "evict_first")
    e = tl.exp2((z - top) * unit)
    if NARROWS:
        tl.debug_barrier()
    if gradient_row is not None:
        g = e * p_factor
        if SMOOTHING != 0.0:
            if class_weight_ptr is not None:
                g -= uniform * _of_columns(class_weight_ptr, column, vocabulary, ACC, MASKED)
            else:
                g -= uniform
        if SOFTCAP is not None:
            g *= _slope(z, SOFTCAP, ACC)
        if MASKED:
            tl.store(gradient_row + column, tl.where(column < vocabulary, g, 0.0), mask=column < width)
        else:
            tl.store(gradient_row + column, g)
    if nll_gradient_row is not None:
        g = e * nll_factor
        if SOFTCAP is not None:
            g *= _slope(z, SOFTCAP, ACC)
        if MASKED:
            tl.store(nll_gradient_row + column, tl.where(column < vocabulary, g, 0.0), mask=column < width)
        else:
            tl.store(nll_gradient_row + column, g)


@triton.jit
def _slope(z, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    tanh = z / tl.full((), SOFTCAP, ACC)
    return 1.0 - tanh * tanh


@triton.jit
def _row_pass_kernel(
    z_ptr, z_stride, gradient_ptr, nll_gradient_ptr, gradient_stride, bias_ptr, class_weight_ptr, target_ptr,
    objective_weight_ptr, nll_weight_ptr, nll_ptr, objective_ptr, lse_ptr, entropy_ptr, predicted_ptr,
    vocabulary, width, ignore_index,
    SCALE: tl.constexpr, FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    NARROWS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: one sweep for the losses, one for the gradient, which may lie where the logits lie.

    The logits' scale is SCALE * FOLDED: FOLDED goes, with log2(e), into the factor before 2^x, so that it costs
    nothing. What follows says z for logits without it. 2^x is one instruction that flushes results below 2^-126 to 0;
    e^x has three more to guard them. Masks are in the last block only, and the target's 1 is subtracted after the
    sweep. So 34.3 instructions an element became 15.4 (`python -m lead_kernels.aot` counts them, and 0.9 of an ignored
    row's zeros).

    The running maximum m and sum s are kept by groups of eight columns and combined once, after the sweep: no reduction
    over the program, and so no barrier, inside the loop.

    Rows are accessed up to `width`, the vocabulary rounded up to 16: then accesses are 16 bytes wide also at V =
    128257. What lies in the padding does not count, and its gradient is 0.

    NARROWS: the gradient is half as wide as the logits it overwrites. Blocks go upwards, and block [v0, v1) is written
    to bytes [2 v0, 2 v1) of the row, below the bytes [4 v1, ...) of later blocks; inside a block, the barrier lets all
    its reads come first.
    """
    row = tl.program_id(0).to(tl.int64)
    # Eight neighbours to a thread: 16 bytes of bf16, and a maximum that needs no other thread.
    lane = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    z_row = z_ptr + row * z_stride
    gradient_row = gradient_ptr + row * gradient_stride if gradient_ptr is not None else None
    nll_gradient_row = nll_gradient_ptr + row * gradient_stride if nll_gradient_ptr is not None else None
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(nll_ptr + row, 0.0)
        if objective_ptr is not None:
            tl.store(objective_ptr + row, 0.0)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, 0.0)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, 0.0)
        if predicted_ptr is not None:
            tl.store(predicted_ptr + row, -1)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            if gradient_row is not None:
                tl.store(gradient_row + column, 0.0, mask=column < width)
            if nll_gradient_row is not None:
                tl.store(nll_gradient_row + column, 0.0, mask=column < width)
        return

    unit = tl.full((), FOLDED * 1.4426950408889634, ACC)
    folded = tl.full((), FOLDED, ACC)
    whole = vocabulary // BLOCK * BLOCK
    m = tl.full((BLOCK // 8,), -3.0e38, ACC)  # finite, so that logits of -inf give 2^-inf and never inf - inf
    s = tl.zeros((BLOCK // 8,), ACC)
    total = tl.zeros((BLOCK // 8,), ACC)
    moment = tl.zeros((BLOCK // 8,), ACC)  # sum of e^d log2(e^d), d = z - m
    best = tl.zeros((BLOCK // 8,), tl.int32)
    for start in range(0, whole, BLOCK):
        m, s, total, moment, best = _add_block(
            m, s, total, moment, best, z_row, bias_ptr, class_weight_ptr, entropy_ptr, predicted_ptr, start + lane,
            vocabulary, width, unit, SCALE, SOFTCAP, SMOOTHING, ACC, False,
        )  # fmt: skip
    if whole < vocabulary:
        m, s, total, moment, best = _add_block(
            m, s, total, moment, best, z_row, bias_ptr, class_weight_ptr, entropy_ptr, predicted_ptr, whole + lane,
            vocabulary, width, unit, SCALE, SOFTCAP, SMOOTHING, ACC, True,
        )  # fmt: skip
    top = tl.max(m, 0)
    if predicted_ptr is not None:
        predicted = tl.min(tl.where(m == top, best, 2147483647), 0)
        tl.store(predicted_ptr + row, tl.minimum(predicted, vocabulary - 1).to(tl.int64))
    rescale = (m - top) * unit
    if entropy_ptr is not None:
        moment = tl.sum((moment + tl.where(s > 0.0, s * rescale, 0.0)) * tl.exp2(rescale), 0)
    s = tl.sum(s * tl.exp2(rescale), 0)

    z_target = tl.load(z_row + target).to(ACC)
    if bias_ptr is not None:
        z_target += tl.load(bias_ptr + target).to(ACC)
    z_target = _transform(z_target, SCALE, SOFTCAP, ACC)
    log_s = tl.log(s)
    nll = (top - z_target) * folded + log_s  # difference by difference: logits of 1e4 cost no digits
    lse = top * folded + log_s
    smoothing = tl.full((), SMOOTHING, ACC)
    z_loss = tl.full((), Z_LOSS, ACC)
    size = tl.zeros((), ACC) + vocabulary  # a vocabulary of 1 is a constant to the compiler, and has no .to()
    class_weight = 1.0
    class_sum = size
    if class_weight_ptr is not None:
        class_weight = tl.load(class_weight_ptr + target).to(ACC)
        class_sum = tl.load(class_weight_ptr + vocabulary).to(ACC)
    tl.store(nll_ptr + row, nll)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, lse)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, log_s - moment / s * tl.full((), 0.6931471805599453, ACC))
    if objective_ptr is not None:
        objective = (1.0 - smoothing) * class_weight * nll + z_loss * lse * lse
        if SMOOTHING != 0.0 and class_weight_ptr is not None:
            objective += smoothing / size * (folded * (class_sum * top - tl.sum(total, 0)) + class_sum * log_s)
        elif SMOOTHING != 0.0:
            objective += smoothing * (folded * (top - tl.sum(total, 0) / size) + log_s)
        tl.store(objective_ptr + row, objective)

    if (gradient_ptr is not None) or (nll_gradient_ptr is not None):
        a = tl.load(objective_weight_ptr + row).to(ACC) if objective_weight_ptr is not None else 1.0
        b = tl.load(nll_weight_ptr + row).to(ACC) if nll_weight_ptr is not None else 0.0
        # Reading the target's logit has to come before any write to its row: all threads of the program meet here.
        tl.debug_barrier()
        scale = tl.full((), SCALE * FOLDED, ACC)
        nll_factor = scale / s
        if class_weight_ptr is not None:
            p_factor = a * ((1.0 - smoothing) * class_weight + smoothing * class_sum / size + 2.0 * z_loss * lse) + b
            y_factor = a * (1.0 - smoothing) * class_weight + b
        else:
            p_factor = a * (1.0 + 2.0 * z_loss * lse) + b
            y_factor = a * (1.0 - smoothing) + b
        p_factor *= nll_factor
        uniform = a * (smoothing / size) * scale
        for start in range(0, whole, BLOCK):
            _write_block(
                z_row, gradient_row, nll_gradient_row, bias_ptr, class_weight_ptr, start + lane, vocabulary, width, top,
                unit, p_factor, nll_factor, uniform, SCALE, SOFTCAP, SMOOTHING, NARROWS, ACC, False,
            )  # fmt: skip
        if whole < width:
            _write_block(
                z_row, gradient_row, nll_gradient_row, bias_ptr, class_weight_ptr, whole + lane, vocabulary, width, top,
                unit, p_factor, nll_factor, uniform, SCALE, SOFTCAP, SMOOTHING, NARROWS, ACC, True,
            )  # fmt: skip
        # The target's gradient anew, less the one-hot, over what the sweep wrote there: the barrier puts that first.
        tl.debug_barrier()
        e = tl.exp2((z_target - top) * unit)
        slope = 1.0
        if SOFTCAP is not None:
            slope = _slope(z_target, SOFTCAP, ACC)
        if gradient_row is not None:
            g = e * p_factor - y_factor * scale
            if SMOOTHING != 0.0:
                g -= uniform * class_weight
            tl.store(gradient_row + target, g * slope)
        if nll_gradient_row is not None:
            tl.store(nll_gradient_row + target, (e * nll_factor - scale) * slope)


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
    return -(-vocabulary // 16) * 16


def _by_kernel(
    z_CV: Tensor, gradient_CV: Tensor | None, nll_gradient_CV: Tensor | None, columns: Columns, rows: Rows,
    loss: RowLoss, ignore_index: int,
) -> None:  # fmt: skip
    vocabulary = z_CV.shape[1]
    extras = (
        columns.bias_V, loss.softcap, nll_gradient_CV, rows.nll_weight_C, rows.entropy_C, rows.predicted_C,
    )  # fmt: skip
    narrow = z_CV.element_size() == 2  # fp32 logits take as many bytes in half of the columns
    block, threads = _launch_shape(vocabulary, narrow and loss.plain and all(x is None for x in extras))
    gradients = [g for g in (gradient_CV, nll_gradient_CV) if g is not None]
    narrows = any(g.element_size() < z_CV.element_size() and g.data_ptr() == z_CV.data_ptr() for g in gradients)
    scale, folded = _folded(loss.softcap, loss.logit_scale)
    with current_device(z_CV):
        _row_pass_kernel[(z_CV.shape[0],)](
            z_CV, z_CV.stride(0), gradient_CV, nll_gradient_CV, gradients[0].stride(0) if gradients else 0, *columns,
            *rows, vocabulary,
            min(padded(vocabulary), z_CV.stride(0)), ignore_index,
            SCALE=scale, FOLDED=folded, SOFTCAP=loss.softcap, SMOOTHING=loss.label_smoothing, Z_LOSS=loss.z_loss,
            NARROWS=narrows, ACC=tl.float64 if z_CV.dtype == torch.float64 else tl.float32, BLOCK=block,
            num_warps=warps(threads, wave_size(z_CV.device)),
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
    everything = mode == "everything"
    simple = mode in ("loss", "gradient") and logits != "fp32"
    block, threads = _launch_shape(vocabulary, simple)
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
        **absent, "SCALE": 0.5 if everything else 1.0, "FOLDED": 1.0,
        "SOFTCAP": 30.0 if everything or mode == "cap" else None,
        "SMOOTHING": 0.1 if everything else 0.0, "Z_LOSS": 1e-4 if everything else 0.0, "NARROWS": logits != gradient and mode != "loss",
        "ACC": tl.float32, "BLOCK": block,
    }  # fmt: skip
    sizes = {
        "z_stride": "i32:16",
        "gradient_stride": "i32:16",
        "width": "i32:16",
        "vocabulary": "i32",
        "ignore_index": "i32",
    }
    if vocabulary == 1:  # an argument of 1 is a constant to the compiler
        constants["vocabulary"] = 1
    signature = {**pointers, **sizes, **dict.fromkeys(constants, "constexpr")}
    signature = {name: signature[name] for name in _row_pass_kernel.arg_names}
    size = f"{block}{' V=1' if vocabulary == 1 else ''}"
    name = f"row_pass {logits}{'' if logits == gradient else '->' + gradient} {mode} {size}"
    most = MOST_INSTRUCTIONS[mode] if simple else float("inf")
    return KernelBuild(name, _row_pass_kernel, signature, constants, threads, columns=block, instructions=most)
