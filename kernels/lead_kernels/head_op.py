"""The two custom operators behind `linear_cross_entropy`, and how autograd joins them.

`lead_kernels::head` computes the losses and, where `loss` is to be differentiated, its gradients up to the factor that
arrives from upstream: three products in all, two where the head is frozen. `lead_kernels::head_gradient` computes
gradients from the logits anew, for upstream gradients at single rows or samples, of which nothing is known before.

A row's weight w = m 2^k, 1 <= |m| < 2: in bf16 and fp16 its mantissa m goes into the row's gradient at the logits, in
fp32 before that is rounded, and 2^k, which rounds nothing, where it costs least: to the rows of h, or to the results.
A weight that scaled what is rounded already would round it once more. fp32 and float64 take the whole weight there.

Legend: T rows, H hidden size, V vocabulary, B samples, R rank, q sketch width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lead_kernels.backend import uses_kernels
from lead_kernels.counted_rows import CountedRows, check_targets, sample_bounds
from lead_kernels.gradient_signature import signature_from_bounds
from lead_kernels.head_call import HeadCall, HeadResult, or_empty, schema, tensors
from lead_kernels.head_chunks import HeadRows, RowStatistics, head_rows, narrow_sums
from lead_kernels.products import HALVES, left_operand, scaled, wide
from lead_kernels.segment_reduce import segment_sum


def mantissa(weight: Tensor) -> Tensor:
    """m of weight = m 2^k, 1 <= |m| < 2; 1 for 0, infinity and NaN. weight / m is exact."""
    m = 2 * torch.frexp(weight).mantissa
    return torch.where(m.isfinite() & (m != 0), m, 1.0)


def _power(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What of a weight is left for later: see above."""
    return weight / mantissa(weight) if dtype in HALVES else weight


def _largest_power(weights: Tensor) -> Tensor:
    """The power of two in the largest weight, 1 where all are 0. Out of the products, it keeps small ones in fp16's
    range."""
    largest = torch.cat([weights.flatten(), weights.new_zeros(1)]).abs().amax()
    largest = largest / mantissa(largest)
    return torch.where(largest > 0, largest, 1.0)


def _classes(call: HeadCall) -> Tensor | None:
    """Weights of the classes, then their sum."""
    if call.class_weight is None:
        return None
    weight = call.class_weight.to(wide(call.hidden.dtype))
    return torch.cat([weight, weight.sum()[None]])


def _factors(call: HeadCall, counted: CountedRows, classes: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The token weights as a 0-d factor and, where they differ between rows, a factor [T]."""
    token_weight, dtype = call.token_weight, wide(call.hidden.dtype)
    if token_weight is None and classes is None:
        return 1.0 / counted.before[-1].clamp(min=1).to(dtype), None
    if token_weight is None and classes is not None:
        inside = counted.valid_T & (call.targets >= 0) & (call.targets < classes.shape[0] - 1)
        total = torch.where(inside, classes[torch.where(inside, call.targets, 0)], 0.0).sum()
        return torch.where(total != 0, 1.0 / total, 0.0), None
    assert token_weight is not None
    if token_weight.dim() == 0:
        return token_weight.to(dtype, copy=True), None
    rows_T = token_weight.to(dtype, copy=True)
    if call.hidden.dtype not in HALVES:
        return torch.ones((), dtype=dtype, device=rows_T.device), rows_T
    scale = _largest_power(torch.where(counted.valid_T, rows_T, 0.0))
    return scale, rows_T / scale


def head_forward(call: HeadCall) -> HeadResult:
    """Implementation of `lead_kernels::head`; see there."""
    hidden, wanted = call.hidden, call.wanted
    counted = CountedRows.of(call.targets, call.ignore_index, call.max_rows)
    bounds, counts_B = None, counted.before.new_empty(0)
    if call.num_samples:
        bounds = sample_bounds(call.sample_ids, call.cu_seqlens, call.num_samples, call.targets.shape[0])
        counts_B = counted.before[bounds].diff()
    classes = _classes(call)
    h_TH, y_T = left_operand(counted.take(hidden)), counted.take(call.targets, call.ignore_index)
    kernels = uses_kernels(call.targets)
    check_targets(torch.where(y_T == call.ignore_index, 0, y_T) if kernels else y_T, call.weight.shape[0])
    scale, row_scale_T = _factors(call, counted, classes)
    taken_scale = None if row_scale_T is None else counted.take(row_scale_T)
    mantissa_T, rest_T = None, taken_scale
    if wanted.any and hidden.dtype in HALVES:
        mantissa_T = mantissa(scale).expand(y_T.shape[0]).contiguous() if taken_scale is None else mantissa(taken_scale)
        rest_T = None if taken_scale is None else taken_scale / mantissa_T

    out = head_rows(
        h_TH, call.head, y_T, call.row_loss, wanted, most_rows=call.most_rows, logits_dtype=call.logits_dtype,
        ignore_index=call.ignore_index, row_scale_T=rest_T, objective_weight_T=mantissa_T,
        full_rows=call.targets.shape[0], class_weight=classes,
        statistics=RowStatistics(call.want_lse, call.want_entropy, call.want_predicted),
    )  # fmt: skip
    # A row of weight 0 has no part in the loss, also where its NLL is infinite.
    weighted = out.objective_T
    if taken_scale is not None:
        weighted = torch.where(taken_scale != 0, taken_scale * out.objective_T, 0.0)
    nll_T = counted.put(out.nll_T)
    phi = None
    if bounds is not None and call.left is not None and call.right is not None:
        assert out.nll_grad_TH is not None
        weight_T = mantissa_T if out.nll_grad_TH is out.loss_grad_TH else None
        bounds_taken = counted.bounds(bounds)
        phi = signature_from_bounds(h_TH, out.nll_grad_TH, call.left, call.right, bounds_taken, counts_B, weight_T)
    optional = (
        phi, None if taken_scale is None else counted.put(taken_scale),  # 0 in ignored rows, whatever they were given
        counted.put(out.loss_grad_TH) if wanted.hidden and out.loss_grad_TH is not None else None,
        out.dweight_VH, out.dbias_V, out.dlora_a_RH, out.dlora_b_VR, *_optional_rows(call, out, counted),
    )  # fmt: skip
    sample_nll = nll_T.new_empty(0) if bounds is None else segment_sum(nll_T, bounds) / counts_B.clamp(min=1)
    loss = scale * weighted.sum()
    return HeadResult(loss, nll_T, sample_nll, counts_B, scale, *(or_empty(x, nll_T) for x in optional))


def _optional_rows(call: HeadCall, out: HeadRows, counted: CountedRows) -> list[Tensor | None]:
    """Results per row that were asked for; -1 is predicted where a row is ignored."""
    rows = out.objective_T if call.want_rows else None
    # An operator's results are tensors of their own, also where the row's loss is its NLL.
    rows = None if rows is None else counted.put(rows).clone()
    lse, entropy = (None if x is None else counted.put(x) for x in (out.lse_T, out.entropy_T))
    predicted = None if out.predicted_T is None else torch.where(counted.valid_T, counted.put(out.predicted_T), -1)
    return [rows, lse, entropy, predicted]


def _head(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(head_forward(HeadCall(*arguments)))  # a plain tuple, as the schema says


head = torch.library.custom_op(
    "lead_kernels::head", _head, mutates_args=(), schema=schema(len(HeadResult._fields))
)  # fmt: skip
"""`HeadCall` -> `HeadResult`. want_...: the gradients and rows to compute; rows_differentiable: autograd joins
token_nll, sample_nll and row_loss too."""


@head.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call = HeadCall(*arguments)
    hidden, sums, samples, rows = call.hidden, wide(call.hidden.dtype), call.num_samples, call.hidden.shape[0]
    narrow = narrow_sums(rows, call.most_rows, hidden.dtype)

    def new(*shape: int, dtype: torch.dtype = sums) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    def parameter(tensor: Tensor | None, asked: bool) -> Tensor:
        return new(*tensor.shape, dtype=tensor.dtype if narrow else sums) if asked and tensor is not None else new(0)

    by_row = call.token_weight is not None and call.token_weight.dim() == 1
    return HeadResult(
        new(), new(rows), new(samples), new(samples, dtype=torch.int64), new(),
        new(0) if call.left is None or call.right is None else new(samples, call.left.shape[1], call.right.shape[1]),
        new(rows) if by_row else new(0), new(*hidden.shape, dtype=hidden.dtype) if call.want_hidden else new(0),
        *(parameter(x, asked) for x, asked in zip(call.parameters[1:], call.wants[1:], strict=True)),
        *(new(rows) if asked else new(0) for asked in (call.want_rows, call.want_lse, call.want_entropy)),
        new(rows, dtype=torch.int64) if call.want_predicted else new(0),
    )  # fmt: skip


def head_gradient_rows(
    call: HeadCall, loss_weight: Tensor | None, token_grad: Tensor | None, sample_grad: Tensor | None
) -> tuple[Tensor, ...]:
    """Implementation of `lead_kernels::head_gradient`; see there."""
    targets, hidden = call.targets, call.hidden
    counted = CountedRows.of(targets, call.ignore_index, call.max_rows)
    nll_weight = token_grad
    if sample_grad is not None and call.num_samples:
        bounds = sample_bounds(call.sample_ids, call.cu_seqlens, call.num_samples, targets.shape[0])
        spread = _spread(sample_grad / counted.before[bounds].diff().clamp(min=1), bounds, targets.shape[0])
        nll_weight = spread if nll_weight is None else nll_weight + spread
    zeros = torch.zeros_like(targets, dtype=wide(hidden.dtype))
    weights = [counted.take(zeros if x is None else x) for x in (loss_weight, nll_weight)]
    largest = _largest_power(torch.cat(weights))
    out = head_rows(
        left_operand(counted.take(hidden)), call.head, counted.take(targets, call.ignore_index), call.row_loss,
        call.wanted, most_rows=call.most_rows, logits_dtype=call.logits_dtype, ignore_index=call.ignore_index,
        objective_weight_T=weights[0] / largest, nll_weight_T=weights[1] / largest, full_rows=targets.shape[0],
        class_weight=_classes(call),
    )  # fmt: skip
    hidden_grad = None if out.loss_grad_TH is None else counted.put(out.loss_grad_TH)
    gradients = (hidden_grad, out.dweight_VH, out.dbias_V, out.dlora_a_RH, out.dlora_b_VR)
    both = zip(gradients, call.parameters, strict=True)
    return tuple(
        hidden.new_empty(0) if x is None or like is None else scaled(x, largest.view([1] * x.dim()), like.dtype)
        for x, like in both
    )


def _spread(values_B: Tensor, bounds: Tensor, rows: int) -> Tensor:
    """The value of every row's sample [T], 0 for rows outside all samples."""
    samples = values_B.shape[0]
    sample_T = torch.searchsorted(bounds, torch.arange(rows, device=values_B.device), right=True) - 1
    inside = (sample_T >= 0) & (sample_T < samples)
    return torch.where(inside, values_B[sample_T.clamp(0, samples - 1)], 0.0)


UPSTREAM = ("loss_weight", "token_grad", "sample_grad")


def _head_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    fields = len(HeadCall._fields)
    return head_gradient_rows(HeadCall(*arguments[:fields]), *arguments[fields:])


head_gradient = torch.library.custom_op(
    "lead_kernels::head_gradient", _head_gradient, mutates_args=(), schema=schema(5, *UPSTREAM)
)  # fmt: skip
"""Gradients at hidden, weight, bias, lora_a and lora_b of a `HeadCall`, in their dtypes, of

    sum_t loss_weight_t * loss_t + sum_t token_grad_t * NLL_t + sum_i sample_grad_i * (mean NLL of sample i),

each of loss_weight [T], token_grad [T] and sample_grad [B] where given. Those not wanted are empty. Four products of
2 T V H FLOPs, three where the head is frozen.
"""


@head_gradient.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call = HeadCall(*arguments[: len(HeadCall._fields)])
    asked = zip(call.parameters, call.wants, strict=True)
    return tuple(x.new_empty(x.shape) if want and x is not None else call.hidden.new_empty(0) for x, want in asked)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the backward pass scales and, only where gradients may arrive at single rows, what gives the logits
    anew."""
    ctx.set_materialize_grads(False)
    call, result = HeadCall(*inputs), HeadResult(*output)
    again = tensors(call._replace(token_weight=None, left=None, right=None)) if call.rows_differentiable else ()
    ctx.numbers = inputs[len(tensors(call)) :]
    ctx.rows_differentiable, ctx.wants, ctx.num_inputs = call.rows_differentiable, call.wants, len(inputs)
    ctx.dtypes = [None if x is None else x.dtype for x in call.parameters]
    ctx.save_for_backward(result.scale, result.row_scale, *result.gradients, *again)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "linear_cross_entropy is differentiable once, and create_graph=True (hessian, gradient penalty) asks for "
            "twice: take torch.nn.functional.cross_entropy on hidden @ weight.T for that"
        )
    given = HeadResult(*upstream)
    scale, row_scale, *saved = ctx.saved_tensors
    at_rows = (given.token_nll, given.sample_nll, given.row_loss)
    if ctx.rows_differentiable and (any(x is not None for x in at_rows) or not any(ctx.wants)):
        gradients = _gradients_anew(ctx, given, scale, row_scale, saved[5:])
    elif given.loss is None:
        gradients = [None] * 5
    else:
        gradients = _gradients_scaled(ctx, given.loss, scale, row_scale, saved[:5])
    return (*gradients, *[None] * (ctx.num_inputs - 5))


def _gradients_scaled(
    ctx: Any, loss_grad: Tensor, scale: Tensor, row_scale: Tensor, computed: list[Tensor]
) -> list[Tensor | None]:
    """The gradients of the forward pass, times what was not known then and what the row pass left."""
    dtype = ctx.dtypes[0]
    factor = loss_grad * _power(scale, dtype)
    rows = factor.view(1, 1) if row_scale.numel() == 0 else _power(row_scale, dtype)[:, None] * factor
    return [
        scaled(value, rows if place == 0 else factor.view([1] * value.dim()), dtype) if asked else None
        for place, (value, dtype, asked) in enumerate(zip(computed, ctx.dtypes, ctx.wants, strict=True))
    ]


def _gradients_anew(
    ctx: Any, given: HeadResult, scale: Tensor, row_scale: Tensor, saved: list[Tensor | None]
) -> list[Tensor | None]:
    """Gradients with weights per row that only the backward pass knows."""
    call, loss_weight = HeadCall(*saved, *ctx.numbers), given.row_loss
    if given.loss is not None:
        rows = torch.ones_like(call.targets, dtype=scale.dtype) if row_scale.numel() == 0 else row_scale
        rows = rows * (given.loss * scale)
        loss_weight = rows if loss_weight is None else loss_weight + rows
    hidden, weight, bias, lora_a, lora_b = needed = ctx.needs_input_grad[:5]
    call = call._replace(
        want_hidden=hidden, want_weight=weight, want_bias=bias, want_lora=lora_a or lora_b, rows_differentiable=False
    )
    computed = head_gradient(*call, loss_weight, given.token_nll, given.sample_nll)
    return [value if asked else None for value, asked in zip(computed, needed, strict=True)]


head.register_autograd(_backward, setup_context=_setup_context)
