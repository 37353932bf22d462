"""What the row pass's kernel does with one block of columns of its row. See `row_loss` for what it computes.

Legend: V vocabulary. z logits, p = softmax(z), m maximum, s sum of e^(z - m).
"""

from __future__ import annotations

from typing import no_type_check

from lead_kernels.backend import tl, triton


@triton.jit
@no_type_check
def transform(x, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """softcap(scale * x). tanh by one exponential: exact to about 1e-7 of the cap, and right at both infinities."""
    if SCALE != 1.0:
        x = x * tl.full((), SCALE, ACC)  # a bare constant would be rounded to fp32 first
    if SOFTCAP is not None:
        cap = tl.full((), SOFTCAP, ACC)
        # tanh(y) = 1 - 2 / (e^(2 y) + 1), with e^(2 y) = 2^(2 y log2(e)).
        x = cap * (1.0 - 2.0 / (tl.exp2(x * (2.0 * 1.4426950408889634 / cap)) + 1.0))
    return x


@triton.jit
@no_type_check
def slope_of_cap(z, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """Of the cap, from its result z: d c tanh(x / c) / dx = 1 - tanh^2."""
    tanh = z / tl.full((), SOFTCAP, ACC)
    return 1.0 - tanh * tanh


@triton.jit
@no_type_check
def _load_columns(pointer, column, vocabulary, ACC: tl.constexpr, MASKED: tl.constexpr):
    """A block of a vector [V]: a bias, or weights of the classes."""
    if MASKED:
        values = tl.load(pointer + column, mask=column < vocabulary, other=0.0)
    else:
        values = tl.load(pointer + column)
    return values.to(ACC)


@triton.jit
@no_type_check
def _store_block(row_ptr, column, values, vocabulary, width, MASKED: tl.constexpr):
    """A block of a row of gradients; 0 goes to the padding, which the products read."""
    if MASKED:
        tl.store(row_ptr + column, tl.where(column < vocabulary, values, 0.0), mask=column < width)
    else:
        tl.store(row_ptr + column, values)


@triton.jit
@no_type_check
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
        z += _load_columns(bias_ptr, column, vocabulary, ACC, MASKED)
    return transform(z, SCALE, SOFTCAP, ACC)


@triton.jit
@no_type_check
def add_block(
    m, s, total, moment, best, z_row, bias_ptr, class_weight_ptr, entropy_ptr, predicted_ptr, column, vocabulary, width,
    unit, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, ACC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The first sweep's sums with one more block of columns in them."""
    # The second sweep reads the row again: it should still be in the L2 cache then.
    z = _logits(z_row, bias_ptr, column, vocabulary, width, SCALE, SOFTCAP, ACC, MASKED, "evict_last")
    if MASKED:
        z = tl.where(column < vocabulary, z, -float("inf"))
    highest = tl.max(z, 1)
    new = tl.maximum(m, highest)
    if predicted_ptr is not None:
        # The first column with the highest logit; an earlier block keeps its own where the two are equal.
        first = tl.min(tl.where(z == highest[:, None], column, 2147483647), 1)
        best = tl.where(highest > m, first, best)
    # Exponents relative to the new maximum; the sums so far were relative to the old one.
    below = (z - new[:, None]) * unit
    rescale = (m - new) * unit
    e = tl.exp2(below)
    if entropy_ptr is not None:
        # e^d d for d = -inf is 0 times infinity: such columns, and groups that are still empty, are left out.
        terms = tl.where(e > 0.0, e * below, 0.0)
        moment = (moment + tl.where(s > 0.0, s * rescale, 0.0)) * tl.exp2(rescale) + tl.sum(terms, 1)
    s = s * tl.exp2(rescale) + tl.sum(e, 1)
    if SMOOTHING != 0.0:
        if MASKED:
            z = tl.where(column < vocabulary, z, 0.0)
        if class_weight_ptr is not None:
            z = z * _load_columns(class_weight_ptr, column, vocabulary, ACC, MASKED)
        total += tl.sum(z, 1)
    return new, s, total, moment, best


@triton.jit
@no_type_check
def write_block(
    z_row, gradient_row, nll_gradient_row, bias_ptr, class_weight_ptr, column, vocabulary, width, top, unit, p_factor,
    nll_factor, uniform, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, NARROWS: tl.constexpr,
    ACC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The second sweep: gradients of one block of columns, as if none of them were the target."""
    # Nobody reads these logits again: they make room in the L2 cache for other rows.
    z = _logits(z_row, bias_ptr, column, vocabulary, width, SCALE, SOFTCAP, ACC, MASKED, "evict_first")
    e = tl.exp2((z - top) * unit)
    if NARROWS:
        tl.debug_barrier()  # a narrower gradient lands on logits that other threads of this block still have to read
    if gradient_row is not None:
        g = e * p_factor
        if SMOOTHING != 0.0:
            if class_weight_ptr is not None:
                g -= uniform * _load_columns(class_weight_ptr, column, vocabulary, ACC, MASKED)
            else:
                g -= uniform
        if SOFTCAP is not None:
            g *= slope_of_cap(z, SOFTCAP, ACC)
        _store_block(gradient_row, column, g, vocabulary, width, MASKED)
    if nll_gradient_row is not None:
        g = e * nll_factor
        if SOFTCAP is not None:
            g *= slope_of_cap(z, SOFTCAP, ACC)
        _store_block(nll_gradient_row, column, g, vocabulary, width, MASKED)
