"""The chunked pass behind `linear_cross_entropy`: losses and gradients of the rows without a [T, V] tensor.

Legend: T rows, C rows of a chunk, H hidden size, V vocabulary, R rank of an adapter. g gradient of a row's loss at its
logits.

A chunk is one product (logits), the row pass over it, and a product for each gradient: g W for the hidden states, g^T h
for the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lead_kernels.backend import uses_kernels
from lead_kernels.chunk_size import DEVICE_TILE_ROWS, buffer_rows, narrow_sums
from lead_kernels.dtypes import HALVES, wide
from lead_kernels.head_types import HeadRows, HeadWeights, PassOptions, RowInputs, two_gradients
from lead_kernels.products import add_product, apart, left_operand, product_into, row_blocks, thin_product, wide_product
from lead_kernels.row_loss import Columns, Rows
from lead_kernels.row_pass import in_place_view, padded, row_pass
from lead_kernels.row_pass_host import split


class _Blocks:
    """A chunk's logits z and the gradients at them [C, V]; the first gradient lies where the logits lie, if it can."""

    def __init__(self, hidden_TH: Tensor, vocabulary: int, largest: int, options: PassOptions) -> None:
        loss, wanted = options.loss, options.wanted
        narrows = options.logits_dtype != hidden_TH.dtype
        two = two_gradients(loss, wanted)
        own: Tensor | None = None
        if uses_kernels(hidden_TH):
            rows = buffer_rows(largest, options.most_rows)
            self.z = hidden_TH.new_empty(rows, padded(vocabulary), dtype=options.logits_dtype)[:, :vocabulary]
            in_place = in_place_view(self.z, hidden_TH.dtype)
            if two:
                own = hidden_TH.new_empty(rows, in_place.stride(0))[:, :vocabulary]
        else:
            in_place = apart(hidden_TH, largest, vocabulary)
            self.z = in_place
            if narrows:  # PyTorch cannot write fp32 logits and their bf16 gradient to one place
                self.z = hidden_TH.new_empty(largest, vocabulary, dtype=options.logits_dtype)
            if two:
                own = apart(hidden_TH, largest, vocabulary)
        # Where the loss is the NLL, its gradient serves the signature too.
        wants_loss = wanted.any or (wanted.nll_hidden and loss.plain)
        self.loss_g = in_place if wants_loss else None
        self.nll_g: Tensor | None = None
        if wanted.nll_hidden and not loss.plain:
            self.nll_g = own if two else in_place
        self.gaps = uses_kernels(hidden_TH) and narrows

    def part(self, rows: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The first rows of z and of the gradients of loss and NLL."""
        loss_g_CV = None if self.loss_g is None else self.loss_g[:rows]
        nll_g_CV = None if self.nll_g is None else self.nll_g[:rows]
        return self.z[:rows], loss_g_CV, nll_g_CV

    def operand(self, g_CV: Tensor) -> Tensor:
        """A gradient as a product's left operand: old logits lie between its rows, which only a GPU's do not read."""
        return left_operand(g_CV) if self.gaps else g_CV


class _Sum:
    """A parameter's gradient, added up over the chunks. The first chunk's product is written, not added to zeros."""

    def __init__(self, parameter: Tensor, narrow: bool) -> None:
        self.parameter, self.narrow = parameter, narrow
        self.value: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        if self.value is not None:
            add_product(self.value, a, b)
        elif self.narrow:
            self.value = torch.mm(a, b)
        else:
            self.value = wide_product(a, b)

    def add_values(self, values: Tensor) -> None:
        if self.value is None:
            self.value = values.to(self._dtype())
        else:
            self.value.add_(values)

    def total(self) -> Tensor:
        if self.value is None:  # there was no row
            return self.parameter.new_zeros(self.parameter.shape, dtype=self._dtype())
        return self.value

    def _dtype(self) -> torch.dtype:
        return self.parameter.dtype if self.narrow else wide(self.parameter.dtype)


class _Sums:
    """The gradients of the parameters that are asked for."""

    def __init__(self, head: HeadWeights, options: PassOptions) -> None:
        wanted = options.wanted
        narrow = narrow_sums(options.full_rows, options.most_rows, head.weight_VH.dtype)
        self.head = head
        self.dweight = _Sum(head.weight_VH, narrow) if wanted.weight else None
        self.dbias = _Sum(head.bias_V, narrow) if wanted.bias and head.bias_V is not None else None
        self.da = self.db = None
        if wanted.lora and head.lora is not None:
            self.da, self.db = _Sum(head.lora.a, narrow), _Sum(head.lora.b, narrow)

    def add(self, g_CV: Tensor, h_CH: Tensor, scale_C: Tensor | None) -> None:
        """Add a chunk. The scale of the rows goes to the H columns of h: g has V columns, many more."""
        if self.dbias is not None:
            self.dbias.add_values(_weighted_column_sum(g_CV, scale_C))
        if self.dweight is None and self.da is None:
            return
        if scale_C is not None:
            h_CH = left_operand((h_CH * scale_C[:, None]).to(h_CH.dtype))
        if self.dweight is not None:
            self.dweight.add(g_CV.t(), h_CH)
        if self.da is not None and self.db is not None and self.head.lora is not None:
            # W + s B A, so that dB = s g^T (h A^T) and dA = s (g B)^T h: nothing of size V x H.
            a_RH, b_VR, scale = self.head.lora
            self.db.add(g_CV.t(), thin_product(h_CH, a_RH.t(), scale))
            self.da.add(thin_product(g_CV, b_VR, scale).t(), h_CH)


def _weighted_column_sum(g_CV: Tensor, scale_C: Tensor | None) -> Tensor:
    """sum_c scale_c g_cv in fp32: a product, in which the scale, in bf16 and fp16 a power of two, loses nothing."""
    if scale_C is None:
        scale_C = torch.ones(g_CV.shape[0], dtype=wide(g_CV.dtype), device=g_CV.device)
    if g_CV.device.type != "cpu" or g_CV.dtype not in HALVES:
        column_C1 = scale_C.to(g_CV.dtype)[:, None]
        return wide_product(g_CV.t(), column_C1).squeeze(1)
    # A CPU would round the sum to g's dtype, and a whole copy of g in fp32 would be a second block of logits.
    parts = [torch.mv(g_CV[block].float().t(), scale_C[block].float()) for block in row_blocks(g_CV)]
    return torch.stack(parts).sum(0)


def _logits_into(z_CV: Tensor, h_CH: Tensor, head: HeadWeights) -> None:
    product_into(z_CV, h_CH, head.weight_VH.t())
    if head.lora is not None:
        add_product(z_CV, thin_product(h_CH, head.lora.a.t(), head.lora.scale), head.lora.b.t())


def _gradient_at_hidden(g_CV: Tensor, head: HeadWeights, out_CH: Tensor) -> None:
    product_into(out_CH, g_CV, head.weight_VH)
    if head.lora is not None:
        out_CH.addmm_(thin_product(g_CV, head.lora.b, head.lora.scale), head.lora.a)


def _empty_rows(inputs: RowInputs, options: PassOptions) -> Rows:
    """The rows with room for their results."""
    nll_T = inputs.hidden_TH.new_empty(inputs.hidden_TH.shape[0], dtype=wide(inputs.hidden_TH.dtype))
    asked = options.statistics
    return Rows(
        target_C=inputs.targets_T,
        objective_weight_C=inputs.objective_weight_T,
        nll_weight_C=inputs.nll_weight_T,
        nll_C=nll_T,
        objective_C=None if options.loss.plain else torch.empty_like(nll_T),
        lse_C=torch.empty_like(nll_T) if asked.lse else None,
        entropy_C=torch.empty_like(nll_T) if asked.entropy else None,
        predicted_C=torch.empty_like(nll_T, dtype=torch.int64) if asked.predicted else None,
    )


def _empty_gradients(hidden_TH: Tensor, options: PassOptions) -> tuple[Tensor | None, Tensor | None]:
    """Gradients at the hidden states, of the loss and of the NLL, not filled in."""
    wanted = options.wanted
    if options.loss.plain:
        both = torch.empty_like(hidden_TH) if wanted.hidden or wanted.nll_hidden else None
        return both, both
    loss_grad_TH = torch.empty_like(hidden_TH) if wanted.hidden else None
    return loss_grad_TH, torch.empty_like(hidden_TH) if wanted.nll_hidden else None


def head_rows(inputs: RowInputs, head: HeadWeights, class_weight: Tensor | None, options: PassOptions) -> HeadRows:
    """Loss of every row and the gradients asked for, a chunk of at most `options.most_rows` rows at a time.

    class_weight: [V + 1], see `row_loss.Columns`.
    """
    hidden_TH, vocabulary = inputs.hidden_TH, head.weight_VH.shape[0]
    chunks = split(hidden_TH.shape[0], options.most_rows, DEVICE_TILE_ROWS if uses_kernels(hidden_TH) else 1)
    largest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    blocks, sums = _Blocks(hidden_TH, vocabulary, largest, options), _Sums(head, options)
    rows, columns = _empty_rows(inputs, options), Columns(head.bias_V, class_weight)
    loss_grad_TH, nll_grad_TH = _empty_gradients(hidden_TH, options)

    for at in chunks:
        h_CH = hidden_TH[at]
        z_CV, loss_g_CV, nll_g_CV = blocks.part(h_CH.shape[0])
        _logits_into(z_CV, h_CH, head)
        row_pass(z_CV, loss_g_CV, nll_g_CV, columns, rows.part(at), options.loss, options.ignore_index)
        if nll_g_CV is not None and nll_grad_TH is not None:
            _gradient_at_hidden(blocks.operand(nll_g_CV), head, nll_grad_TH[at])
        if loss_g_CV is None:
            continue
        loss_g_CV = blocks.operand(loss_g_CV)
        if loss_grad_TH is not None:
            _gradient_at_hidden(loss_g_CV, head, loss_grad_TH[at])
        sums.add(loss_g_CV, h_CH, None if inputs.row_scale_T is None else inputs.row_scale_T[at])

    return HeadRows(
        nll_T=rows.nll_C,
        objective_T=rows.nll_C if rows.objective_C is None else rows.objective_C,
        loss_grad_TH=loss_grad_TH,
        nll_grad_TH=nll_grad_TH,
        dweight_VH=None if sums.dweight is None else sums.dweight.total(),
        dbias_V=None if sums.dbias is None else sums.dbias.total(),
        dlora_a_RH=None if sums.da is None else sums.da.total(),
        dlora_b_VR=None if sums.db is None else sums.db.total(),
        lse_T=rows.lse_C,
        entropy_T=rows.entropy_C,
        predicted_T=rows.predicted_C,
    )
