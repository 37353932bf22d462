"""The chunked pass behind `linear_cross_entropy`: losses and gradients of the rows without a [T, V] tensor.

Legend: T rows, C rows of a chunk, H hidden size, V vocabulary. z logits, p = softmax(z), y target, g = gradient of a row's loss with
respect to the row of h W^T.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CPU_CHUNK_ROWS = 1024
"""More rows do not make the products faster on a CPU."""
CPU_TILE_BYTES = 4 * 2**20
"""fp32 logits of a tile: the passes between two products run tile by tile, so that they stay in a CPU's cache. Smaller ones gain
a few per cent on one thread, but each costs some six barriers between threads, which hurt where the cores are shared."""


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


def _split(rows: int, most: int) -> list[slice]:
    """Equal parts of at most `most` rows: a short last one would make a thin product."""
    count = -(-rows // most) if rows else 0
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def _wide_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b: on a GPU the fp32 accumulator itself, on a CPU, which does not hand it out, rounded to the operands' dtype."""
    if a.dtype in (torch.float16, torch.bfloat16) and a.device.type != "cpu":
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out=out)


class _Buffers:
    """The blocks of a pass, used again by every chunk and tile.

    products [C, V], in the inputs' dtype: g, which enters two products, and on a CPU before that the logits.
    logits, probabilities: fp32 (float64 for float64), one tile of rows; on a GPU, whose product hands out its fp32 accumulator, a tile is
    the chunk.
    """

    def __init__(self, hidden_TH: Tensor, vocabulary: int, rows: int) -> None:
        self.on_cpu = hidden_TH.device.type == "cpu"
        self.wide = torch.promote_types(hidden_TH.dtype, torch.float32)
        self.tile_rows = min(rows, max(1, CPU_TILE_BYTES // (4 * vocabulary))) if self.on_cpu else rows
        self.products = hidden_TH.new_empty(rows, vocabulary)
        self.in_place = hidden_TH.dtype == self.wide
        self.logits = self.products if self.in_place else self.products.new_empty(self.tile_rows, vocabulary, dtype=self.wide)
        self.probabilities = self.products.new_empty(self.tile_rows, vocabulary, dtype=self.wide)

    def project(self, hidden_CH: Tensor, weight_VH: Tensor) -> None:
        """h W^T of a chunk, in fp32 where the device allows."""
        out = self.products if self.in_place or self.on_cpu else self.logits
        _wide_product(hidden_CH, weight_VH.t(), out=out[: hidden_CH.shape[0]])

    def tile_logits(self, tile: slice) -> Tensor:
        if self.in_place or not self.on_cpu:
            return self.logits[tile]
        return self.logits[: tile.stop - tile.start].copy_(self.products[tile])


def row_blocks(matrix: Tensor) -> list[slice]:
    """Blocks of rows for an operation of mixed dtypes: on a CPU, PyTorch first copies whole operands to the wider dtype."""
    rows, width = matrix.shape[0], matrix.numel() // max(matrix.shape[0], 1)
    return _split(rows, max(1, CPU_TILE_BYTES // (4 * max(width, 1)))) if matrix.device.type == "cpu" else [slice(0, rows)]


class _WeightGradient:
    """sum over chunks of g^T h, in fp32; a single chunk's product is the sum, in whatever dtype it comes."""

    def __init__(self, weight_VH: Tensor, num_chunks: int) -> None:
        self.wide = torch.promote_types(weight_VH.dtype, torch.float32)
        self.rounds = weight_VH.dtype != self.wide and weight_VH.device.type == "cpu"  # products come out in bf16 or fp16
        self.single = num_chunks == 1
        self.total = None if self.single else torch.zeros_like(weight_VH, dtype=self.wide)

    def add(self, g_CV: Tensor, hidden_CH: Tensor) -> None:
        if self.total is None:
            self.total = _wide_product(g_CV.t(), hidden_CH)
        elif self.rounds:
            for block in row_blocks(self.total):
                self.total[block].add_(torch.mm(g_CV[:, block].t(), hidden_CH))
        elif g_CV.dtype == self.wide:
            self.total.addmm_(g_CV.t(), hidden_CH)
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
    """Rows whose fp32 logits fill `chunk_bytes`, at least one; on a CPU at most CPU_CHUNK_ROWS."""
    rows = max(1, chunk_bytes // (4 * vocabulary))
    return min(rows, CPU_CHUNK_ROWS) if device.type == "cpu" else rows


class _Pass:
    """One pass over the rows: holds the results and what is added up, and fills them chunk by chunk."""

    def __init__(self, hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, options: HeadOptions, chunk_rows: int) -> None:
        self.weight_VH, self.bias_V, self.options = weight_VH, bias_V, options
        self.chunks = _split(hidden_TH.shape[0], chunk_rows)
        self.buffers = _Buffers(hidden_TH, weight_VH.shape[0], max((c.stop - c.start for c in self.chunks), default=0))
        self.nll_T = hidden_TH.new_empty(hidden_TH.shape[0], dtype=self.buffers.wide)
        self.objective_T = self.nll_T if options.plain else torch.empty_like(self.nll_T)
        self.extra_nll_pass = options.nll_grad and not options.plain
        needs_loss_grad = options.hidden_grad or (options.plain and options.nll_grad)
        self.loss_grad_TH = torch.empty_like(hidden_TH) if needs_loss_grad else None
        self.nll_grad_TH = torch.empty_like(hidden_TH) if self.extra_nll_pass else self.loss_grad_TH
        self.dweight = _WeightGradient(weight_VH, len(self.chunks)) if options.weight_grad else None
        self.dbias_V = torch.zeros_like(bias_V, dtype=self.buffers.wide) if options.bias_grad else None

    def tile(self, y_C: Tensor, rows: slice, tile: slice, row_weight_C: Tensor | None) -> None:
        """Losses of a tile, and g in its place in `buffers.products`; `rows` are its rows among all, `tile` in the chunk."""
        options = self.options
        z_CV = _transform_logits(self.buffers.tile_logits(tile), self.bias_V, options)
        p_CV = torch.softmax(z_CV, -1, out=self.buffers.probabilities[: z_CV.shape[0]])
        # lse = max z - log(max p): one fused softmax instead of a slow logsumexp. The largest p is at least 1/V, so that the log is safe,
        # and the differences are taken one by one, so that logits of 1e4 cost no digits.
        top_C, log_top_C = z_CV.amax(-1), p_CV.amax(-1).log_()
        target_C = z_CV.gather(1, y_C[:, None]).squeeze(1)
        nll_C = torch.sub(top_C, target_C, out=self.nll_T[rows]).sub_(log_top_C)
        lse_C = top_C - log_top_C
        if not options.plain:
            objective_C = (1.0 - options.label_smoothing) * nll_C + options.z_loss * lse_C.square()
            if options.label_smoothing:
                objective_C += options.label_smoothing * (lse_C - z_CV.mean(-1))
            self.objective_T[rows] = objective_C
        if self.extra_nll_pass:
            g_CV = _logit_gradient(p_CV.clone(), z_CV, y_C, lse_C, 0.0, 0.0, options)
            torch.mm(g_CV.to(self.weight_VH.dtype), self.weight_VH, out=self.nll_grad_TH[rows])
        if options.loss_grad:
            g_CV = _logit_gradient(p_CV, z_CV, y_C, lse_C, options.label_smoothing, options.z_loss, options)
            self.buffers.products[tile].copy_(g_CV)
            if self.dbias_V is not None:
                self.dbias_V += g_CV.sum(0) if row_weight_C is None else torch.mv(g_CV.t(), row_weight_C)

    def chunk(self, h_CH: Tensor, y_C: Tensor, rows: slice, row_weight_C: Tensor | None) -> None:
        self.buffers.project(h_CH, self.weight_VH)
        for tile in _split(h_CH.shape[0], self.buffers.tile_rows):
            tile_rows = slice(rows.start + tile.start, rows.start + tile.stop)
            self.tile(y_C[tile], tile_rows, tile, None if row_weight_C is None else row_weight_C[tile])
        g_CV = self.buffers.products[: h_CH.shape[0]]
        if self.loss_grad_TH is not None:
            torch.mm(g_CV, self.weight_VH, out=self.loss_grad_TH[rows])
        if self.dweight is not None:  # the row weights go to the H columns of h, not to the V columns of g
            self.dweight.add(g_CV, h_CH if row_weight_C is None else (h_CH * row_weight_C[:, None]).to(h_CH.dtype))


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
    work = _Pass(hidden_TH, weight_VH, bias_V, options, chunk_rows)
    for rows in work.chunks:
        work.chunk(hidden_TH[rows], targets_T[rows], rows, None if row_weight_T is None else row_weight_T[rows])
    dweight_VH = None if work.dweight is None else work.dweight.total
    return HeadRows(work.nll_T, work.objective_T, work.loss_grad_TH, work.nll_grad_TH, dweight_VH, work.dbias_V)
