"""The two custom operators behind `linear_cross_entropy`, and how autograd joins them.

`lead_kernels::head` computes the losses and, where `loss` is to be differentiated, its gradients up to the factor that arrives from
upstream: three products in all, two where the head is frozen. `lead_kernels::head_gradient` computes gradients from the logits anew, for
upstream gradients at `token_nll` and `sample_nll`, of which nothing is known before.

Legend: T rows, H hidden size, V vocabulary, B samples, R rank, q sketch width.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lead_kernels.backend import uses_kernels
from lead_kernels.gradient_signature import signature_from_bounds
from lead_kernels.head_chunks import HeadWeights, Lora, Wanted, chunk_rows, head_rows, narrow_sums, two_gradients
from lead_kernels.products import left_operand, right_operand, scaled, wide
from lead_kernels.row_pass import RowLoss
from lead_kernels.segment_reduce import segment_bounds, segment_sum


class CountedRows(NamedTuple):
    """The rows whose target is not ignored, taken out so that the others cost no products.

    index: int64 [rows taken], T where a place is left empty; None: all rows are taken, ignored ones with zeros for hidden states.
    """

    index: Tensor | None
    valid_T: Tensor
    before: Tensor
    """int64 [T + 1]: counted rows before row t."""

    @staticmethod
    def of(targets_T: Tensor, ignore_index: int, max_rows: int | None) -> CountedRows:
        """On a GPU, `max_rows` places are given without a look at the data; with None, the number of counted rows is read."""
        valid_T = targets_T != ignore_index
        before = torch.cat([valid_T.new_zeros(1, dtype=torch.int64), valid_T.cumsum(0)])
        if not uses_kernels(targets_T):
            return CountedRows(None if bool(valid_T.all()) else valid_T.nonzero().squeeze(1), valid_T, before)
        if max_rows is None:
            max_rows = int(before[-1])
        else:
            torch._assert_async(before[-1] <= max_rows, "linear_cross_entropy: more than max_rows targets count")
        total = targets_T.shape[0]
        if max_rows >= total:
            return CountedRows(None, valid_T, before)
        # A compaction without a data-dependent shape: counted row number r goes to place r, the others to a place that is cut off.
        place_T = torch.where(valid_T, before[:-1], max_rows).clamp(max=max_rows)
        index = place_T.new_full((max_rows + 1,), total).scatter_(0, place_T, torch.arange(total, device=place_T.device))
        return CountedRows(index[:max_rows], valid_T, before)

    def take(self, values: Tensor, fill: float = 0) -> Tensor:
        """The counted rows of `values` [T, ...]; `fill` in empty places and, where all rows are taken, in ignored ones."""
        if self.index is None:
            return self._masked(values, self.valid_T, fill) if uses_kernels(values) else values
        if not uses_kernels(values) or self.index.shape[0] == 0:
            return values[self.index]
        filled = self.index < self.valid_T.shape[0]
        return self._masked(values[torch.where(filled, self.index, 0)], filled, fill)

    def put(self, rows: Tensor) -> Tensor:
        """Results of the rows taken at their places among all rows [T, ...], 0 elsewhere."""
        if self.index is None:
            return rows
        total = self.valid_T.shape[0]
        return rows.new_zeros(total + 1, *rows.shape[1:]).index_copy_(0, self.index, rows)[:total]

    def bounds(self, bounds: Tensor) -> Tensor:
        """Bounds of samples among all rows as bounds among the rows taken."""
        return bounds if self.index is None else self.before[bounds]

    @staticmethod
    def _masked(values: Tensor, mask: Tensor, fill: float) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (values.dim() - 1)), values, fill)


class Options(NamedTuple):
    """The plain numbers of a call, in the order in which the operators take them."""

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
    def row_loss(self) -> RowLoss:
        return RowLoss(self.softcap, self.logit_scale, self.label_smoothing, self.z_loss)

    def most_rows(self, weight: Tensor, wanted: Wanted) -> int:
        two, narrows = two_gradients(self.row_loss, wanted), self.logits_dtype != weight.dtype
        return chunk_rows(self.chunk_bytes, weight.shape[0], self.logits_dtype, weight.device, two, narrows)


def _head(weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, lora_scale: float) -> HeadWeights:
    bias = None if bias is None else bias.contiguous()  # the row pass reads it by address
    lora = None
    if lora_a is not None and lora_b is not None:
        lora = Lora(right_operand(lora_a), right_operand(lora_b), lora_scale)
    return HeadWeights(right_operand(weight), bias, lora)


def _bounds(sample_ids: Tensor | None, cu_seqlens: Tensor | None, num_samples: int, rows: int) -> Tensor:
    """Samples' first rows, int64 [B + 1]. ValueError (an assertion on the device) where cu_seqlens decreases or leaves the rows."""
    if sample_ids is not None:
        return segment_bounds(sample_ids, num_samples)
    assert cu_seqlens is not None
    bounds = cu_seqlens[: num_samples + 1].long()
    right = (bounds.diff() >= 0).all() & (bounds[0] >= 0) & (bounds[-1] <= rows)
    if uses_kernels(bounds):
        torch._assert_async(right, "linear_cross_entropy: cu_seqlens must be non-decreasing and within the rows")
    elif not right:
        raise ValueError(f"cu_seqlens must be non-decreasing and within 0 to {rows}, got {bounds.tolist()}")
    return bounds


def _factors(token_weight: Tensor | None, before: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The token weights as a 0-d factor and, where they differ between rows, a factor [T]."""
    if token_weight is None:
        return 1.0 / before[-1].clamp(min=1).to(dtype), None
    if token_weight.dim() == 0:
        return token_weight.to(dtype, copy=True), None
    return torch.ones((), dtype=dtype, device=before.device), token_weight.to(dtype, copy=True)


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    """Targets outside the vocabulary: an error in host memory, an assertion on the device elsewhere."""
    if uses_kernels(targets):
        torch._assert_async(((targets >= 0) & (targets < vocabulary)).all(), "linear_cross_entropy: a target is outside the vocabulary")
    elif targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise ValueError(f"targets hold {int(targets.min())} to {int(targets.max())}, expected 0 to {vocabulary - 1} or ignore_index")


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors only."""
    return like.new_empty(0) if tensor is None else tensor


def head_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, targets: Tensor,
    sample_ids: Tensor | None, cu_seqlens: Tensor | None, num_samples: int, token_weight: Tensor | None, left: Tensor | None,
    right: Tensor | None, wanted: Wanted, options: Options,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Implementation of `lead_kernels::head`; see there."""
    vocabulary, sums = weight.shape[0], wide(hidden.dtype)
    counted = CountedRows.of(targets, options.ignore_index, options.max_rows)
    bounds = _bounds(sample_ids, cu_seqlens, num_samples, targets.shape[0])
    counts_B = counted.before[bounds].diff()
    scale, row_scale_T = _factors(token_weight, counted.before, sums)
    h_TH, y_T = left_operand(counted.take(hidden)), counted.take(targets, options.ignore_index)
    _check_targets(torch.where(y_T == options.ignore_index, 0, y_T) if uses_kernels(targets) else y_T, vocabulary)
    taken_scale = None if row_scale_T is None else counted.take(row_scale_T)

    out = head_rows(
        h_TH, _head(weight, bias, lora_a, lora_b, options.lora_scale), y_T, options.row_loss, wanted,
        most_rows=options.most_rows(weight, wanted), logits_dtype=options.logits_dtype,
        ignore_index=options.ignore_index, row_scale_T=taken_scale, full_rows=targets.shape[0],
    )  # fmt: skip
    # A row of weight 0 has no part in the loss, also where its NLL is infinite.
    weighted = out.objective_T if taken_scale is None else torch.where(taken_scale != 0, taken_scale * out.objective_T, 0.0)
    nll_T = counted.put(out.nll_T)
    phi = None
    if left is not None and right is not None:
        assert out.nll_grad_TH is not None
        phi = signature_from_bounds(h_TH, out.nll_grad_TH, left, right, counted.bounds(bounds), counts_B)
    loss_grad_TH = counted.put(out.loss_grad_TH) if wanted.hidden and out.loss_grad_TH is not None else None
    row_scale_T = None if taken_scale is None else counted.put(taken_scale)  # 0 in ignored rows, whatever they were given
    optional = (phi, row_scale_T, loss_grad_TH, out.dweight_VH, out.dbias_V, out.dlora_a_RH, out.dlora_b_VR)
    sample_nll = segment_sum(nll_T, bounds) / counts_B.clamp(min=1)
    return (scale * weighted.sum(), nll_T, sample_nll, counts_B, scale, *(_or_empty(x, nll_T) for x in optional))


@torch.library.custom_op("lead_kernels::head", mutates_args=())
def head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, targets: Tensor,
    sample_ids: Tensor | None, cu_seqlens: Tensor | None, num_samples: int, token_weight: Tensor | None, left: Tensor | None,
    right: Tensor | None, want_hidden: bool, want_weight: bool, want_bias: bool, want_lora: bool, rows_differentiable: bool,
    lora_scale: float, softcap: float | None, logit_scale: float, label_smoothing: float, z_loss: float, ignore_index: int,
    max_rows: int | None, chunk_bytes: int | None, logits_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, token_nll [T], sample_nll [B], sample_tokens [B], scale, signature [B, q, q], row_scale [T], loss_grad [T, H], dweight [V, H],
    dbias [V], dlora_a [R, H], dlora_b [V, R]); of the last seven, those that were not asked for are empty.

    The gradient of the loss at row t's hidden state is scale * row_scale_t * loss_grad_t (row_scale empty: 1); that of a parameter is scale
    times what is returned. want_...: the gradients to compute; rows_differentiable: autograd joins token_nll and sample_nll too.
    """
    options = Options(lora_scale, softcap, logit_scale, label_smoothing, z_loss, ignore_index, max_rows, chunk_bytes, logits_dtype)
    wanted = Wanted(want_hidden, want_weight, want_bias, want_lora, left is not None)
    return head_forward(hidden, weight, bias, lora_a, lora_b, targets, sample_ids, cu_seqlens, num_samples, token_weight, left, right,
                        wanted, options)  # fmt: skip


@head.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, targets: Tensor,
      sample_ids: Tensor | None, cu_seqlens: Tensor | None, num_samples: int, token_weight: Tensor | None, left: Tensor | None,
      right: Tensor | None, want_hidden: bool, want_weight: bool, want_bias: bool, want_lora: bool, rows_differentiable: bool,
      *numbers: Any) -> tuple[Tensor, ...]:  # fmt: skip
    options, sums = Options(*numbers), wide(hidden.dtype)
    wanted = Wanted(want_hidden, want_weight, want_bias, want_lora, left is not None)
    most_rows = options.most_rows(weight, wanted)
    narrow = narrow_sums(hidden.shape[0], most_rows, hidden.device)

    def new(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=sums)

    def parameter(tensor: Tensor | None, asked: bool) -> Tensor:
        return tensor.new_empty(tensor.shape, dtype=tensor.dtype if narrow else sums) if asked and tensor is not None else new(0)

    rows, samples = hidden.shape[0], num_samples
    return (
        new(), new(rows), new(samples), hidden.new_empty(samples, dtype=torch.int64), new(),
        new(0) if left is None or right is None else new(samples, left.shape[1], right.shape[1]),
        new(rows) if token_weight is not None and token_weight.dim() == 1 else new(0),
        hidden.new_empty(hidden.shape) if want_hidden else new(0), parameter(weight, want_weight), parameter(bias, want_bias),
        parameter(lora_a, want_lora), parameter(lora_b, want_lora),
    )  # fmt: skip


def head_gradient_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, targets: Tensor,
    sample_ids: Tensor | None, cu_seqlens: Tensor | None, num_samples: int, loss_weight: Tensor | None, token_grad: Tensor | None,
    sample_grad: Tensor | None, wanted: Wanted, options: Options,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Implementation of `lead_kernels::head_gradient`; see there."""
    counted = CountedRows.of(targets, options.ignore_index, options.max_rows)
    nll_weight = token_grad
    if sample_grad is not None:
        bounds = _bounds(sample_ids, cu_seqlens, num_samples, targets.shape[0])
        spread = _spread(sample_grad / counted.before[bounds].diff().clamp(min=1), bounds, targets.shape[0])
        nll_weight = spread if nll_weight is None else nll_weight + spread
    zeros = torch.zeros_like(targets, dtype=wide(hidden.dtype))
    weights = [counted.take(zeros if x is None else x) for x in (loss_weight, nll_weight)]
    # The largest weight is taken out of the products and put back in fp32: weights like 1/T would push fp16 gradients below its range.
    largest = torch.cat([*weights, zeros.new_zeros(1)]).abs().amax()
    largest = torch.where(largest > 0, largest, 1.0)
    out = head_rows(
        left_operand(counted.take(hidden)), _head(weight, bias, lora_a, lora_b, options.lora_scale),
        counted.take(targets, options.ignore_index),
        options.row_loss, wanted, most_rows=options.most_rows(weight, wanted),
        logits_dtype=options.logits_dtype, ignore_index=options.ignore_index, objective_weight_T=weights[0] / largest,
        nll_weight_T=weights[1] / largest, full_rows=targets.shape[0],
    )  # fmt: skip
    gradients = (
        (None if out.loss_grad_TH is None else counted.put(out.loss_grad_TH), hidden), (out.dweight_VH, weight), (out.dbias_V, bias),
        (out.dlora_a_RH, lora_a), (out.dlora_b_VR, lora_b),
    )  # fmt: skip
    return tuple(
        hidden.new_empty(0) if value is None or like is None else scaled(value, largest.view([1] * value.dim()), like.dtype)
        for value, like in gradients
    )


def _spread(values_B: Tensor, bounds: Tensor, rows: int) -> Tensor:
    """The value of every row's sample [T], 0 for rows outside all samples."""
    samples = values_B.shape[0]
    sample_T = torch.searchsorted(bounds, torch.arange(rows, device=values_B.device), right=True) - 1
    inside = (sample_T >= 0) & (sample_T < samples)
    return torch.where(inside, values_B[sample_T.clamp(0, samples - 1)], 0.0)


@torch.library.custom_op("lead_kernels::head_gradient", mutates_args=())
def head_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, targets: Tensor,
    sample_ids: Tensor | None, cu_seqlens: Tensor | None, num_samples: int, loss_weight: Tensor | None, token_grad: Tensor | None,
    sample_grad: Tensor | None, want_hidden: bool, want_weight: bool, want_bias: bool, want_lora: bool, lora_scale: float,
    softcap: float | None, logit_scale: float, label_smoothing: float, z_loss: float, ignore_index: int,
    max_rows: int | None, chunk_bytes: int | None, logits_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients at hidden, weight, bias, lora_a and lora_b, in their dtypes, of

        sum_t loss_weight_t * loss_t + sum_t token_grad_t * NLL_t + sum_i sample_grad_i * (mean NLL of sample i),

    each of loss_weight [T], token_grad [T] and sample_grad [B] where given. Those not wanted are empty. Four products of 2 T V H FLOPs,
    three where the head is frozen.
    """
    options = Options(lora_scale, softcap, logit_scale, label_smoothing, z_loss, ignore_index, max_rows, chunk_bytes, logits_dtype)
    wanted = Wanted(want_hidden, want_weight, want_bias, want_lora)
    return head_gradient_rows(hidden, weight, bias, lora_a, lora_b, targets, sample_ids, cu_seqlens, num_samples, loss_weight, token_grad,
                              sample_grad, wanted, options)  # type: ignore[return-value]  # fmt: skip


@head_gradient.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, targets: Tensor,
      sample_ids: Tensor | None, cu_seqlens: Tensor | None, num_samples: int, loss_weight: Tensor | None, token_grad: Tensor | None,
      sample_grad: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:  # fmt: skip
    wants = (rest[0], rest[1], rest[2], rest[3], rest[3])
    inputs = (hidden, weight, bias, lora_a, lora_b)
    return tuple(x.new_empty(x.shape) if asked and x is not None else hidden.new_empty(0) for x, asked in zip(inputs, wants, strict=True))


class _Slots:
    """Positions of arguments and results of `lead_kernels::head`."""

    PARAMETERS = slice(0, 5)
    TARGETS, SAMPLE_IDS, CU_SEQLENS, NUM_SAMPLES = 5, 6, 7, 8
    WANTS, ROWS_DIFFERENTIABLE, NUMBERS = slice(12, 16), 16, slice(17, None)
    SCALE, ROW_SCALE, GRADIENTS = 4, 6, slice(7, 12)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the backward pass scales and, only where a gradient may arrive at single rows, what it would compute the logits from."""
    ctx.set_materialize_grads(False)
    parameters = inputs[_Slots.PARAMETERS]
    ctx.rows_differentiable = inputs[_Slots.ROWS_DIFFERENTIABLE]
    ctx.wants, ctx.numbers = inputs[_Slots.WANTS], inputs[_Slots.NUMBERS]
    ctx.num_samples, ctx.num_inputs = inputs[_Slots.NUM_SAMPLES], len(inputs)
    ctx.dtypes = [None if x is None else x.dtype for x in parameters]
    again = (*parameters, inputs[_Slots.TARGETS], inputs[_Slots.SAMPLE_IDS], inputs[_Slots.CU_SEQLENS])
    ctx.save_for_backward(
        output[_Slots.SCALE], output[_Slots.ROW_SCALE], *output[_Slots.GRADIENTS], *(again if ctx.rows_differentiable else ())
    )


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    loss_grad, token_grad, sample_grad = upstream[:3]
    scale, row_scale, *saved = ctx.saved_tensors
    if ctx.rows_differentiable and (token_grad is not None or sample_grad is not None or not any(ctx.wants)):
        gradients = _gradients_anew(ctx, loss_grad, token_grad, sample_grad, scale, row_scale, saved[5:])
    elif loss_grad is None:
        gradients = [None] * 5
    else:
        gradients = _gradients_scaled(ctx, loss_grad * scale, row_scale, saved[:5])
    return (*gradients, *[None] * (ctx.num_inputs - 5))


def _gradients_scaled(ctx: Any, factor: Tensor, row_scale: Tensor, computed: list[Tensor]) -> list[Tensor | None]:
    """The gradients of the forward pass, times what was not known then."""
    wants = (ctx.wants[0], ctx.wants[1], ctx.wants[2], ctx.wants[3], ctx.wants[3])
    rows = factor.view(1, 1) if row_scale.numel() == 0 else row_scale[:, None] * factor
    return [
        scaled(value, rows if place == 0 else factor.view([1] * value.dim()), dtype) if asked else None
        for place, (value, dtype, asked) in enumerate(zip(computed, ctx.dtypes, wants, strict=True))
    ]


def _gradients_anew(
    ctx: Any, loss_grad: Tensor | None, token_grad: Tensor | None, sample_grad: Tensor | None, scale: Tensor, row_scale: Tensor,
    saved: list[Tensor],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients with weights per row that only the backward pass knows."""
    *parameters, targets, sample_ids, cu_seqlens = saved
    loss_weight = None
    if loss_grad is not None:
        rows = torch.ones_like(targets, dtype=scale.dtype) if row_scale.numel() == 0 else row_scale
        loss_weight = rows * (loss_grad * scale)
    needed = ctx.needs_input_grad
    wants = (needed[0], needed[1], needed[2], needed[3] or needed[4])
    computed = head_gradient(*parameters, targets, sample_ids, cu_seqlens, ctx.num_samples, loss_weight, token_grad, sample_grad, *wants,
                             *ctx.numbers)  # fmt: skip
    return [value if asked else None for value, asked in zip(computed, needed[:5], strict=True)]


head.register_autograd(_backward, setup_context=_setup_context)
