"""The row pass in host memory: plain PyTorch, tile by tile. See `row_loss` for what it computes.

Legend: C rows of a chunk or tile, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lead_kernels.backend import cdiv
from lead_kernels.dtypes import wide
from lead_kernels.row_loss import Columns, RowLoss, Rows

CPU_TILE_BYTES = 4 * 2**20
"""fp32 logits of a tile: the host's passes over a chunk run tile by tile, so that they stay in a CPU's cache. Smaller
ones gain a few per cent on one thread, but each costs some six barriers between threads, which hurt where the cores
are shared."""


def split(rows: int, most: int, multiple: int = 1) -> list[slice]:
    """Equal parts of at most `most` rows: a short last one would make a thin product.

    With a `multiple`, all but the last are multiples of it where `most` is not below it.
    """
    if rows == 0:
        return []
    count = cdiv(rows, most)
    if multiple == 1 or most < multiple:
        return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]
    equal = cdiv(rows, count * multiple) * multiple
    size = min(equal, most // multiple * multiple)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _transform(z_CV: Tensor, bias_V: Tensor | None, loss: RowLoss) -> None:
    if bias_V is not None:
        z_CV.add_(bias_V)
    if loss.logit_scale != 1.0:
        z_CV.mul_(loss.logit_scale)
    if loss.softcap is not None:
        z_CV.div_(loss.softcap).tanh_().mul_(loss.softcap)


def _factors(
    rows: Rows, lse_C: Tensor, loss: RowLoss, class_weight: Tensor | None, vocabulary: int
) -> tuple[Tensor | float, Tensor | float]:
    """(p_factor, y_factor): what p and the one-hot are multiplied by, the scale of the logits apart."""
    a_C, b_C = rows.objective_weight_C, rows.nll_weight_C
    p_factor: Tensor | float = 1.0
    y_factor: Tensor | float = 1.0 - loss.label_smoothing
    if class_weight is not None:
        y_factor = y_factor * class_weight[rows.target_C]
        p_factor = y_factor + loss.label_smoothing / vocabulary * class_weight[-1]
    if loss.z_loss:
        p_factor = p_factor + 2.0 * loss.z_loss * lse_C
    if a_C is not None:
        p_factor, y_factor = a_C * p_factor, a_C * y_factor
    if b_C is not None:
        p_factor, y_factor = p_factor + b_C, y_factor + b_C
    return p_factor, y_factor


def _subtract_uniform(g_CV: Tensor, uniform: float, a_C: Tensor | None, class_weight: Tensor | None) -> None:
    """What smoothing takes from every column: the same, or in proportion to the classes' weights."""
    if class_weight is None:
        g_CV.sub_(uniform if a_C is None else (a_C * uniform)[:, None])
        return
    if a_C is None:
        a_C = torch.ones(g_CV.shape[0], dtype=g_CV.dtype)
    g_CV.addcmul_((a_C * uniform)[:, None], class_weight[:-1], value=-1)


def _gradient(
    p_CV: Tensor, z_CV: Tensor, rows: Rows, lse_C: Tensor, loss: RowLoss, class_weight: Tensor | None = None
) -> Tensor:
    """Turn p, in place, into g = p_factor p - y_factor onehot(y) - uniform; see `row_loss`."""
    p_factor, y_factor = _factors(rows, lse_C, loss, class_weight, p_CV.shape[1])
    if isinstance(p_factor, Tensor):  # else it is 1
        p_CV.mul_(p_factor[:, None])
    if loss.label_smoothing:
        _subtract_uniform(p_CV, loss.label_smoothing / p_CV.shape[1], rows.objective_weight_C, class_weight)
    index = (torch.arange(p_CV.shape[0]), rows.target_C)
    p_CV.index_put_(index, p_CV[index] - y_factor)
    if loss.softcap is not None:
        p_CV.mul_(1.0 - (z_CV / loss.softcap).square_())  # d cap tanh(x / cap) / dx = 1 - tanh^2
    if loss.logit_scale != 1.0:
        p_CV.mul_(loss.logit_scale)
    return p_CV


def _objective(
    z_CV: Tensor, nll_C: Tensor, lse_C: Tensor, rows: Rows, loss: RowLoss, class_weight: Tensor | None
) -> Tensor:
    """The rows' losses."""
    s = loss.label_smoothing
    own_C = nll_C if class_weight is None else class_weight[rows.target_C] * nll_C
    objective_C = (1.0 - s) * own_C + loss.z_loss * lse_C.square()
    if s and class_weight is None:
        objective_C += s * (lse_C - z_CV.mean(-1))
    elif s and class_weight is not None:
        objective_C += s / z_CV.shape[1] * (class_weight[-1] * lse_C - torch.mv(z_CV, class_weight[:-1]))
    return objective_C


def _tile(
    z_CV: Tensor,
    p_CV: Tensor,
    gradient_CV: Tensor | None,
    nll_gradient_CV: Tensor | None,
    columns: Columns,
    rows: Rows,
    loss: RowLoss,
) -> None:
    """One tile: z_CV its logits in fp32, p_CV scratch of that size."""
    class_weight = columns.class_weight
    _transform(z_CV, columns.bias_V, loss)
    torch.softmax(z_CV, -1, out=p_CV)
    # lse = max z - log(max p): one fused softmax instead of a slow logsumexp. The largest p is at least 1/V, so that
    # the log is safe, and the differences are taken one by one, so that logits of 1e4 cost no digits.
    top_C, log_top_C = z_CV.amax(-1), p_CV.amax(-1).log_()
    target_C = z_CV.gather(1, rows.target_C[:, None]).squeeze(1)
    nll_C = torch.sub(top_C, target_C, out=rows.nll_C).sub_(log_top_C)
    lse_C = top_C - log_top_C
    if rows.objective_C is not None:
        rows.objective_C.copy_(_objective(z_CV, nll_C, lse_C, rows, loss, class_weight))
    if rows.lse_C is not None:
        rows.lse_C.copy_(lse_C)
    if rows.entropy_C is not None:
        torch.sum(torch.special.xlogy(p_CV, p_CV), -1, out=rows.entropy_C).neg_()
    if rows.predicted_C is not None:
        torch.argmax(z_CV, -1, out=rows.predicted_C)
    if nll_gradient_CV is not None:  # first, from a copy: the other takes p itself
        plain = RowLoss(loss.softcap, loss.logit_scale)
        unweighted = rows._replace(objective_weight_C=None, nll_weight_C=None)
        nll_gradient_CV.copy_(_gradient(p_CV.clone(), z_CV, unweighted, lse_C, plain))
    if gradient_CV is not None:
        gradient_CV.copy_(_gradient(p_CV, z_CV, rows, lse_C, loss, class_weight))


def row_pass_by_tiles(
    z_CV: Tensor,
    gradient_CV: Tensor | None,
    nll_gradient_CV: Tensor | None,
    columns: Columns,
    rows: Rows,
    loss: RowLoss,
) -> None:
    """`row_pass.row_pass` in host memory."""
    count, vocabulary = z_CV.shape
    tile_dtype = wide(z_CV.dtype)
    tiles = split(count, max(1, CPU_TILE_BYTES // (4 * vocabulary)))
    # Scratch for one tile, which all of them share.
    most = max((tile.stop - tile.start for tile in tiles), default=0)
    p = z_CV.new_empty(most, vocabulary, dtype=tile_dtype)
    widened = None if z_CV.dtype == tile_dtype else torch.empty_like(p)
    for tile in tiles:
        size = tile.stop - tile.start
        z = z_CV[tile] if widened is None else widened[:size].copy_(z_CV[tile])
        gradient = None if gradient_CV is None else gradient_CV[tile]
        nll_gradient = None if nll_gradient_CV is None else nll_gradient_CV[tile]
        _tile(z, p[:size], gradient, nll_gradient, columns, rows.part(tile), loss)
