"""A row's loss and what goes into and comes out of the pass over a block of logits.

Legend: C rows of a chunk, V vocabulary. z logits, p = softmax(z), y target, lse = log sum exp z.

A row's loss is  a [(1 - s) NLL + s (lse - mean z) + zl lse^2] + b NLL,  s label smoothing, zl the z-loss factor. a and
b are 1 and 0 where the row's weight is applied later, or given per row. With respect to the logits that is

    g = (a (1 + 2 zl lse) + b) p - (a (1 - s) + b) onehot(y) - a s / V.

With class weights w, of sum W, it is  a [(1 - s) w_y NLL + s / V sum_j w_j (lse - z_j) + zl lse^2] + b NLL  and

    g = (a ((1 - s) w_y + s W / V + 2 zl lse) + b) p - (a (1 - s) w_y + b) onehot(y) - a s w / V,

then through the cap, z = c tanh(x / c) with dz/dx = 1 - (z / c)^2, and the scale. The one-hot is subtracted in fp32,
before any rounding: rounded first, a small 1 - p_y would be lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class RowLoss:
    """What a row's loss is made of besides its NLL."""

    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    classes: bool = False
    """Whether classes have weights."""

    @property
    def plain(self) -> bool:
        """The row's loss is its NLL, so that one gradient serves the backward pass and the signature."""
        return self.label_smoothing == 0.0 and self.z_loss == 0.0 and not self.classes


class Rows(NamedTuple):
    """A chunk's rows: what comes in with them, and where their losses go."""

    target_C: Tensor
    """int64; `ignore_index` in rows that do not count: their loss and gradient are 0."""
    objective_weight_C: Tensor | None
    nll_weight_C: Tensor | None
    """a and b above; None: 1 and 0."""
    nll_C: Tensor
    objective_C: Tensor | None
    """Outputs: the plain NLL and, unless the loss is that, the row's loss."""
    lse_C: Tensor | None = None
    entropy_C: Tensor | None = None
    predicted_C: Tensor | None = None
    """Outputs where given: log-sum-exp, entropy in nats, and int64 the first of the largest logits."""

    def part(self, rows: slice) -> Rows:
        return Rows._make(None if x is None else x[rows] for x in self)


class Columns(NamedTuple):
    """What belongs to the columns, where given."""

    bias_V: Tensor | None
    class_weight: Tensor | None
    """fp32 [V + 1], float64 for float64: the weights of the classes, then their sum."""
