"""The LM head and its cross-entropy as one operator that never holds a [T, V] tensor beyond one chunk of rows.

Legend: T rows, H hidden size, V vocabulary, B samples, R rank, q sketch width; e_t the gradient of row t's NLL at its
hidden state.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lead_kernels import head_checks as checks
from lead_kernels.checks import without_autocast
from lead_kernels.dtypes import wide
from lead_kernels.head_call import HeadOptions, HeadResult, HeadTensors
from lead_kernels.head_op import run_head
from lead_kernels.head_types import Lora

Gradients = Literal["auto", "forward", "recompute"]
Reduction = Literal["mean", "sum", "none"]


class HeadLoss(NamedTuple):
    """What the head returns. T stands for the shape of targets, [...]."""

    loss: Tensor
    """fp32, 0-d: sum of token_weight times the row's loss (NLL, with smoothing, z-loss, class weights where asked for).
    [T] with reduction "none": those products themselves, 0 where ignored. `float(out.loss)` is the number."""
    token_nll: Tensor
    """fp32 [T]: the plain negative log-likelihood of every row, without any of these; 0 where ignored."""
    sample_nll: Tensor
    """fp32 [B]: mean of token_nll over the sample's counted rows; 0 where it has none."""
    sample_tokens: Tensor
    """int64 [B]: counted rows of each sample. Both are [0] where no samples were given."""
    signature: Tensor | None
    """fp32 [B, q, q] or None."""
    lse: Tensor | None = None
    """fp32 [T], with return_lse: log sum exp of a row's logits; 0 where ignored."""
    entropy: Tensor | None = None
    """fp32 [T], with return_entropy: entropy of a row's prediction, in nats; 0 where ignored."""
    predicted: Tensor | None = None
    """int64 [T], with return_predicted: the first of the largest logits; -1 where ignored."""
    token_accuracy: Tensor | None = None
    """fp32, 0-d, with return_predicted: the share of counted rows whose target is predicted; 0 where none counts."""


def _autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None
) -> tuple[Tensor, Tensor, Tensor | None, Lora | None]:
    """The operands as `torch.nn.Linear` would take them: inside `torch.autocast`, in its dtype."""
    device = hidden.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return hidden, weight, bias, lora
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        exempt = tensor.dtype == torch.float64 or not tensor.is_floating_point()  # as autocast itself has it
        return tensor if exempt else tensor.to(dtype)

    if bias is not None:
        bias = cast(bias)
    if lora is not None:
        lora = Lora(cast(lora.a), cast(lora.b), lora.scale)
    return cast(hidden), cast(weight), bias, lora


def _next_targets(targets: Tensor, sample_ids: Tensor | None, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """Each row's target is the next one along the last dimension; `ignore_index` at its end and at a sample's."""
    if targets.shape[-1] == 0:
        return targets
    moved = torch.nn.functional.pad(targets[..., 1:], (0, 1), value=ignore_index)
    # The last row of a sample would predict the first of the next.
    if sample_ids is not None:
        inner = sample_ids[..., 1:] == sample_ids[..., :-1]
        moved = torch.where(torch.nn.functional.pad(inner, (0, 1), value=True), moved, ignore_index)
    if cu_seqlens is not None:
        rows = targets.numel()
        first = torch.zeros(rows + 1, dtype=torch.bool, device=targets.device)
        first = first.scatter(0, cu_seqlens.long().clamp(0, rows), True)
        moved = torch.where(first[1:].view(targets.shape), ignore_index, moved)
    return moved


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    sample_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_samples: int | None = None,
    token_weight: Tensor | float | None = None,
    class_weight: Tensor | None = None,
    signature: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    shift: bool = False,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_predicted: bool = False,
    gradients: Gradients = "auto",
    max_rows: int | None = None,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> HeadLoss:
    """Cross-entropy of an LM head, from hidden states and weight, without logits beyond one chunk of rows.

    `linear_cross_entropy(hidden, weight, targets).loss` is the mean over the targets that are not `ignore_index`. The
    logits are z = softcap(logit_scale * (hidden @ weight.T + bias)), and

        loss = sum_t token_weight_t * ((1 - s) NLL_t + s (lse_t - mean_j z_tj) + z_loss * lse_t^2),

    where s is the label_smoothing and lse_t = log sum_j exp z_tj. Differentiable once, in reverse mode, with respect to
    hidden, weight, bias and lora, each where it requires a gradient.

    Args:
        hidden: [..., H], in bf16, fp16 or fp32 (float64 for tests). Inside `torch.autocast`, hidden, weight, bias and
            lora are cast to its dtype.
        weight: [V, H], in hidden's dtype.
        targets: integers [...], each `ignore_index` or in [0, V).
        sample_ids: int64 or int32 [...], the sample of each row: non-decreasing, in [0, num_samples).
        cu_seqlens: instead of sample_ids, the samples' first rows and then the end: integers [>= num_samples + 1].
            Without either, nothing is computed per sample.
        num_samples: number of samples; with cu_seqlens, by default all of them.
        token_weight: a float, or floats 0-d or [...]. By default what `reduction` says.
        class_weight: floats [V], c_j. A row's loss is then (1 - s) c_y NLL_t + s/V sum_j c_j (lse_t - z_tj), as in
            `torch.nn.functional.cross_entropy`.
        signature: (P, Q), each [H, q]: also compute phi_i = (1/n_i) sum_t (P^T e_t)(Q^T h_t)^T over the counted rows of
            sample i, where e_t is the gradient of row t's plain NLL at its hidden state, whatever its weight. Costs two
            thin products; where e_t differs from the loss's gradient (smoothing, z-loss, class weights), one more
            V x H product and a second chunk of logits.
        bias: [V].
        lora: (a [R, H], b [V, R], scale): the weight is W + scale * b a, which is never built.
        softcap: c, for c tanh(x / c).
        logit_scale, label_smoothing, z_loss, ignore_index: see above.
        reduction: the default token_weight. "mean": 1 / counted rows, or 1 / the sum of their targets' class weights.
            "sum": 1. "none": 1, and `loss` is [...], a loss per row.
        shift: targets are labels as in Hugging Face, of the same positions as hidden: each position predicts the next
            target. The last position of the last dimension, and of each sample, predicts nothing.
        return_lse, return_entropy, return_predicted: results per row without gradients, which need no further product;
            see `HeadLoss`.
        gradients: when gradients are computed.
            "forward": those of `loss` together with it, chunk by chunk; the backward pass scales them. 3 products of
            2 T V H FLOPs, 2 where the weight is frozen. token_nll and sample_nll have none. Not with reduction "none".
            "recompute": in the backward pass, from logits computed again (4 products), for any upstream gradients at
            loss, token_nll and sample_nll.
            "auto": like "forward" as long as a gradient arrives at loss alone, else like "recompute"; keeps hidden for
            that. In a function compiled by torch.compile, every result that it returns counts as having an upstream
            gradient: use "forward" there, or detach the others.
        max_rows: the most targets that can count. On a GPU their number is otherwise read from the device, since
            ignored rows are left out of the products; with max_rows nothing waits, and that many rows are computed.
        chunk_bytes: the most memory for a chunk of logits. By default 64 MiB on a CPU; on a GPU 1/32 of its memory
            within 1 and 4 GiB, and at least 2048 rows.
        logits_dtype: by default the inputs', as in unfused PyTorch. torch.float32 keeps the products' accumulator, at
            twice the bytes.

    Memory beside inputs and gradients: one chunk of logits and, with several chunks or in fp16, the weight's gradient
    in fp32. Numerics: gradients at the logits are formed in fp32, with weights of rows and one-hot applied before
    rounding; the weight's gradient is added up in fp32. In bf16 and fp16 an upstream scalar that is not a power of two
    rounds the gradients once more, so a divisor belongs in token_weight. All rows ignored: loss 0 and gradients 0. No
    atomics: two runs agree bit for bit.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; a DTensor; numbers that give no loss (softcap <= 0,
            smoothing outside [0, 1), z_loss below 0, NaN); a target that is neither `ignore_index` nor in [0, V);
            sample_ids or cu_seqlens that decrease or leave their range; more counted targets than max_rows. On a GPU
            values are checked by device-side assertions, after which the CUDA context is lost.
        NotImplementedError: inside torch.func's grad, vjp and jvp, and under forward-mode differentiation.
        RuntimeError: create_graph=True in the backward pass.
    """
    lora = None if lora is None else Lora(lora[0], lora[1], float(lora[2]))  # any sequence of three will do
    hidden, weight, bias, lora = _autocast(hidden, weight, bias, lora)
    checks.check_transforms(hidden, weight, bias, *(() if lora is None else (lora.a, lora.b)))
    checks.check_operands(hidden, weight, targets, bias, lora)
    samples = checks.check_samples(sample_ids, cu_seqlens, num_samples, targets)
    left, right = checks.check_signature(signature, hidden, samples)
    checks.check_class_weight(class_weight, weight)
    checks.check_numbers(softcap, logit_scale, label_smoothing, z_loss, max_rows, chunk_bytes)
    checks.check_choice("gradients", gradients, get_args(Gradients))
    checks.check_choice("reduction", reduction, get_args(Reduction))
    if reduction == "none":
        if gradients == "forward":
            raise ValueError('reduction "none" has no gradients with the loss: give gradients "auto" or "recompute"')
        gradients = "recompute"
    shape = targets.shape
    targets = targets.long()
    if shift:
        if not shape:
            raise ValueError("shift moves targets along their last dimension, and they have none")
        targets = _next_targets(targets, sample_ids, cu_seqlens, ignore_index)
    token_weight = checks.check_token_weight(token_weight, targets, wide(hidden.dtype))
    if token_weight is None and reduction == "sum":
        token_weight = torch.ones((), dtype=wide(hidden.dtype), device=targets.device)

    tensors = HeadTensors(
        # A view costs autograd a step, so that none is taken where it changes nothing.
        hidden=hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1]),
        weight=weight,
        bias=bias,
        lora_a=None if lora is None else lora.a,
        lora_b=None if lora is None else lora.b,
        targets=targets.reshape(-1),
        class_weight=class_weight,
        sample_ids=None if sample_ids is None else sample_ids.reshape(-1),
        cu_seqlens=cu_seqlens,
        # With "none", the rows are weighted afterwards.
        token_weight=None if token_weight is None or reduction == "none" else _by_row(token_weight),
        left=left,
        right=right,
    )
    tracks = torch.is_grad_enabled()
    now = tracks and gradients != "recompute"
    options = HeadOptions(
        num_samples=samples,
        want_hidden=now and hidden.requires_grad,
        want_weight=now and weight.requires_grad,
        want_bias=now and bias is not None and bias.requires_grad,
        want_lora=now and lora is not None and (lora.a.requires_grad or lora.b.requires_grad),
        want_rows=reduction == "none" and (label_smoothing != 0 or z_loss != 0 or class_weight is not None),
        want_lse=return_lse,
        want_entropy=return_entropy,
        want_predicted=return_predicted,
        rows_differentiable=tracks and gradients != "forward",
        lora_scale=1.0 if lora is None else lora.scale,
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        max_rows=max_rows,
        chunk_bytes=chunk_bytes,
        logits_dtype=checks.check_logits_dtype(logits_dtype, hidden.dtype),
    )
    with without_autocast(hidden.device):
        found = run_head(tensors, options)
    loss = found.loss
    if reduction == "none":
        rows = found.row_loss if options.want_rows else found.token_nll
        loss = _shaped(_weighted_rows(rows, token_weight, tensors.targets, ignore_index), shape)
    return _head_loss(found, loss, tensors, options, shape)


def _weighted_rows(rows: Tensor, token_weight: Tensor | None, targets: Tensor, ignore_index: int) -> Tensor:
    """The rows' losses [T] times their weights; an ignored row's weight may be anything."""
    if token_weight is None:
        return rows
    return torch.where(targets != ignore_index, rows * _by_row(token_weight), 0.0)


def _head_loss(
    found: HeadResult, loss: Tensor, tensors: HeadTensors, options: HeadOptions, shape: torch.Size
) -> HeadLoss:
    """What the user gets: rows in the targets' shape, and None for what was not asked for."""
    token_nll, sample_nll = found.token_nll, found.sample_nll
    if not options.rows_differentiable:
        token_nll, sample_nll = token_nll.detach(), sample_nll.detach()
    accuracy = None
    if options.want_predicted:
        counted = tensors.targets != options.ignore_index
        hits = (found.predicted == tensors.targets) & counted
        accuracy = hits.sum() / counted.sum().clamp(min=1)
    return HeadLoss(
        loss=loss,
        token_nll=_shaped(token_nll, shape),
        sample_nll=sample_nll,
        sample_tokens=found.sample_tokens.detach(),
        signature=None if tensors.left is None else found.signature.detach(),
        lse=_shaped(found.lse.detach(), shape) if options.want_lse else None,
        entropy=_shaped(found.entropy.detach(), shape) if options.want_entropy else None,
        predicted=_shaped(found.predicted.detach(), shape) if options.want_predicted else None,
        token_accuracy=accuracy,
    )


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    return rows if rows.shape == shape else rows.reshape(shape)


def _by_row(values: Tensor) -> Tensor:
    """[...] as [T]; 0-d as it is."""
    return values if values.dim() == 0 else values.reshape(-1)
