"""What the operators behind `linear_cross_entropy` take and give: structs of their arguments and results, in order.

Legend: T rows, H hidden size, V vocabulary, B samples, R rank, q sketch width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lead_kernels.head_chunks import HeadWeights, Lora, Wanted, chunk_rows, two_gradients
from lead_kernels.products import right_operand
from lead_kernels.row_loss import RowLoss


class HeadCall(NamedTuple):
    """Arguments of `lead_kernels::head`; `lead_kernels::head_gradient` takes three more."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    targets: Tensor
    class_weight: Tensor | None
    sample_ids: Tensor | None
    cu_seqlens: Tensor | None
    token_weight: Tensor | None
    left: Tensor | None
    right: Tensor | None
    num_samples: int
    want_hidden: bool
    want_weight: bool
    want_bias: bool
    want_lora: bool
    want_rows: bool
    want_lse: bool
    want_entropy: bool
    want_predicted: bool
    rows_differentiable: bool
    lora_scale: float
    softcap: float | None
    logit_scale: float
    label_smoothing: float
    z_loss: float
    ignore_index: int
    max_rows: int | None
    chunk_bytes: int | None
    logits_dtype: torch.dtype

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """What a gradient may be asked for, in the order of the gradients."""
        return self[:5]

    @property
    def wants(self) -> tuple[bool, ...]:
        """Whether it is, for each of `parameters`."""
        return self.want_hidden, self.want_weight, self.want_bias, self.want_lora, self.want_lora

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.want_hidden, self.want_weight, self.want_bias, self.want_lora, self.left is not None)

    @property
    def row_loss(self) -> RowLoss:
        return RowLoss(
            self.softcap, self.logit_scale, self.label_smoothing, self.z_loss, self.class_weight is not None
        )  # fmt: skip

    @property
    def most_rows(self) -> int:
        two, narrows = two_gradients(self.row_loss, self.wanted), self.logits_dtype != self.weight.dtype
        vocabulary, device = self.weight.shape[0], self.weight.device
        return chunk_rows(self.chunk_bytes, vocabulary, self.logits_dtype, device, two, narrows)

    @property
    def head(self) -> HeadWeights:
        lora = None
        if self.lora_a is not None and self.lora_b is not None:
            lora = Lora(right_operand(self.lora_a), right_operand(self.lora_b), self.lora_scale)
        bias = None if self.bias is None else self.bias.contiguous()  # the row pass reads it by address
        return HeadWeights(right_operand(self.weight), bias, lora)


class HeadResult(NamedTuple):
    """Results of `lead_kernels::head`; from `signature` on, what was not asked for is empty.

    Gradients are those of the loss but for an upstream factor and what `head_op` leaves for later of the rows' weights.
    """

    loss: Tensor
    token_nll: Tensor
    """[T]"""
    sample_nll: Tensor
    sample_tokens: Tensor
    """[B]"""
    scale: Tensor
    """0-d: the weight that all rows share; row_scale [T] is the rest of a row's."""
    signature: Tensor
    row_scale: Tensor
    loss_grad: Tensor
    """[T, H]"""
    dweight: Tensor
    dbias: Tensor
    dlora_a: Tensor
    dlora_b: Tensor
    row_loss: Tensor
    """[T]: a row's loss without its weight."""
    lse: Tensor
    entropy: Tensor
    predicted: Tensor
    """[T]"""

    @property
    def gradients(self) -> tuple[Tensor, ...]:
        return self[7:12]


_TYPES = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "int": "SymInt", "int | None": "SymInt?", "bool": "bool",
    "float": "float", "float | None": "float?", "torch.dtype": "ScalarType",
}  # fmt: skip


def schema(results: int, *more: str) -> str:
    """The schema of an operator with the fields of `HeadCall`, then optional tensors named `more`, and `results`
    tensors."""
    kinds = {name: kind.__forward_arg__ for name, kind in HeadCall.__annotations__.items()}
    arguments = [f"{_TYPES[kind]} {name}" for name, kind in kinds.items()] + [f"Tensor? {name}" for name in more]
    return f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * results)})"


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors only."""
    return like.new_empty(0) if tensor is None else tensor


def tensors(call: HeadCall) -> tuple[Any, ...]:
    """The fields before the plain numbers."""
    return call[: call._fields.index("num_samples")]
