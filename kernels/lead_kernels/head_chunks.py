"""The chunked pass behind `linear_cross_entropy`: losses and gradients of the rows without a [T, V] tensor.

Legend: T rows, C rows of a chunk, H hidden size, V vocabulary. z logits, p = softmax(z), y target, g = gradient of a row's loss with
respect to the row of h W^T.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CPU_CHUNK_ROWS = 512
"""More rows do not make the products faster on a CPU, and the chunk falls out of its cache: see `chunk_rows`."""


@dataclass(frozen=True)
class HeadOptions:
    """What the row's loss is made of, and which gradients are asked for."""

    softcap: float | None
    logit_scale: float
    label_smoothing: float
    z_loss: float
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool
    nll_grad: bool
    """The gradient of the plain NLL at the hidden states, for the signature."""

    @property
    def plain(self) -> bool:
        """The row's loss is its NLL, so that one gradient serves the backward pass and the signature."""
        return self.label_smoothing == 0.0 and self.z_loss == 0.0

    @property
    def loss_grad(self) -> bool:
        """Whether the gradient of the row's loss is needed at all."""
        return self.hidden_grad or self.weight_grad or self.bias_grad or (self.plain and self.nll_grad)


class HeadRows(NamedTuple):
    """Results per row. The gradients at the hidden states are of the unweighted row loss; the parameters' are weighted sums, in fp32."""

    nll_T: Tensor
    objective_T: Tensor
    loss_grad_TH: Tensor | None
    nll_grad_TH: Tensor | None
    dweight_VH: Tensor | None
    dbias_V: Tensor | None


class _Buffers:
    """The blocks [C, V] of a pass, used again by every chunk: logits, probabilities and, for bf16 and fp16, what enters a product."""

    def __init__(self, hidden_TH: Tensor, vocabulary: int, rows: int) -> None:
        self.dtype = hidden_TH.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.logits = hidden_TH.new_empty(rows, vocabulary, dtype=self.wide)
        self.probabilities = torch.empty_like(self.logits)
        self.low = self.logits if self.dtype == self.wide else torch.empty_like(self.logits, dtype=self.dtype)

    def project(self, hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
        """h W^T in fp32: the product's own accumulator where the device hands it out, on a CPU rounded to the inputs' dtype."""
        rows = hidden_CH.shape[0]
        z_CV, low_CV = self.logits[:rows], self.low[:rows]
        if self.dtype == self.wide:
            return torch.mm(hidden_CH, weight_VH.t(), out=z_CV)
        if hidden_CH.device.type == "cpu":
            return z_CV.copy_(torch.mm(hidden_CH, weight_VH.t(), out=low_CV))
        return torch.mm(hidden_CH, weight_VH.t(), out_dtype=torch.float32, out=z_CV)

    def rounded(self, gradient_CV: Tensor) -> Tensor:
        """The gradient in the dtype of the products."""
        return gradient_CV if self.dtype == self.wide else self.low[: gradient_CV.shape[0]].copy_(gradient_CV)


class _WeightGradient:
    """sum over chunks of g^T h, in fp32."""

    def __init__(self, weight_VH: Tensor) -> None:
        self.total = torch.zeros_like(weight_VH, dtype=torch.promote_types(weight_VH.dtype, torch.float32))
        self.part = None if weight_VH.dtype == self.total.dtype else torch.empty_like(weight_VH)

    def add(self, g_CV: Tensor, hidden_CH: Tensor) -> None:
        if self.part is None:
            self.total.addmm_(g_CV.t(), hidden_CH)
        elif g_CV.device.type == "cpu":
            self.total.add_(torch.mm(g_CV.t(), hidden_CH, out=self.part))
        else:
            self.total = torch.addmm(self.total, g_CV.t(), hidden_CH, out_dtype=torch.float32)


def _transform_logits(z_CV: Tensor, bias_V: Tensor | None, options: HeadOptions) -> Tensor:
    if bias_V is not None:
        z_CV.add_(bias_V)
    if options.logit_scale != 1.0:
        z_CV.mul_(options.logit_scale)
    if options.softcap is not None:
        z_CV.div_(options.softcap).tanh_().mul_(options.softcap)
    return z_CV


def _logit_gradient(
    p_CV: Tensor, z_CV: Tensor, y_C: Tensor, lse_C: Tensor, smoothing: float, z_loss: float, options: HeadOptions
) -> Tensor:
    """Turn p, in place, into g.

    d/dz [(1 - s) NLL + s mean_j(lse - z_j) + zl lse^2] = (1 + 2 zl lse) p - (1 - s) onehot - s/V, then through the cap and the scale.
    The one-hot is subtracted in fp32, before any rounding: rounded first, a small 1 - p_y would be lost.
    """
    if z_loss:
        p_CV.mul_((1.0 + 2.0 * z_loss * lse_C)[:, None])
    if smoothing:
        p_CV.sub_(smoothing / p_CV.shape[1])
    rows = torch.arange(p_CV.shape[0], device=p_CV.device)
    p_CV.index_put_((rows, y_C), p_CV[rows, y_C] - (1.0 - smoothing))
    if options.softcap is not None:
        p_CV.mul_(1.0 - (z_CV / options.softcap).square_())  # d cap tanh(x / cap) / dx = 1 - tanh^2
    if options.logit_scale != 1.0:
        p_CV.mul_(options.logit_scale)
    return p_CV


def chunk_rows(chunk_bytes: int, vocabulary: int, device: torch.device) -> int:
    """Rows whose fp32 logits fill `chunk_bytes`, at least one; on a CPU at most as many as its caches like."""
    rows = max(1, chunk_bytes // (4 * vocabulary))
    return min(rows, CPU_CHUNK_ROWS) if device.type == "cpu" else rows


def _chunks(rows: int, most: int) -> list[slice]:
    """Equal chunks of at most `most` rows: a short last one would make a thin product."""
    count = -(-rows // most)
    edges = [rows * i // max(count, 1) for i in range(count + 1)]
    return [slice(first, last) for first, last in zip(edges[:-1], edges[1:], strict=True)]


def head_rows(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    row_weight_T: Tensor | None,
    options: HeadOptions,
    chunk_rows: int,
) -> HeadRows:
    """Loss of every row and the gradients asked for, a chunk of rows at a time. `row_weight_T` scales the parameters' gradients."""
    chunks = _chunks(hidden_TH.shape[0], chunk_rows)
    buffers = _Buffers(hidden_TH, weight_VH.shape[0], max((c.stop - c.start for c in chunks), default=0))
    nll_T = hidden_TH.new_empty(hidden_TH.shape[0], dtype=buffers.wide)
    objective_T = nll_T if options.plain else torch.empty_like(nll_T)
    extra_nll_pass = options.nll_grad and not options.plain
    loss_grad_TH = torch.empty_like(hidden_TH) if options.hidden_grad or (options.plain and options.nll_grad) else None
    nll_grad_TH = torch.empty_like(hidden_TH) if extra_nll_pass else loss_grad_TH
    dweight = _WeightGradient(weight_VH) if options.weight_grad else None
    dbias_V = torch.zeros_like(bias_V, dtype=buffers.wide) if options.bias_grad else None
    for chunk in chunks:
        h_CH, y_C = hidden_TH[chunk], targets_T[chunk]
        z_CV = _transform_logits(buffers.project(h_CH, weight_VH), bias_V, options)
        p_CV = torch.softmax(z_CV, -1, out=buffers.probabilities[: z_CV.shape[0]])
        # lse = max z - log(max p): one fused softmax instead of a slow logsumexp. The largest p is at least 1/V, so that the log is safe,
        # and the differences are taken one by one, so that logits of 1e4 cost no digits.
        top_C, log_top_C = z_CV.amax(-1), p_CV.amax(-1).log_()
        nll_C = torch.sub(top_C, z_CV.gather(1, y_C[:, None]).squeeze(1), out=nll_T[chunk]).sub_(log_top_C)
        lse_C = top_C - log_top_C
        if not options.plain:
            objective_C = (1.0 - options.label_smoothing) * nll_C + options.z_loss * lse_C.square()
            if options.label_smoothing:
                objective_C += options.label_smoothing * (lse_C - z_CV.mean(-1))
            objective_T[chunk] = objective_C
        if extra_nll_pass:
            g_CV = _logit_gradient(p_CV.clone(), z_CV, y_C, lse_C, 0.0, 0.0, options)
            torch.mm(buffers.rounded(g_CV), weight_VH, out=nll_grad_TH[chunk])
        if not options.loss_grad:
            continue
        g_CV = _logit_gradient(p_CV, z_CV, y_C, lse_C, options.label_smoothing, options.z_loss, options)
        low_CV = buffers.rounded(g_CV)
        if loss_grad_TH is not None:
            torch.mm(low_CV, weight_VH, out=loss_grad_TH[chunk])
        if dweight is not None:  # the row weights go to the H columns of h, not to the V columns of g
            dweight.add(low_CV, h_CH if row_weight_T is None else (h_CH * row_weight_T[chunk, None]).to(h_CH.dtype))
        if dbias_V is not None:
            dbias_V += g_CV.sum(0) if row_weight_T is None else torch.mv(g_CV.t(), row_weight_T[chunk])
    return HeadRows(nll_T, objective_T, loss_grad_TH, nll_grad_TH, None if dweight is None else dweight.total, dbias_V)
