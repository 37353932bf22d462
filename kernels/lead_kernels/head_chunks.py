"""The chunked pass behind `linear_cross_entropy`: losses and gradients of the rows without a [T, V] tensor.

Legend: T rows, C rows of a chunk, H hidden size, V vocabulary, R rank of an adapter. g gradient of a row's loss at its
logits.

A chunk is one product (logits), the row pass over it, and a product for each gradient: g W for the hidden states, g^T h
for the weight.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lead_kernels.backend import uses_kernels
from lead_kernels.products import (
    HALVES,
    add_product,
    apart,
    left_operand,
    product_into,
    row_blocks,
    thin_product,
    wide,
    wide_product,
)
from lead_kernels.row_loss import Columns, RowLoss, Rows
from lead_kernels.row_pass import in_place_view, padded, row_pass
from lead_kernels.row_pass_host import split

CHUNK_BYTES_CPU = 64 * 2**20
CHUNK_BYTES_DEVICE = (2**30, 4 * 2**30)
"""Least and most; between them 1/32 of the device's memory, of all of it: what is free depends on what else runs, and
results would with it. 5,000 rows of 128k logits in bf16 are one chunk on 80 GB, 16,384 on an H200. One chunk needs no
weight gradient in fp32."""
DEVICE_BUFFER_ROWS = 256
"""A GPU's buffers of logits are rounded up to this many rows, so that calls of similar size reuse the same memory."""
CPU_CHUNK_ROWS = 1024
"""More rows do not make the products faster on a CPU."""
DEVICE_CHUNK_ROWS = 2048
"""The fewest that the default budget gives on a GPU. Every chunk reads and writes the fp32 weight gradient, 8 V H bytes
at 4 TB/s, beside 6 C V H FLOPs at some 700 TFLOP/s: with 2048 rows a tenth of the products' time, partly hidden under
them."""


DEVICE_TILE_ROWS = 128
"""A GPU's products work on tiles of this many rows: five chunks of 3277 rows would fill 130 of them instead of 128."""


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


class HeadRows(NamedTuple):
    """Results per row and sums over the rows, in fp32 but for the gradients at the hidden states.

    Gradients hold the weights that went into the row pass, and no others.
    """

    nll_T: Tensor
    objective_T: Tensor
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


class RowStatistics(NamedTuple):
    """Which of the optional results per row are asked for."""

    lse: bool = False
    entropy: bool = False
    predicted: bool = False


NO_STATISTICS = RowStatistics()


def two_gradients(loss: RowLoss, wanted: Wanted) -> bool:
    """Whether the row pass fills two blocks: gradients of a row's loss and of its NLL are asked for, and differ."""
    return wanted.any and wanted.nll_hidden and not loss.plain


@functools.cache
def _total_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory; 0 where there is none to ask, as for fake tensors."""
    available = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).total_memory if available else 0


def _device_budget(device: torch.device) -> int:
    least, most = CHUNK_BYTES_DEVICE
    return min(most, max(least, _total_memory(device) // 32))


def chunk_rows(
    chunk_bytes: int | None, vocabulary: int, logits_dtype: torch.dtype, device: torch.device, two_blocks: bool,
    narrows: bool = False,
) -> int:  # fmt: skip
    """Rows whose logits fill the budget, at least one. On a CPU fp32 is counted, to which the row pass widens tile by
    tile, and, where the gradient `narrows`, its own block."""
    on_cpu = device.type == "cpu"
    size = max(4, logits_dtype.itemsize) if on_cpu else logits_dtype.itemsize
    row_bytes = size * vocabulary * (2 if two_blocks else 1) + (2 * vocabulary if on_cpu and narrows else 0)
    rows = max(1, (chunk_bytes or (CHUNK_BYTES_CPU if on_cpu else _device_budget(device))) // row_bytes)
    if on_cpu:
        return min(rows, CPU_CHUNK_ROWS)
    return rows if chunk_bytes else max(rows, DEVICE_CHUNK_ROWS)


def narrow_sums(rows: int, most_rows: int, dtype: torch.dtype) -> bool:
    """Whether the parameters' gradients stay in the parameters' dtype: where a single product is all there is to add.

    Not in fp16, whose range a sum over rows may leave before it is scaled by 1 / rows.
    """
    return rows <= most_rows and dtype != torch.float16


class _Sum:
    """A parameter's gradient, added up over the chunks. The first chunk's product is written, not added to zeros."""

    def __init__(self, parameter: Tensor, narrow: bool) -> None:
        self.parameter, self.narrow = parameter, narrow
        self.value: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        if self.value is not None:
            add_product(self.value, a, b)
        else:
            self.value = torch.mm(a, b) if self.narrow else wide_product(a, b)

    def add_values(self, values: Tensor) -> None:
        self.value = values.to(self._dtype()) if self.value is None else self.value.add_(values)

    def total(self) -> Tensor:
        return self.parameter.new_zeros(self.parameter.shape, dtype=self._dtype()) if self.value is None else self.value

    def _dtype(self) -> torch.dtype:
        return self.parameter.dtype if self.narrow else wide(self.parameter.dtype)


class _Pass:
    """One pass over the rows: holds the results and what is added up, and fills them chunk by chunk."""

    def __init__(self, hidden_TH: Tensor, head: HeadWeights, loss: RowLoss, wanted: Wanted, most_rows: int, logits_dtype: torch.dtype,
                 ignore_index: int, full_rows: int | None, class_weight: Tensor | None,
                 statistics: RowStatistics) -> None:  # fmt: skip
        self.columns = Columns(head.bias_V, class_weight)
        self.head, self.loss, self.wanted, self.ignore_index = head, loss, wanted, ignore_index
        rows, vocabulary = hidden_TH.shape[0], head.weight_VH.shape[0]
        self.wants_loss_gradient = wanted.any or (wanted.nll_hidden and loss.plain)
        kernels, two = uses_kernels(hidden_TH), two_gradients(loss, wanted)
        self.chunks = split(rows, most_rows, DEVICE_TILE_ROWS if kernels else 1)
        largest = max((chunk.stop - chunk.start for chunk in self.chunks), default=0)
        narrows = logits_dtype != hidden_TH.dtype
        self.gaps = kernels and narrows
        if kernels:
            step = min(DEVICE_BUFFER_ROWS, max(most_rows, 1))
            largest = min(-(-largest // step) * step, max(most_rows, largest))
            self.z = hidden_TH.new_empty(largest, padded(vocabulary), dtype=logits_dtype)[:, :vocabulary]
            self.g = in_place_view(self.z, hidden_TH.dtype)
            self.nll_g = hidden_TH.new_empty(largest, self.g.stride(0))[:, :vocabulary] if two else None
        else:
            self.g = apart(hidden_TH, largest, vocabulary)
            self.z = hidden_TH.new_empty(largest, vocabulary, dtype=logits_dtype) if narrows else self.g
            self.nll_g = apart(hidden_TH, largest, vocabulary) if two else None

        self.nll_T = hidden_TH.new_empty(rows, dtype=wide(hidden_TH.dtype))
        self.objective_T = self.nll_T if loss.plain else torch.empty_like(self.nll_T)
        self.lse_T = torch.empty_like(self.nll_T) if statistics.lse else None
        self.entropy_T = torch.empty_like(self.nll_T) if statistics.entropy else None
        self.predicted_T = torch.empty_like(self.nll_T, dtype=torch.int64) if statistics.predicted else None
        needs_loss_grad = wanted.hidden or (wanted.nll_hidden and loss.plain)
        self.loss_grad_TH = torch.empty_like(hidden_TH) if needs_loss_grad else None
        self.nll_grad_TH = (
            self.loss_grad_TH if loss.plain else torch.empty_like(hidden_TH) if wanted.nll_hidden else None
        )
        lora = head.lora
        narrow = narrow_sums(rows if full_rows is None else full_rows, most_rows, hidden_TH.dtype)
        self.dweight, self.dbias, self.da, self.db = (
            _Sum(parameter, narrow) if asked and parameter is not None else None
            for asked, parameter in (
                (wanted.weight, head.weight_VH),
                (wanted.bias, head.bias_V),
                (wanted.lora, lora and lora.a),
                (wanted.lora, lora and lora.b),
            )
        )

    def chunk(self, h_CH: Tensor, rows: Rows, at: slice, scale_C: Tensor | None) -> None:
        size, wanted, lora = h_CH.shape[0], self.wanted, self.head.lora
        z_CV, g_CV = self.z[:size], self.g[:size]
        product_into(z_CV, h_CH, self.head.weight_VH.t())
        if lora is not None:
            add_product(z_CV, thin_product(h_CH, lora.a.t(), lora.scale), lora.b.t())

        loss_g_CV = g_CV if self.wants_loss_gradient else None
        nll_g_CV = (
            self.nll_g[:size] if self.nll_g is not None else None if self.loss.plain or not wanted.nll_hidden else g_CV
        )
        row_pass(z_CV, loss_g_CV, nll_g_CV, self.columns, rows, self.loss, self.ignore_index)
        if self.gaps:  # of old logits between its rows, harmless to a GPU's products
            g_CV = left_operand(g_CV)
            nll_g_CV = g_CV if self.nll_g is None and nll_g_CV is not None else nll_g_CV
        if nll_g_CV is not None and self.nll_grad_TH is not None:
            self._at_hidden(nll_g_CV, self.nll_grad_TH[at])
        if self.loss_grad_TH is not None:
            self._at_hidden(g_CV, self.loss_grad_TH[at])
        if wanted.parameters:
            self._parameters(g_CV, h_CH, scale_C)

    def _at_hidden(self, g_CV: Tensor, out_CH: Tensor) -> None:
        product_into(out_CH, g_CV, self.head.weight_VH)
        lora = self.head.lora
        if lora is not None:
            out_CH.addmm_(thin_product(g_CV, lora.b, lora.scale), lora.a)

    def _parameters(self, g_CV: Tensor, h_CH: Tensor, scale_C: Tensor | None) -> None:
        """Add a chunk to the parameters' gradients. Scales the H columns of h: g has V columns, many more."""
        if scale_C is not None and (self.dweight is not None or self.da is not None):
            h_CH = left_operand((h_CH * scale_C[:, None]).to(h_CH.dtype))
        if self.dweight is not None:
            self.dweight.add(g_CV.t(), h_CH)
        if self.dbias is not None:
            self.dbias.add_values(_weighted_column_sum(g_CV, scale_C))
        if self.da is not None and self.db is not None:
            assert self.head.lora is not None
            a_RH, b_VR, scale = self.head.lora
            self.db.add(g_CV.t(), thin_product(h_CH, a_RH.t(), scale))
            self.da.add(thin_product(g_CV, b_VR, scale).t(), h_CH)


def _weighted_column_sum(g_CV: Tensor, scale_C: Tensor | None) -> Tensor:
    """sum_c scale_c g_cv in fp32: a product, in which the scale, in bf16 and fp16 a power of two, loses nothing."""
    if scale_C is None:
        scale_C = torch.ones(g_CV.shape[0], dtype=wide(g_CV.dtype), device=g_CV.device)
    column_C1 = scale_C.to(g_CV.dtype)[:, None]
    if g_CV.device.type != "cpu" or g_CV.dtype not in HALVES:
        return wide_product(g_CV.t(), column_C1).squeeze(1)
    blocks = row_blocks(g_CV)
    parts = [torch.mv(g_CV[block].float().t(), scale_C[block].float()) for block in blocks]
    return torch.stack(parts).sum(0)


def head_rows(
    hidden_TH: Tensor,
    head: HeadWeights,
    targets_T: Tensor,
    loss: RowLoss,
    wanted: Wanted,
    *,
    most_rows: int,
    logits_dtype: torch.dtype,
    ignore_index: int,
    row_scale_T: Tensor | None = None,
    objective_weight_T: Tensor | None = None,
    nll_weight_T: Tensor | None = None,
    full_rows: int | None = None,
    class_weight: Tensor | None = None,
    statistics: RowStatistics = NO_STATISTICS,
) -> HeadRows:
    """Loss of every row and the gradients asked for, a chunk of at most `most_rows` rows at a time.

    `row_scale_T` scales the rows in the parameters' gradients only; `objective_weight_T` and `nll_weight_T` weigh a
    row's loss and its NLL in all gradients (a and b of `row_pass`). `class_weight`: [V + 1], see `row_loss.Columns`.
    Rows with target `ignore_index` give 0; in host memory there must be none. `full_rows`: rows before ignored ones
    were taken out, which alone decides about the dtype of sums.
    """
    work = _Pass(
        hidden_TH, head, loss, wanted, most_rows, logits_dtype, ignore_index, full_rows, class_weight, statistics
    )
    optional = (work.lse_T, work.entropy_T, work.predicted_T)
    for at in work.chunks:
        objective_C = None if loss.plain else work.objective_T[at]
        weights = (None if x is None else x[at] for x in (objective_weight_T, nll_weight_T))
        outputs = (None if x is None else x[at] for x in optional)
        rows = Rows(targets_T[at], *weights, work.nll_T[at], objective_C, *outputs)
        work.chunk(hidden_TH[at], rows, at, None if row_scale_T is None else row_scale_T[at])
    sums = (None if x is None else x.total() for x in (work.dweight, work.dbias, work.da, work.db))
    return HeadRows(work.nll_T, work.objective_T, work.loss_grad_TH, work.nll_grad_TH, *sums, *optional)
