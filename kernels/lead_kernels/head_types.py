"""What the passes over the head's rows are given and what they return.

Legend: T rows, H hidden size, V vocabulary, R rank of an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lead_kernels.row_loss import RowLoss


class Lora(NamedTuple):
    """A low-rank term of the head: its weight is W + scale * B A."""

    a: Tensor
    """[R, H]"""
    b: Tensor
    """[V, R]"""
    scale: float


class HeadWeights(NamedTuple):
    """The head's parameters, of one dtype."""

    weight_VH: Tensor
    bias_V: Tensor | None
    lora: Lora | None


@dataclass(frozen=True)
class Wanted:
    """The gradients asked for. `nll_hidden`: that of the plain NLL at the hidden states, for the signature."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    lora: bool = False
    nll_hidden: bool = False

    @property
    def parameters(self) -> bool:
        return self.weight or self.bias or self.lora

    @property
    def any(self) -> bool:
        return self.hidden or self.parameters


def two_gradients(loss: RowLoss, wanted: Wanted) -> bool:
    """Whether the row pass fills two blocks: gradients of a row's loss and of its NLL are asked for, and differ."""
    return wanted.any and wanted.nll_hidden and not loss.plain


class RowStatistics(NamedTuple):
    """Which of the optional results per row are asked for."""

    lse: bool = False
    entropy: bool = False
    predicted: bool = False


@dataclass(frozen=True)
class PassOptions:
    """What one pass over the rows computes, and in chunks of what size."""

    loss: RowLoss
    wanted: Wanted
    statistics: RowStatistics
    ignore_index: int
    most_rows: int
    """Of a chunk."""
    full_rows: int
    """Rows before ignored ones were taken out: this alone decides about the dtype of sums over rows."""
    logits_dtype: torch.dtype


class RowInputs(NamedTuple):
    """The rows of a pass. Those with the ignored target give 0; in host memory there must be none."""

    hidden_TH: Tensor
    targets_T: Tensor
    row_scale_T: Tensor | None = None
    """Scales the rows in the parameters' gradients only."""
    objective_weight_T: Tensor | None = None
    nll_weight_T: Tensor | None = None
    """Weights of a row's loss and of its NLL in all gradients: a and b of `row_loss`."""


class HeadRows(NamedTuple):
    """Results per row and sums over the rows, in fp32 but for the gradients at the hidden states.

    Gradients hold the weights that went into the row pass, and no others.
    """

    nll_T: Tensor
    objective_T: Tensor
    """A row's loss; the same tensor as `nll_T` where the loss is the NLL."""
    loss_grad_TH: Tensor | None
    nll_grad_TH: Tensor | None
    """Gradients at the hidden states, of a row's loss and of its plain NLL; one tensor where these are the same."""
    dweight_VH: Tensor | None
    dbias_V: Tensor | None
    dlora_a_RH: Tensor | None
    dlora_b_VR: Tensor | None
    lse_T: Tensor | None
    entropy_T: Tensor | None
    predicted_T: Tensor | None
