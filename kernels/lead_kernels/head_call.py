"""What the operators behind `linear_cross_entropy` take and give, as structs.

An operator of `torch.library` takes and returns flat lists. `HeadTensors`, `HeadOptions` and `HeadResult` name their
entries; `HeadCall.from_flat`, `HeadCall.flat` and `schema` are the only places that rely on the order.

Legend: T rows, H hidden size, V vocabulary, B samples, R rank, q sketch width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from lead_kernels.chunk_size import chunk_rows
from lead_kernels.head_types import HeadWeights, Lora, PassOptions, RowStatistics, Wanted, two_gradients
from lead_kernels.products import right_operand
from lead_kernels.row_loss import RowLoss


class HeadTensors(NamedTuple):
    """Tensors of a call. The first five are those at which a gradient may be asked for."""

    hidden: Tensor
    """[T, H]"""
    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    targets: Tensor
    """int64 [T]"""
    class_weight: Tensor | None
    sample_ids: Tensor | None
    cu_seqlens: Tensor | None
    token_weight: Tensor | None
    """0-d or [T]; None: 1 / counted rows, or 1 / the sum of their class weights."""
    left: Tensor | None
    right: Tensor | None
    """[H, q] each: the sketch's matrices."""

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.weight, self.bias, self.lora_a, self.lora_b


class HeadOptions(NamedTuple):
    """The rest of a call."""

    num_samples: int
    want_hidden: bool
    want_weight: bool
    want_bias: bool
    want_lora: bool
    """Gradients to compute with the loss."""
    want_rows: bool
    want_lse: bool
    want_entropy: bool
    want_predicted: bool
    """Results per row to return."""
    rows_differentiable: bool
    """Whether gradients may arrive at token_nll, sample_nll and row_loss too."""
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
    def wants(self) -> tuple[bool, ...]:
        """Whether a gradient is to be computed, for each of `HeadTensors.parameters`."""
        return self.want_hidden, self.want_weight, self.want_bias, self.want_lora, self.want_lora


class HeadCall(NamedTuple):
    """Arguments of `lead_kernels::head`."""

    tensors: HeadTensors
    options: HeadOptions

    @classmethod
    def from_flat(cls, arguments: Sequence[Any]) -> HeadCall:
        """The call behind the arguments that an operator has received."""
        count = len(HeadTensors._fields)
        return cls(HeadTensors._make(arguments[:count]), HeadOptions._make(arguments[count:]))

    def flat(self) -> tuple[Any, ...]:
        return (*self.tensors, *self.options)

    @property
    def row_loss(self) -> RowLoss:
        options = self.options
        classes = self.tensors.class_weight is not None
        return RowLoss(options.softcap, options.logit_scale, options.label_smoothing, options.z_loss, classes)

    @property
    def most_rows(self) -> int:
        """Of a chunk."""
        weight, options = self.tensors.weight, self.options
        two = two_gradients(self.row_loss, self._wanted)
        narrows = options.logits_dtype != weight.dtype
        return chunk_rows(options.chunk_bytes, weight.shape[0], options.logits_dtype, weight.device, two, narrows)

    @property
    def pass_options(self) -> PassOptions:
        options = self.options
        return PassOptions(
            loss=self.row_loss,
            wanted=self._wanted,
            statistics=RowStatistics(options.want_lse, options.want_entropy, options.want_predicted),
            ignore_index=options.ignore_index,
            most_rows=self.most_rows,
            full_rows=self.tensors.targets.shape[0],
            logits_dtype=options.logits_dtype,
        )

    @property
    def head(self) -> HeadWeights:
        _, weight, bias, a, b = self.tensors.parameters
        lora = None
        if a is not None and b is not None:
            lora = Lora(right_operand(a), right_operand(b), self.options.lora_scale)
        assert weight is not None
        # The row pass reads the bias by its address.
        return HeadWeights(right_operand(weight), None if bias is None else bias.contiguous(), lora)

    @property
    def _wanted(self) -> Wanted:
        options = self.options
        signature = self.tensors.left is not None
        return Wanted(options.want_hidden, options.want_weight, options.want_bias, options.want_lora, signature)


class HeadResult(NamedTuple):
    """Results of `lead_kernels::head`; from `signature` on, what was not asked for is empty.

    Gradients are those of the loss but for an upstream factor and what `row_weights` leaves for later.
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
        """At `HeadTensors.parameters`."""
        return self.loss_grad, self.dweight, self.dbias, self.dlora_a, self.dlora_b


class Upstream(NamedTuple):
    """What `lead_kernels::head_gradient` takes beside a call: weights of what it differentiates, where given."""

    loss_weight: Tensor | None
    """[T], of the rows' losses."""
    token_grad: Tensor | None
    """[T], of their NLLs."""
    sample_grad: Tensor | None
    """[B], of the samples' mean NLLs."""


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    bool: "bool",
    float: "float",
    float | None: "float?",
    torch.dtype: "ScalarType",
}


def schema(results: int, *structs: type) -> str:
    """The schema of an operator that takes the fields of `structs`, in order, and returns `results` tensors."""
    hints = [hint for struct in structs for hint in get_type_hints(struct).items()]
    arguments = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in hints)
    return f"({arguments}) -> ({', '.join(['Tensor'] * results)})"
