"""The LM head and its cross-entropy as one operator that never holds a [T, V] tensor beyond one chunk of rows.

Legend: T rows, H hidden size, V vocabulary, B samples, q sketch width; e_t the gradient of row t's NLL at its hidden state.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lead_kernels.checks import check_device, check_shape, on_host, without_autocast
from lead_kernels.gradient_signature import signature_from_bounds
from lead_kernels.head_chunks import HeadOptions, chunk_rows, head_rows, row_blocks
from lead_kernels.segment_reduce import segment_bounds, segment_sum

CHUNK_BYTES_CPU = 64 * 2**20
CHUNK_BYTES_DEVICE = 512 * 2**20
"""On a GPU every chunk reads and writes the fp32 weight gradient once, at some 4 TB/s against 700 TFLOP/s: with fewer than about 1024 rows
(512 MiB at V = 128k) that traffic outweighs one of the chunk's three products."""


class HeadLoss(NamedTuple):
    """What the head returns; only `loss` carries a gradient."""

    loss: Tensor
    """fp32, 0-d: sum of token_weight times the row's loss (NLL, with label smoothing and z-loss where asked for)."""
    token_nll: Tensor
    """fp32 [T]: the plain negative log-likelihood of every row (no smoothing, no z-loss); 0 where ignored."""
    sample_nll: Tensor
    """fp32 [B]: mean of token_nll over the sample's counted rows; 0 where it has none."""
    sample_tokens: Tensor
    """int64 [B]: counted rows of each sample."""
    signature: Tensor | None
    """fp32 [B, q, q] or None."""


class _AttachGradient(torch.autograd.Function):
    """Gives `loss` the gradients that the forward pass has already computed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        scale: Tensor,
        row_scale: Tensor | None,
        loss_grad: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(scale, row_scale, loss_grad, dweight, dbias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale, row_scale, loss_grad, dweight, dbias = ctx.saved_tensors
        scale = (scale * upstream).view(1, 1)
        rows = scale if row_scale is None else row_scale[:, None] * scale
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grads = (_scaled(loss_grad, rows, hidden_dtype), _scaled(dweight, scale, weight_dtype), _scaled(dbias, scale[0], bias_dtype))
        return (*grads, None, None, None, None, None, None)


def _scaled(values: Tensor | None, scale: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """values * scale, multiplied in fp32 and rounded once to `dtype`.

    `scale` has as many dimensions as `values`: with fewer, it would be rounded to the dtype of bf16 values first. `values` stays as it
    is, for a second backward pass of a retained graph.
    """
    if values is None:
        return None
    out = torch.empty_like(values, dtype=dtype)
    for block in row_blocks(values):
        torch.mul(values[block], scale if scale.shape[0] == 1 else scale[block], out=out[block])
    return out


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, signature: tuple[Tensor, Tensor] | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"hidden and weight must be matrices, got shapes {list(hidden.shape)} and {list(weight.shape)}")
    rows, width = hidden.shape
    check_shape("weight", weight, (weight.shape[0], width), (hidden.dtype,))
    check_shape("targets", targets, (rows,), (torch.int64,))
    check_device(hidden.device, weight=weight, targets=targets, bias=bias)
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
    if signature is not None:
        for name, matrix in zip(("signature[0]", "signature[1]"), signature, strict=True):
            check_shape(name, matrix, (width, signature[0].shape[1]))
            check_device(hidden.device, **{name: matrix})


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if on_host(targets) and targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise ValueError(f"targets hold {int(targets.min())} to {int(targets.max())}, expected 0 to {vocabulary - 1} or ignore_index")


def _bounds(sample_ids: Tensor | None, cu_seqlens: Tensor | None, num_samples: int, rows: int) -> Tensor:
    if (sample_ids is None) == (cu_seqlens is None):
        raise ValueError("give exactly one of sample_ids and cu_seqlens")
    if sample_ids is not None:
        check_shape("sample_ids", sample_ids, (rows,))
        return segment_bounds(sample_ids, num_samples)
    assert cu_seqlens is not None
    if cu_seqlens.shape[0] < num_samples + 1:
        raise ValueError(f"cu_seqlens has {cu_seqlens.shape[0]} entries, expected at least num_samples + 1 = {num_samples + 1}")
    bounds = cu_seqlens[: num_samples + 1].long()
    if on_host(bounds) and (bool((bounds.diff() < 0).any()) or not 0 <= int(bounds[0]) <= int(bounds[-1]) <= rows):
        raise ValueError(f"cu_seqlens must be non-decreasing and within 0 to {rows}, got {bounds.tolist()}")
    return bounds


@dataclass(frozen=True)
class _Counted:
    """The rows that are not ignored: taken out where the host may read how many there are, masked where it may not."""

    index: Tensor | None
    mask: Tensor | None

    @staticmethod
    def of(valid_T: Tensor) -> _Counted:
        if not on_host(valid_T):
            return _Counted(None, valid_T)
        return _Counted(None, None) if bool(valid_T.all()) else _Counted(valid_T.nonzero().squeeze(1), None)

    def take(self, rows: Tensor) -> Tensor:
        """The counted rows, or all with 0 in the others, whatever they held (padding may be NaN)."""
        return rows[self.index] if self.index is not None else self._masked(rows)

    def put(self, rows: Tensor, num_rows: int) -> Tensor:
        """Results of `take`n rows at their places among all rows, 0 elsewhere."""
        if self.index is None:
            return self._masked(rows)
        return rows.new_zeros(num_rows, *rows.shape[1:]).index_copy_(0, self.index, rows)

    def _masked(self, rows: Tensor) -> Tensor:
        if self.mask is None:
            return rows
        return torch.where(self.mask.view(-1, *[1] * (rows.dim() - 1)), rows, 0)


def _weights(token_weight: Tensor | float | None, valid_T: Tensor, count: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Split the weight into a 0-d factor and, if it differs between rows, a factor per row."""
    if token_weight is None:
        return 1.0 / count.clamp(min=1).to(dtype), None
    if not isinstance(token_weight, Tensor):
        return torch.full((), token_weight, dtype=dtype, device=valid_T.device), None
    if token_weight.requires_grad:
        raise ValueError("token_weight requires a gradient, which linear_cross_entropy does not give: detach it")
    check_device(valid_T.device, token_weight=token_weight)
    if token_weight.dim() == 0:
        return token_weight.to(dtype), None
    check_shape("token_weight", token_weight, tuple(valid_T.shape))
    return torch.ones((), dtype=dtype, device=valid_T.device), token_weight.to(dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    sample_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_samples: int,
    token_weight: Tensor | float | None = None,
    signature: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
) -> HeadLoss:
    """Cross-entropy of `softcap(logit_scale * (hidden @ weight.T + bias))` with statistics per token and per sample.

    hidden: [T, H] and weight: [V, H], one dtype (bf16, fp16, fp32; float64 for tests); targets: int64 [T]; bias: [V].
    sample_ids: int64 [T], non-decreasing, in [0, num_samples); or cu_seqlens: integers [>= num_samples + 1], rows of each sample.
    token_weight: float, 0-d or [T]; by default 1 / counted rows, the mean. softcap: c, for c tanh(x / c). chunk_bytes: the most bytes of
    a block of fp32 logits (at least one row is taken), 64 MiB by default on a CPU, 512 MiB elsewhere; on a GPU two such blocks, and half
    a one for bf16 and fp16, are alive at a time, on a CPU about one.

    loss = sum_t token_weight_t * ((1 - s) NLL_t + s (lse_t - mean_j z_tj) + z_loss * lse_t^2); `token_nll` and `sample_nll` are the plain
    NLL. Only `loss` is differentiable: with respect to hidden, weight and bias, once, each only where it requires a gradient. The
    gradients are computed in the forward pass, chunk by chunk, and scaled by the upstream scalar in the backward pass; under
    `torch.no_grad()` no gradient work is done, unless a signature is asked for.

    signature: (P, Q), each [H, q]: phi_i = (1/n_i) sum_t (P^T e_t)(Q^T h_t)^T over sample i's counted rows, e_t the gradient of the plain
    NLL of row t at its hidden state, whatever its token_weight. It costs two thin products; with smoothing or z-loss, where e_t differs
    from the loss's gradient, one more V x H product.

    Logits and their gradient are fp32 (on a CPU the matrix product itself rounds to bf16/fp16 first, as PyTorch's does), the one-hot is
    subtracted before rounding, the weight gradient is added up in fp32 over chunks. In host memory ignored rows are left out; on a
    device, where that would need a read, they are computed and masked. All rows ignored: loss 0, gradients 0. Two runs agree bit for bit.
    Raises ValueError on shapes, dtypes, devices or a target outside [0, V) (on a GPU a device-side assertion).
    """
    _check(hidden, weight, targets, bias, signature)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    tracks = torch.is_grad_enabled()
    options = HeadOptions(
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        hidden_grad=tracks and hidden.requires_grad,
        weight_grad=tracks and weight.requires_grad,
        bias_grad=tracks and bias is not None and bias.requires_grad,
        nll_grad=signature is not None,
    )
    budget = chunk_bytes or (CHUNK_BYTES_CPU if hidden.device.type == "cpu" else CHUNK_BYTES_DEVICE)
    with torch.no_grad(), without_autocast(hidden.device):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        bounds = _bounds(sample_ids, cu_seqlens, num_samples, rows)
        valid_T = targets != ignore_index
        before = torch.cat([bounds.new_zeros(1), valid_T.cumsum(0)])  # counted rows before row t
        counts_B = before[bounds].diff()
        scale, row_scale = _weights(token_weight, valid_T, before[-1], wide)
        counted = _Counted.of(valid_T)
        if counted.mask is not None and row_scale is None:
            row_scale = torch.ones_like(valid_T, dtype=wide)
        h_TH, y_T = counted.take(hidden.detach()), counted.take(targets)
        row_scale = None if row_scale is None else counted.take(row_scale)
        _check_targets(y_T, vocabulary)

        frozen_bias = None if bias is None else bias.detach()
        out = head_rows(h_TH, weight.detach(), frozen_bias, y_T, row_scale, options, chunk_rows(budget, vocabulary, hidden.device))
        # A row of weight 0 has no part in the loss, also where its NLL is infinite.
        weighted = out.objective_T if row_scale is None else torch.where(row_scale != 0, row_scale * out.objective_T, 0.0)
        loss = scale * weighted.sum()
        nll_T = counted.put(out.nll_T, rows)
        sample_nll_B = segment_sum(nll_T, bounds) / counts_B.clamp(min=1)
        phi_BQQ = None
        if signature is not None:
            assert out.nll_grad_TH is not None
            taken_bounds = bounds if counted.index is None else before[bounds]
            phi_BQQ = signature_from_bounds(h_TH, out.nll_grad_TH, *signature, taken_bounds, counts_B)
        loss_grad_TH = None if out.loss_grad_TH is None or not options.hidden_grad else counted.put(out.loss_grad_TH, rows)
        row_scale = None if row_scale is None else counted.put(row_scale, rows)

    if options.hidden_grad or options.weight_grad or options.bias_grad:
        loss = _AttachGradient.apply(hidden, weight, bias, loss, scale, row_scale, loss_grad_TH, out.dweight_VH, out.dbias_V)
    return HeadLoss(loss, nll_T, sample_nll_B, counts_B, phi_BQQ)
