"""The two custom operators behind `linear_cross_entropy`, and how autograd joins them.

`lead_kernels::head` computes the losses and, where `loss` is to be differentiated, its gradients up to the factor that
arrives from upstream: three products in all, two where the head is frozen. `lead_kernels::head_gradient` computes
gradients from the logits anew, for upstream gradients at single rows or samples, of which nothing is known before.

Legend: T rows, H hidden size, V vocabulary, B samples, R rank, q sketch width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lead_kernels.chunk_size import narrow_sums
from lead_kernels.dtypes import wide
from lead_kernels.head_call import HeadCall, HeadOptions, HeadResult, HeadTensors, Upstream, schema
from lead_kernels.head_compute import head_forward, head_gradient_rows
from lead_kernels.products import scaled
from lead_kernels.row_weights import left_for_later

CALL_ARGUMENTS = len(HeadTensors._fields) + len(HeadOptions._fields)
PARAMETERS = 5
"""Tensors at which a gradient may be asked for: `HeadTensors.parameters`."""


def _head(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(head_forward(HeadCall.from_flat(arguments)))  # a plain tuple, as the schema says


head = torch.library.custom_op(
    "lead_kernels::head", _head, mutates_args=(), schema=schema(len(HeadResult._fields), HeadTensors, HeadOptions)
)
"""The fields of a `HeadCall` -> those of a `HeadResult`. `run_head` calls it with structs."""


def run_head(tensors: HeadTensors, options: HeadOptions) -> HeadResult:
    return HeadResult(*head(*tensors, *options))


@head.register_fake
def _head_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    call = HeadCall.from_flat(arguments)
    tensors, options = call
    hidden, sums, rows = tensors.hidden, wide(tensors.hidden.dtype), tensors.hidden.shape[0]
    narrow = narrow_sums(rows, call.most_rows, hidden.dtype)

    def new(*shape: int, dtype: torch.dtype = sums) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    def by_row(asked: bool, dtype: torch.dtype = sums) -> Tensor:
        return new(rows, dtype=dtype) if asked else new(0)

    def parameter(tensor: Tensor | None, asked: bool) -> Tensor:
        if tensor is None or not asked:
            return new(0)
        return new(*tensor.shape, dtype=tensor.dtype if narrow else sums)

    signature = new(0)
    if tensors.left is not None and tensors.right is not None:
        signature = new(options.num_samples, tensors.left.shape[1], tensors.right.shape[1])
    return tuple(
        HeadResult(
            loss=new(),
            token_nll=new(rows),
            sample_nll=new(options.num_samples),
            sample_tokens=new(options.num_samples, dtype=torch.int64),
            scale=new(),
            signature=signature,
            row_scale=by_row(tensors.token_weight is not None and tensors.token_weight.dim() == 1),
            loss_grad=new(*hidden.shape, dtype=hidden.dtype) if options.want_hidden else new(0),
            dweight=parameter(tensors.weight, options.want_weight),
            dbias=parameter(tensors.bias, options.want_bias),
            dlora_a=parameter(tensors.lora_a, options.want_lora),
            dlora_b=parameter(tensors.lora_b, options.want_lora),
            row_loss=by_row(options.want_rows),
            lse=by_row(options.want_lse),
            entropy=by_row(options.want_entropy),
            predicted=by_row(options.want_predicted, torch.int64),
        )
    )


def _split(arguments: tuple[Any, ...]) -> tuple[HeadCall, Upstream]:
    return HeadCall.from_flat(arguments[:CALL_ARGUMENTS]), Upstream._make(arguments[CALL_ARGUMENTS:])


def _head_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(head_gradient_rows(*_split(arguments)))


head_gradient = torch.library.custom_op(
    "lead_kernels::head_gradient",
    _head_gradient,
    mutates_args=(),
    schema=schema(PARAMETERS, HeadTensors, HeadOptions, Upstream),
)
"""Gradients at hidden, weight, bias, lora_a and lora_b of a `HeadCall`, in their dtypes, of

    sum_t loss_weight_t * loss_t + sum_t token_grad_t * NLL_t + sum_i sample_grad_i * (mean NLL of sample i),

each of loss_weight [T], token_grad [T] and sample_grad [B] where given. Those not wanted are empty. Four products of
2 T V H FLOPs, three where the head is frozen.
"""


@head_gradient.register_fake
def _head_gradient_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    (tensors, options), _ = _split(arguments)
    return tuple(
        tensors.hidden.new_empty(0) if parameter is None or not want else parameter.new_empty(parameter.shape)
        for parameter, want in zip(tensors.parameters, options.wants, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what the backward pass scales and, where gradients may arrive at single rows, what gives the logits anew."""
    ctx.set_materialize_grads(False)
    call, result = HeadCall.from_flat(inputs), HeadResult(*output)
    ctx.options = call.options
    ctx.dtypes = [None if x is None else x.dtype for x in call.tensors.parameters]
    again: tuple[Tensor | None, ...] = ()
    if call.options.rows_differentiable:
        # The weights of the rows arrive with the upstream gradients, and a signature has none.
        again = call.tensors._replace(token_weight=None, left=None, right=None)
    ctx.save_for_backward(result.scale, result.row_scale, *result.gradients, *again)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "linear_cross_entropy is differentiable once, and create_graph=True (hessian, gradient penalty) asks for "
            "twice: take torch.nn.functional.cross_entropy on hidden @ weight.T for that"
        )
    given = dict(zip(HeadResult._fields, upstream, strict=True))
    scale, row_scale, *saved = ctx.saved_tensors
    computed, again = saved[:PARAMETERS], saved[PARAMETERS:]
    at_rows = any(given[name] is not None for name in ("token_nll", "sample_nll", "row_loss"))
    none_computed = not any(ctx.options.wants)
    if ctx.options.rows_differentiable and (at_rows or none_computed):
        call = HeadCall(HeadTensors(*again), ctx.options)
        rows_T = _loss_weight(given["loss"], given["row_loss"], scale, row_scale, call.tensors.targets)
        weights = Upstream(rows_T, given["token_nll"], given["sample_nll"])
        gradients = _gradients_anew(call, weights, ctx.needs_input_grad[:PARAMETERS])
    elif given["loss"] is None:
        gradients = [None] * PARAMETERS
    else:
        gradients = _gradients_scaled(ctx, given["loss"], scale, row_scale, computed)
    return (*gradients, *[None] * (CALL_ARGUMENTS - PARAMETERS))


def _gradients_scaled(
    ctx: Any, loss_grad: Tensor, scale: Tensor, row_scale: Tensor, computed: list[Tensor]
) -> list[Tensor | None]:
    """The gradients of the forward pass, times what was not known then and what the row pass left."""
    operands = ctx.dtypes[0]
    factor = loss_grad * left_for_later(scale, operands)
    gradients: list[Tensor | None] = []
    for place, (gradient, dtype, asked) in enumerate(zip(computed, ctx.dtypes, ctx.options.wants, strict=True)):
        if not asked:
            gradients.append(None)
            continue
        by = factor.view([1] * gradient.dim())
        if place == 0 and row_scale.numel() > 0:  # the parameters' gradients hold the rows' scale already
            by = left_for_later(row_scale, operands)[:, None] * factor
        gradients.append(scaled(gradient, by, dtype))
    return gradients


def _loss_weight(
    loss_grad: Tensor | None, row_grad: Tensor | None, scale: Tensor, row_scale: Tensor, targets: Tensor
) -> Tensor | None:
    """Weights of the rows' losses: what arrives at them, and the share of each in what arrives at the loss."""
    if loss_grad is None:
        return row_grad
    share_T = torch.ones_like(targets, dtype=scale.dtype) if row_scale.numel() == 0 else row_scale
    share_T = share_T * (loss_grad * scale)
    return share_T if row_grad is None else row_grad + share_T


def _gradients_anew(call: HeadCall, upstream: Upstream, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients with weights per row that only the backward pass knows."""
    hidden, weight, bias, lora_a, lora_b = needed
    options = call.options._replace(
        want_hidden=hidden,
        want_weight=weight,
        want_bias=bias,
        want_lora=lora_a or lora_b,
        rows_differentiable=False,
    )
    computed = head_gradient(*call.tensors, *options, *upstream)
    return [gradient if asked else None for gradient, asked in zip(computed, needed, strict=True)]


head.register_autograd(_backward, setup_context=_setup_context)
