"""The LM head and its cross-entropy as one operator that never holds a [T, V] tensor beyond one chunk of rows.

Legend: T rows, C rows of a chunk, H hidden size, V vocabulary, B samples, q sketch width. z logits, p = softmax(z), y target,
g = dNLL/dlogit (the raw output of the matrix product), e = dNLL/dhidden.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lead_kernels.checks import check_device, check_shape, on_host, without_autocast
from lead_kernels.gradient_signature import signature_from_bounds
from lead_kernels.segment_reduce import segment_bounds, segment_sum

DEFAULT_CHUNK_BYTES = 64 * 2**20


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


@dataclass(frozen=True)
class _Options:
    softcap: float | None
    logit_scale: float
    label_smoothing: float
    z_loss: float
    chunk_rows: int
    need_hidden_grad: bool
    need_weight_grad: bool
    need_bias_grad: bool
    need_nll_grad: bool  # for the signature

    @property
    def plain(self) -> bool:
        """The row's loss is its NLL, so that one gradient serves the backward pass and the signature."""
        return self.label_smoothing == 0.0 and self.z_loss == 0.0

    @property
    def need_gradient(self) -> bool:
        return self.need_hidden_grad or self.need_weight_grad or self.need_bias_grad


class _Rows(NamedTuple):
    """Per-row results of the chunked pass; gradients are of the unweighted row loss except in dweight and dbias."""

    nll_T: Tensor
    objective_T: Tensor
    loss_grad_TH: Tensor | None
    nll_grad_TH: Tensor | None
    dweight_VH: Tensor | None
    dbias_V: Tensor | None


def _matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the fp32 accumulator handed out as it is where the device can, on a CPU rounded to the inputs' dtype."""
    if a.dtype in (torch.float16, torch.bfloat16) and a.device.type != "cpu":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _logits(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, options: _Options) -> Tensor:
    wide = torch.promote_types(hidden_CH.dtype, torch.float32)
    z_CV = _matmul_wide(hidden_CH, weight_VH.t()).to(wide)
    if bias_V is not None:
        z_CV += bias_V
    if options.logit_scale != 1.0:
        z_CV *= options.logit_scale
    if options.softcap is not None:
        z_CV = z_CV.div_(options.softcap).tanh_().mul_(options.softcap)
    return z_CV


def _logit_gradient(p_CV: Tensor, z_CV: Tensor, y_C: Tensor, lse_C: Tensor, smoothing: float, z_loss: float, options: _Options) -> Tensor:
    """Turn p, in place, into the gradient of the row's loss with respect to the raw logit.

    d/dz [(1 - s) NLL + s mean_j(lse - z_j) + zl lse^2] = (1 + 2 zl lse) p - (1 - s) onehot - s/V, then through the cap and the scale.
    The one-hot is subtracted in fp32, before any rounding: rounded first, a small 1 - p_y would be lost.
    """
    if z_loss:
        p_CV *= (1.0 + 2.0 * z_loss * lse_C)[:, None]
    if smoothing:
        p_CV -= smoothing / p_CV.shape[1]
    rows = torch.arange(p_CV.shape[0], device=p_CV.device)
    p_CV.index_put_((rows, y_C), p_CV[rows, y_C] - (1.0 - smoothing))
    if options.softcap is not None:
        p_CV *= 1.0 - (z_CV / options.softcap).square_()  # d cap tanh(x / cap) / dx = 1 - tanh^2
    if options.logit_scale != 1.0:
        p_CV *= options.logit_scale
    return p_CV


def _chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    """Equal chunks of at most `chunk_rows` rows: a short last chunk would make a thin matrix product."""
    count = -(-rows // chunk_rows)
    size = -(-rows // max(count, 1))
    return (slice(first, min(first + size, rows)) for first in range(0, rows, max(size, 1)))


def _accumulate(total: Tensor | None, part: Tensor, only: bool) -> Tensor:
    """Add a chunk's share of a parameter gradient in fp32; a single chunk needs no accumulator."""
    if total is None:
        return part if only else part.to(torch.promote_types(part.dtype, torch.float32))
    return total.add_(part)


def _head_rows(
    hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_T: Tensor, row_weight_T: Tensor | None, options: _Options
) -> _Rows:
    """Forward and, where asked for, gradients, one chunk of rows at a time; every row counts. `row_weight_T` scales dweight and dbias."""
    rows, wide = hidden_TH.shape[0], torch.promote_types(hidden_TH.dtype, torch.float32)
    nll_T = hidden_TH.new_empty(rows, dtype=wide)
    objective_T = nll_T if options.plain else torch.empty_like(nll_T)
    loss_grad_TH = torch.empty_like(hidden_TH) if options.need_hidden_grad else None
    nll_grad_TH = loss_grad_TH if options.plain and options.need_hidden_grad else None
    if options.need_nll_grad and nll_grad_TH is None:
        nll_grad_TH = torch.empty_like(hidden_TH)
    dweight_VH = torch.zeros_like(weight_VH) if options.need_weight_grad and not rows else None
    dbias_V = torch.zeros_like(bias_V) if options.need_bias_grad and not rows else None
    chunks = list(_chunks(rows, options.chunk_rows))
    for chunk in chunks:
        h_CH, y_C = hidden_TH[chunk], targets_T[chunk]
        z_CV = _logits(h_CH, weight_VH, bias_V, options)
        p_CV = torch.softmax(z_CV, -1)
        # lse = max z - log(max p): one fused softmax instead of a slow logsumexp. The largest p is at least 1/V, so the log is safe, and
        # the two differences are taken apart, so that logits of 1e4 cost no digits.
        top_C = z_CV.amax(-1)
        log_top_C = p_CV.amax(-1).log_()
        target_C = z_CV.gather(1, y_C[:, None]).squeeze(1)
        nll_T[chunk] = top_C - target_C - log_top_C
        lse_C = top_C - log_top_C
        if not options.plain:
            objective = nll_T[chunk]
            if options.label_smoothing:
                objective = (1 - options.label_smoothing) * objective + options.label_smoothing * (lse_C - z_CV.mean(-1))
            objective_T[chunk] = objective + options.z_loss * lse_C.square()
        if options.need_nll_grad and nll_grad_TH is not loss_grad_TH:
            source = p_CV.clone() if options.need_gradient else p_CV
            g_CV = _logit_gradient(source, z_CV, y_C, lse_C, 0.0, 0.0, options)
            torch.mm(g_CV.to(weight_VH.dtype), weight_VH, out=nll_grad_TH[chunk])
            del source, g_CV
        if not options.need_gradient:
            continue
        g_CV = _logit_gradient(p_CV, z_CV, y_C, lse_C, options.label_smoothing, options.z_loss, options)
        del z_CV
        low_CV = g_CV.to(weight_VH.dtype)
        if loss_grad_TH is not None:
            torch.mm(low_CV, weight_VH, out=loss_grad_TH[chunk])
        if options.need_weight_grad:
            # The weights go to the H columns of h instead of the V columns of g.
            scaled_CH = h_CH if row_weight_T is None else (h_CH * row_weight_T[chunk, None]).to(h_CH.dtype)
            dweight_VH = _accumulate(dweight_VH, _matmul_wide(low_CV.t(), scaled_CH), len(chunks) == 1)
        if options.need_bias_grad:
            scale_C = torch.ones_like(lse_C) if row_weight_T is None else row_weight_T[chunk]
            dbias_V = _accumulate(dbias_V, torch.mv(g_CV.t(), scale_C), len(chunks) == 1)
    return _Rows(nll_T, objective_T, loss_grad_TH, nll_grad_TH, dweight_VH, dbias_V)


class _AttachGradient(torch.autograd.Function):
    """Gives `loss` the gradients that the forward pass has already computed."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: Tensor, scale: Tensor, row_scale: Tensor | None,
        loss_grad: Tensor | None, dweight: Tensor | None, dbias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(scale, row_scale, loss_grad, dweight, dbias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale, row_scale, loss_grad, dweight, dbias = ctx.saved_tensors
        scale = scale * upstream
        rows = scale if row_scale is None else (row_scale * scale)[:, None]
        grads = [None if grad is None else _scaled(grad, by, dtype)
                 for grad, by, dtype in zip((loss_grad, dweight, dbias), (rows, scale, scale), ctx.dtypes, strict=True)]  # fmt: skip
        return (*grads, None, None, None, None, None, None)


def _scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scale, rounded once to `dtype`; `values` stays as it is for a second backward pass of a retained graph."""
    return torch.mul(values, scale, out=torch.empty_like(values, dtype=dtype))


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
    return cu_seqlens[: num_samples + 1].long()


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
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> HeadLoss:
    """Cross-entropy of `softcap(logit_scale * (hidden @ weight.T + bias))` with statistics per token and per sample.

    hidden: [T, H] and weight: [V, H], one dtype (bf16, fp16, fp32; float64 for tests); targets: int64 [T]; bias: [V].
    sample_ids: int64 [T], non-decreasing, in [0, num_samples); or cu_seqlens: integers [>= num_samples + 1], rows of each sample.
    token_weight: float, 0-d or [T]; by default 1 / counted rows, the mean. softcap: c tanh(x / c). chunk_bytes: the most bytes of an fp32
    block of logits; at least one row is taken. A chunk costs one read and write of the fp32 weight gradient, so with a large V a budget of
    about the size of that gradient (4 V H) is worth its memory.

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
    options = _Options(
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunk_rows=max(1, chunk_bytes // (4 * vocabulary)),
        need_hidden_grad=tracks and hidden.requires_grad,
        need_weight_grad=tracks and weight.requires_grad,
        need_bias_grad=tracks and bias is not None and bias.requires_grad,
        need_nll_grad=signature is not None,
    )
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

        out = _head_rows(h_TH, weight.detach(), None if bias is None else bias.detach(), y_T, row_scale, options)
        # A row of weight 0 has no part in the loss, also where its NLL is infinite.
        weighted = out.objective_T if row_scale is None else torch.where(row_scale != 0, row_scale * out.objective_T, 0.0)
        loss = scale * weighted.sum()
        nll_T = counted.put(out.nll_T, rows)
        sample_nll_B = segment_sum(nll_T, bounds) / counts_B.clamp(min=1)
        phi_BQQ = None
        if signature is not None:
            assert out.nll_grad_TH is not None
            taken_bounds = bounds if counted.index is None else before[bounds]
            phi_BQQ = signature_from_bounds(h_TH, counted._masked(out.nll_grad_TH), *signature, taken_bounds, counts_B)
        loss_grad_TH = None if out.loss_grad_TH is None else counted.put(out.loss_grad_TH, rows)
        row_scale = None if row_scale is None else counted.put(row_scale, rows)

    if options.need_gradient:
        loss = _AttachGradient.apply(hidden, weight, bias, loss, scale, row_scale, loss_grad_TH, out.dweight_VH, out.dbias_V)
    return HeadLoss(loss, nll_T, sample_nll_B, counts_B, phi_BQQ)
