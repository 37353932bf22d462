"""How the weights of the rows enter the head's gradients without a second rounding.

A row's weight w = m 2^k, 1 <= |m| < 2: in bf16 and fp16 its mantissa m goes into the row's gradient at the logits, in
fp32 before that is rounded, and 2^k, which rounds nothing, where it costs least: to the rows of h, or to the results.
A weight that scaled what is rounded already would round it once more. fp32 and float64 take the whole weight there.

Legend: T rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lead_kernels.counted_rows import CountedRows
from lead_kernels.dtypes import HALVES, wide
from lead_kernels.head_call import HeadCall


def mantissa(weight: Tensor) -> Tensor:
    """m of weight = m 2^k, 1 <= |m| < 2; 1 for 0, infinity and NaN. weight / m is exact."""
    m = 2 * torch.frexp(weight).mantissa
    return torch.where(m.isfinite() & (m != 0), m, 1.0)


def left_for_later(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The part of a weight that does not go into the gradient at the logits, for operands of `dtype`."""
    return weight / mantissa(weight) if dtype in HALVES else weight


def largest_power(weights: Tensor) -> Tensor:
    """The power of two in the largest weight, 1 where all are 0: outside of the products, it keeps fp16 in range."""
    # The zero gives a maximum to an empty tensor too.
    largest = torch.cat([weights.flatten(), weights.new_zeros(1)]).abs().amax()
    largest = largest / mantissa(largest)
    return torch.where(largest > 0, largest, 1.0)


class RowWeights(NamedTuple):
    """The token weights of a call. Row t's is `scale` times, where rows differ, `row_scale_T[t]`."""

    scale: Tensor
    """0-d."""
    row_scale_T: Tensor | None
    """Of the rows taken."""
    at_logits_T: Tensor | None
    """What of them goes into the gradient at the logits; None: nothing."""
    at_rows_T: Tensor | None
    """What scales the rows of h in the parameters' gradients; None: nothing."""

    @classmethod
    def of(cls, call: HeadCall, counted: CountedRows, classes: Tensor | None, rows: int) -> RowWeights:
        """classes: [V + 1], see `class_weights`; rows: how many are taken."""
        scale, factor_T = _factors(call, counted, classes)
        row_scale_T = None if factor_T is None else counted.take(factor_T)
        if not any(call.options.wants) or call.tensors.hidden.dtype not in HALVES:
            return cls(scale, row_scale_T, None, row_scale_T)
        if row_scale_T is None:
            return cls(scale, None, mantissa(scale).expand(rows).contiguous(), None)
        at_logits_T = mantissa(row_scale_T)
        return cls(scale, row_scale_T, at_logits_T, row_scale_T / at_logits_T)

    def total(self, objective_T: Tensor) -> Tensor:
        """The weighted sum of the rows' losses."""
        if self.row_scale_T is not None:
            # A row of weight 0 has no part in the loss, also where its own loss is infinite.
            objective_T = torch.where(self.row_scale_T != 0, self.row_scale_T * objective_T, 0.0)
        return self.scale * objective_T.sum()


def class_weights(call: HeadCall) -> Tensor | None:
    """Weights of the classes, then their sum: [V + 1]."""
    if call.tensors.class_weight is None:
        return None
    weight = call.tensors.class_weight.to(wide(call.tensors.hidden.dtype))
    return torch.cat([weight, weight.sum()[None]])


def _factors(call: HeadCall, counted: CountedRows, classes: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The token weights as a 0-d factor and, where they differ between rows, a factor [T]."""
    token_weight, hidden = call.tensors.token_weight, call.tensors.hidden
    dtype = wide(hidden.dtype)
    if token_weight is None:
        return _mean_weight(call.tensors.targets, counted, classes, dtype), None
    if token_weight.dim() == 0:
        return token_weight.to(dtype, copy=True), None
    rows_T = token_weight.to(dtype, copy=True)
    if hidden.dtype not in HALVES:
        return torch.ones((), dtype=dtype, device=rows_T.device), rows_T
    # Ignored rows may have any weight, and must not decide about the scale.
    scale = largest_power(torch.where(counted.valid_T, rows_T, 0.0))
    return scale, rows_T / scale


def _mean_weight(targets_T: Tensor, counted: CountedRows, classes: Tensor | None, dtype: torch.dtype) -> Tensor:
    """1 / counted rows or, with weights of the classes, 1 / the sum of the counted targets' weights."""
    if classes is None:
        return 1.0 / counted.before[-1].clamp(min=1).to(dtype)
    # A target outside the vocabulary raises an error elsewhere; on a GPU only later, so nothing may be read past V.
    inside_T = counted.valid_T & (targets_T >= 0) & (targets_T < classes.shape[0] - 1)
    weight_T = torch.where(inside_T, classes[torch.where(inside_T, targets_T, 0)], 0.0)
    total = weight_T.sum()
    return torch.where(total != 0, 1.0 / total, 0.0)
