"""What the operators behind `linear_cross_entropy` compute.

Legend: T rows, H hidden size, V vocabulary, B samples, R rank, q sketch width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lead_kernels.backend import uses_kernels
from lead_kernels.counted_rows import CountedRows, check_targets, sample_bounds
from lead_kernels.dtypes import wide
from lead_kernels.gradient_signature import signature_from_bounds
from lead_kernels.head_call import HeadCall, HeadResult, Upstream
from lead_kernels.head_chunks import head_rows
from lead_kernels.head_types import HeadRows, RowInputs
from lead_kernels.products import left_operand, scaled
from lead_kernels.row_weights import RowWeights, class_weights, largest_power
from lead_kernels.segment_reduce import segment_sum


def head_forward(call: HeadCall) -> HeadResult:
    """Implementation of `lead_kernels::head`; see there."""
    tensors, options = call
    counted = CountedRows.of(tensors.targets, options.ignore_index, options.max_rows)
    bounds, counts_B = _samples(call, counted)
    classes = class_weights(call)
    h_TH = left_operand(counted.take(tensors.hidden))
    y_T = counted.take(tensors.targets, options.ignore_index)
    _check_targets(y_T, call)
    weights = RowWeights.of(call, counted, classes, y_T.shape[0])
    inputs = RowInputs(h_TH, y_T, row_scale_T=weights.at_rows_T, objective_weight_T=weights.at_logits_T)
    out = head_rows(inputs, call.head, classes, call.pass_options)

    nll_T = counted.put(out.nll_T)

    def or_empty(tensor: Tensor | None) -> Tensor:  # operators return tensors only
        return nll_T.new_empty(0) if tensor is None else tensor

    def put(rows: Tensor | None) -> Tensor:
        return or_empty(None if rows is None else counted.put(rows))

    return HeadResult(
        loss=weights.total(out.objective_T),
        token_nll=nll_T,
        sample_nll=nll_T.new_empty(0) if bounds is None else segment_sum(nll_T, bounds) / counts_B.clamp(min=1),
        sample_tokens=counts_B,
        scale=weights.scale,
        signature=or_empty(_signature(call, out, h_TH, counted, bounds, counts_B, weights)),
        row_scale=put(weights.row_scale_T),  # 0 in ignored rows, whatever weight they were given
        loss_grad=put(out.loss_grad_TH if options.want_hidden else None),
        dweight=or_empty(out.dweight_VH),
        dbias=or_empty(out.dbias_V),
        dlora_a=or_empty(out.dlora_a_RH),
        dlora_b=or_empty(out.dlora_b_VR),
        # An operator's results must not share memory, and a row's loss may be its NLL.
        row_loss=put(out.objective_T).clone() if options.want_rows else or_empty(None),
        lse=put(out.lse_T),
        entropy=put(out.entropy_T),
        predicted=or_empty(_predicted(out, counted)),
    )


def _samples(call: HeadCall, counted: CountedRows) -> tuple[Tensor | None, Tensor]:
    """First rows of the samples [B + 1], and counted rows of each [B]."""
    tensors, options = call
    if not options.num_samples:
        return None, counted.before.new_empty(0)
    rows = tensors.targets.shape[0]
    bounds = sample_bounds(tensors.sample_ids, tensors.cu_seqlens, options.num_samples, rows)
    return bounds, counted.before[bounds].diff()


def _check_targets(y_T: Tensor, call: HeadCall) -> None:
    if uses_kernels(y_T):  # ignored rows are still among these
        y_T = torch.where(y_T == call.options.ignore_index, 0, y_T)
    check_targets(y_T, call.tensors.weight.shape[0])


def _signature(
    call: HeadCall,
    out: HeadRows,
    h_TH: Tensor,
    counted: CountedRows,
    bounds: Tensor | None,
    counts_B: Tensor,
    weights: RowWeights,
) -> Tensor | None:
    left, right = call.tensors.left, call.tensors.right
    if bounds is None or left is None or right is None:
        return None
    assert out.nll_grad_TH is not None
    # Where one gradient serves both purposes it holds the rows' weights, and the signature takes them out again.
    weight_T = weights.at_logits_T if out.nll_grad_TH is out.loss_grad_TH else None
    return signature_from_bounds(h_TH, out.nll_grad_TH, left, right, counted.bounds(bounds), counts_B, weight_T)


def _predicted(out: HeadRows, counted: CountedRows) -> Tensor | None:
    """-1 where a row is ignored."""
    if out.predicted_T is None:
        return None
    return torch.where(counted.valid_T, counted.put(out.predicted_T), -1)


def head_gradient_rows(call: HeadCall, upstream: Upstream) -> list[Tensor]:
    """Implementation of `lead_kernels::head_gradient`; see there."""
    tensors, options = call
    counted = CountedRows.of(tensors.targets, options.ignore_index, options.max_rows)
    zeros_T = torch.zeros_like(tensors.targets, dtype=wide(tensors.hidden.dtype))
    nll_weight_T = _nll_weight(call, counted, upstream)
    loss_weight_T = counted.take(zeros_T if upstream.loss_weight is None else upstream.loss_weight)
    nll_weight_T = counted.take(zeros_T if nll_weight_T is None else nll_weight_T)
    # Out of the rows and into the results: rounded to fp16, gradients of rows with small weights would be lost.
    largest = largest_power(torch.cat([loss_weight_T, nll_weight_T]))
    inputs = RowInputs(
        hidden_TH=left_operand(counted.take(tensors.hidden)),
        targets_T=counted.take(tensors.targets, options.ignore_index),
        objective_weight_T=loss_weight_T / largest,
        nll_weight_T=nll_weight_T / largest,
    )
    out = head_rows(inputs, call.head, class_weights(call), call.pass_options)
    hidden_grad = None if out.loss_grad_TH is None else counted.put(out.loss_grad_TH)
    gradients = (hidden_grad, out.dweight_VH, out.dbias_V, out.dlora_a_RH, out.dlora_b_VR)
    results = []
    for gradient, parameter in zip(gradients, tensors.parameters, strict=True):
        if gradient is None or parameter is None:
            results.append(tensors.hidden.new_empty(0))
        else:
            results.append(scaled(gradient, largest.view([1] * gradient.dim()), parameter.dtype))
    return results


def _nll_weight(call: HeadCall, counted: CountedRows, upstream: Upstream) -> Tensor | None:
    """Weights of the rows' NLLs [T]: what arrives at the rows, and each row's share of what arrives at its sample."""
    if upstream.sample_grad is None:
        return upstream.token_grad
    bounds, counts_B = _samples(call, counted)
    if bounds is None:
        return upstream.token_grad
    share_T = _spread(upstream.sample_grad / counts_B.clamp(min=1), bounds, call.tensors.targets.shape[0])
    return share_T if upstream.token_grad is None else upstream.token_grad + share_T


def _spread(values_B: Tensor, bounds: Tensor, rows: int) -> Tensor:
    """The value of every row's sample [T], 0 for rows outside all samples."""
    samples = values_B.shape[0]
    sample_T = torch.searchsorted(bounds, torch.arange(rows, device=values_B.device), right=True) - 1
    inside = (sample_T >= 0) & (sample_T < samples)
    return torch.where(inside, values_B[sample_T.clamp(0, samples - 1)], 0.0)
