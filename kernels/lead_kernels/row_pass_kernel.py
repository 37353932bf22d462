"""The row pass as one Triton kernel: a program a row. See `row_loss` for what it computes.

Legend: V vocabulary. z logits, p = softmax(z), m maximum, s sum of e^(z - m).
"""

from __future__ import annotations

from typing import no_type_check

from lead_kernels.backend import tl, triton
from lead_kernels.row_pass_blocks import add_block, slope_of_cap, transform, write_block


@triton.jit
@no_type_check
def _write_ignored_row(
    row, gradient_row, nll_gradient_row, nll_ptr, objective_ptr, lse_ptr, entropy_ptr, predicted_ptr, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Zeros everywhere, and -1 for the prediction."""
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


@triton.jit
@no_type_check
def _objective(
    nll, lse, log_s, top, total, folded, smoothing, z_loss, size, class_weight, class_sum, class_weight_ptr,
    SMOOTHING: tl.constexpr,
):  # fmt: skip
    """The row's loss. total: sum of z_j, or of w_j z_j, by groups of columns."""
    objective = (1.0 - smoothing) * class_weight * nll + z_loss * lse * lse
    if SMOOTHING != 0.0 and class_weight_ptr is not None:
        objective += smoothing / size * (folded * (class_sum * top - tl.sum(total, 0)) + class_sum * log_s)
    elif SMOOTHING != 0.0:
        objective += smoothing * (folded * (top - tl.sum(total, 0) / size) + log_s)
    return objective


@triton.jit
@no_type_check
def row_pass_kernel(
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
    row = tl.program_id(0).to(tl.int64)  # a row's address passes 2^31 elements at 16,384 rows of 128k
    # Eight neighbours to a thread: 16 bytes of bf16, and a maximum that needs no other thread.
    lane = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    z_row = z_ptr + row * z_stride
    gradient_row = gradient_ptr + row * gradient_stride if gradient_ptr is not None else None
    nll_gradient_row = nll_gradient_ptr + row * gradient_stride if nll_gradient_ptr is not None else None
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        _write_ignored_row(
            row, gradient_row, nll_gradient_row, nll_ptr, objective_ptr, lse_ptr, entropy_ptr, predicted_ptr, width,
            BLOCK,
        )  # fmt: skip
        return

    # The first sweep.
    unit = tl.full((), FOLDED * 1.4426950408889634, ACC)  # log2(e): exponentials are powers of two
    folded = tl.full((), FOLDED, ACC)
    whole = vocabulary // BLOCK * BLOCK
    m = tl.full((BLOCK // 8,), -3.0e38, ACC)  # finite, so that logits of -inf give 2^-inf and never inf - inf
    s = tl.zeros((BLOCK // 8,), ACC)
    total = tl.zeros((BLOCK // 8,), ACC)
    moment = tl.zeros((BLOCK // 8,), ACC)  # sum of e^d log2(e^d), d = z - m
    best = tl.zeros((BLOCK // 8,), tl.int32)
    for start in range(0, whole, BLOCK):
        m, s, total, moment, best = add_block(
            m, s, total, moment, best, z_row, bias_ptr, class_weight_ptr, entropy_ptr, predicted_ptr, start + lane,
            vocabulary, width, unit, SCALE, SOFTCAP, SMOOTHING, ACC, False,
        )  # fmt: skip
    if whole < vocabulary:
        m, s, total, moment, best = add_block(
            m, s, total, moment, best, z_row, bias_ptr, class_weight_ptr, entropy_ptr, predicted_ptr, whole + lane,
            vocabulary, width, unit, SCALE, SOFTCAP, SMOOTHING, ACC, True,
        )  # fmt: skip

    # The groups of columns together: their sums are relative to their own maxima.
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
    z_target = transform(z_target, SCALE, SOFTCAP, ACC)
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
        # H = log s - sum p d, where the sum is in units of log2(e).
        tl.store(entropy_ptr + row, log_s - moment / s * tl.full((), 0.6931471805599453, ACC))
    if objective_ptr is not None:
        objective = _objective(
            nll, lse, log_s, top, total, folded, smoothing, z_loss, size, class_weight, class_sum, class_weight_ptr,
            SMOOTHING,
        )  # fmt: skip
        tl.store(objective_ptr + row, objective)

    # The second sweep: g = p_factor p - y_factor onehot(y) - uniform, all times the logits' scale.
    if (gradient_ptr is not None) or (nll_gradient_ptr is not None):
        a = tl.load(objective_weight_ptr + row).to(ACC) if objective_weight_ptr is not None else 1.0
        b = tl.load(nll_weight_ptr + row).to(ACC) if nll_weight_ptr is not None else 0.0
        # Reading the target's logit has to come before any write to its row: all threads of the program meet here.
        tl.debug_barrier()
        scale = tl.full((), SCALE * FOLDED, ACC)
        nll_factor = scale / s  # e^(z - m) times this is the scaled p
        if class_weight_ptr is not None:
            p_factor = a * ((1.0 - smoothing) * class_weight + smoothing * class_sum / size + 2.0 * z_loss * lse) + b
            y_factor = a * (1.0 - smoothing) * class_weight + b
        else:
            p_factor = a * (1.0 + 2.0 * z_loss * lse) + b
            y_factor = a * (1.0 - smoothing) + b
        p_factor *= nll_factor
        uniform = a * (smoothing / size) * scale
        for start in range(0, whole, BLOCK):
            write_block(
                z_row, gradient_row, nll_gradient_row, bias_ptr, class_weight_ptr, start + lane, vocabulary, width, top,
                unit, p_factor, nll_factor, uniform, SCALE, SOFTCAP, SMOOTHING, NARROWS, ACC, False,
            )  # fmt: skip
        if whole < width:
            write_block(
                z_row, gradient_row, nll_gradient_row, bias_ptr, class_weight_ptr, whole + lane, vocabulary, width, top,
                unit, p_factor, nll_factor, uniform, SCALE, SOFTCAP, SMOOTHING, NARROWS, ACC, True,
            )  # fmt: skip
        # The target's gradient anew, less the one-hot, over what the sweep wrote there: the barrier puts that first.
        tl.debug_barrier()
        e = tl.exp2((z_target - top) * unit)
        slope = 1.0
        if SOFTCAP is not None:
            slope = slope_of_cap(z_target, SOFTCAP, ACC)
        if gradient_row is not None:
            g = e * p_factor - y_factor * scale
            if SMOOTHING != 0.0:
                g -= uniform * class_weight
            tl.store(gradient_row + target, g * slope)
        if nll_gradient_row is not None:
            tl.store(nll_gradient_row + target, (e * nll_factor - scale) * slope)
