"""What happens to a block of logits between the head's matrix products: losses of its rows, and the logits' gradient in their place.

Legend: C rows of a chunk, V vocabulary. z logits, p = softmax(z), y target, lse = log sum exp z.

A row's loss is  a [(1 - s) NLL + s (lse - mean z) + zl lse^2] + b NLL,  s label smoothing, zl the z-loss factor. a and b are 1 and 0 where
the row's weight is applied later, or given per row. With respect to the logits that is

    g = (a (1 + 2 zl lse) + b) p - (a (1 - s) + b) onehot(y) - a s / V,

then through the cap, z = c tanh(x / c) with dz/dx = 1 - (z / c)^2, and the scale. The one-hot is subtracted in fp32, before any rounding:
rounded first, a small 1 - p_y would be lost.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lead_kernels.backend import KernelBuild, current_device, tl, triton, uses_kernels, warps, wave_size


@triton.jit
def _transform(x, bias, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """softcap(scale * (x + bias)). tanh by one exponential: exact to about 1e-7 of the cap, and right at both infinities."""
    x = x + bias
    if SCALE != 1.0:
        x = x * tl.full((), SCALE, ACC)  # a bare constant would be rounded to fp32 first
    if SOFTCAP is not None:
        cap = tl.full((), SOFTCAP, ACC)
        x = cap * (1.0 - 2.0 / (tl.exp(x * (2.0 / cap)) + 1.0))
    return x


@triton.jit
def _row_pass_kernel(
    z_ptr, z_stride, gradient_ptr, nll_gradient_ptr, gradient_stride, bias_ptr, target_ptr, objective_weight_ptr, nll_weight_ptr,
    nll_ptr, objective_ptr, vocabulary, width, ignore_index,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    NARROWS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: one sweep for the losses, one for the gradient, which may lie where the logits lie.

    The running maximum m and sum s are kept by groups of eight columns and combined once, after the sweep: no reduction over the program,
    and so no barrier, inside the loop.

    Rows are accessed up to `width`, the vocabulary rounded up to 16: then accesses are 16 bytes wide also at V = 128257. What lies in the
    padding does not count, and its gradient is 0.

    NARROWS: the gradient is half as wide as the logits it overwrites. Blocks go upwards, and block [v0, v1) is written to bytes
    [2 v0, 2 v1) of the row, below the bytes [4 v1, ...) of later blocks; inside a block, the barrier lets all its reads come first.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    counted = target != ignore_index
    target = tl.where(counted, target, 0)
    z_row = z_ptr + row * z_stride
    # Eight neighbours to a thread: 16 bytes of bf16, and a maximum that needs no other thread.
    lane = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]

    m = tl.full((BLOCK // 8,), -3.0e38, ACC)  # finite, so that logits of -inf give exp(-inf) = 0 and never inf - inf
    s = tl.zeros((BLOCK // 8,), ACC)
    total = tl.zeros((BLOCK // 8,), ACC)
    for start in range(0, tl.where(counted, vocabulary, 0), BLOCK):
        column = start + lane
        inside = column < vocabulary
        z = tl.load(z_row + column, mask=column < width, other=0.0, eviction_policy="evict_last").to(ACC)
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(ACC) if bias_ptr is not None else 0.0
        z = tl.where(inside, _transform(z, bias, SCALE, SOFTCAP, ACC), -float("inf"))
        new = tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp(m - new) + tl.sum(tl.exp(z - new[:, None]), 1)
        m = new
        if SMOOTHING != 0.0:
            total += tl.sum(tl.where(inside, z, 0.0), 1)
    top = tl.where(counted, tl.max(m, 0), 0.0)
    s = tl.sum(s * tl.exp(m - top), 0)

    z_target = tl.load(z_row + target).to(ACC)
    bias_target = tl.load(bias_ptr + target).to(ACC) if bias_ptr is not None else 0.0
    z_target = _transform(z_target, bias_target, SCALE, SOFTCAP, ACC)
    log_s = tl.log(s)
    nll = (top - z_target) + log_s  # difference by difference: logits of 1e4 cost no digits
    lse = top + log_s
    smoothing = tl.full((), SMOOTHING, ACC)
    z_loss = tl.full((), Z_LOSS, ACC)
    size = vocabulary.to(ACC)
    tl.store(nll_ptr + row, tl.where(counted, nll, 0.0))
    if objective_ptr is not None:
        objective = (1.0 - smoothing) * nll + z_loss * lse * lse
        if SMOOTHING != 0.0:
            objective += smoothing * ((top - tl.sum(total, 0) / size) + log_s)
        tl.store(objective_ptr + row, tl.where(counted, objective, 0.0))

    if (gradient_ptr is not None) or (nll_gradient_ptr is not None):
        a = tl.load(objective_weight_ptr + row).to(ACC) if objective_weight_ptr is not None else 1.0
        b = tl.load(nll_weight_ptr + row).to(ACC) if nll_weight_ptr is not None else 0.0
        # Reading the target's logit has to come before any write to its row: all threads of the program meet here.
        tl.debug_barrier()
        inverse = 1.0 / s
        p_factor = a * (1.0 + 2.0 * z_loss * lse) + b
        y_factor = a * (1.0 - smoothing) + b
        for start in range(0, width, BLOCK):
            column = start + lane
            inside = column < vocabulary
            z = tl.load(z_row + column, mask=column < width, other=0.0, eviction_policy="evict_first").to(ACC)
            bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(ACC) if bias_ptr is not None else 0.0
            z = _transform(z, bias, SCALE, SOFTCAP, ACC)
            p = tl.exp(z - top) * inverse
            hit = column == target
            slope = 1.0
            if SOFTCAP is not None:
                tanh = z / tl.full((), SOFTCAP, ACC)
                slope = 1.0 - tanh * tanh
            slope = slope * tl.full((), SCALE, ACC)
            if NARROWS:
                tl.debug_barrier()
            if gradient_ptr is not None:
                g = p * p_factor - tl.where(hit, y_factor, 0.0)
                if SMOOTHING != 0.0:
                    g -= a * (smoothing / size)
                g = tl.where(counted & inside, g * slope, 0.0)
                tl.store(gradient_ptr + row * gradient_stride + column, g, mask=column < width)
            if nll_gradient_ptr is not None:
                g = tl.where(counted & inside, (p - tl.where(hit, 1.0, 0.0)) * slope, 0.0)
                tl.store(nll_gradient_ptr + row * gradient_stride + column, g, mask=column < width)


@dataclass(frozen=True)
class RowLoss:
    """What a row's loss is made of besides its NLL."""

    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def plain(self) -> bool:
        """The row's loss is its NLL, so that one gradient serves the backward pass and the signature."""
        return self.label_smoothing == 0.0 and self.z_loss == 0.0


class Rows(NamedTuple):
    """A chunk's rows: what comes in with them, and where their losses go."""

    target_C: Tensor
    """int64; `ignore_index` in rows that do not count: their loss and gradient are 0."""
    objective_weight_C: Tensor | None
    nll_weight_C: Tensor | None
    """a and b above; None: 1 and 0."""
    nll_C: Tensor
    objective_C: Tensor | None
    """Outputs: the plain NLL and, unless the loss is that, the row's loss."""

    def part(self, rows: slice) -> Rows:
        return Rows(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


def _launch_shape(vocabulary: int, simple: bool) -> tuple[int, int]:
    """(BLOCK, threads): up to 1024 threads with 16 elements each; 512 with 8 where options need their registers.

    In bf16 the simple kernel takes 32 registers (`python -m lead_kernels.aot`): two programs run on an SM of an H200, one of which computes
    while the other waits at the end of a sweep, and together they have 64 KiB of logits in flight, twice what 4.3 TB/s take at a
    microsecond's latency. Smaller programs would be more of them, with more rows in the works than the 60 MB L2 cache holds until they
    are read again: at V = 128k, 2 x 132 rows of 250 KB are 66 MB, on average half of it still to be read again.
    """
    each, most = (16, 1024) if simple else (8, 512)
    block = min(most * each, max(64 * each, triton.next_power_of_2(vocabulary)))
    return block, block // each


def padded(vocabulary: int) -> int:
    """Columns of a buffer of logits: a multiple of 16."""
    return -(-vocabulary // 16) * 16


def _by_kernel(z_CV: Tensor, gradient_CV: Tensor | None, nll_gradient_CV: Tensor | None, bias_V: Tensor | None, rows: Rows,
               loss: RowLoss, ignore_index: int) -> None:  # fmt: skip
    vocabulary = z_CV.shape[1]
    extras = (bias_V, loss.softcap, nll_gradient_CV, rows.objective_weight_C, rows.nll_weight_C)
    block, threads = _launch_shape(vocabulary, loss.plain and all(x is None for x in extras))
    gradients = [g for g in (gradient_CV, nll_gradient_CV) if g is not None]
    narrows = any(g.element_size() < z_CV.element_size() and g.data_ptr() == z_CV.data_ptr() for g in gradients)
    with current_device(z_CV):
        _row_pass_kernel[(z_CV.shape[0],)](
            z_CV, z_CV.stride(0), gradient_CV, nll_gradient_CV, gradients[0].stride(0) if gradients else 0, bias_V, rows.target_C,
            rows.objective_weight_C, rows.nll_weight_C, rows.nll_C, rows.objective_C, vocabulary,
            min(padded(vocabulary), z_CV.stride(0)), ignore_index,
            SCALE=loss.logit_scale, SOFTCAP=loss.softcap, SMOOTHING=loss.label_smoothing, Z_LOSS=loss.z_loss, NARROWS=narrows,
            ACC=tl.float64 if z_CV.dtype == torch.float64 else tl.float32, BLOCK=block, num_warps=warps(threads, wave_size(z_CV.device)),
        )  # fmt: skip


CPU_TILE_BYTES = 4 * 2**20
"""fp32 logits of a tile: the host's passes over a chunk run tile by tile, so that they stay in a CPU's cache. Smaller ones gain a few per
cent on one thread, but each costs some six barriers between threads, which hurt where the cores are shared."""


def split(rows: int, most: int, multiple: int = 1) -> list[slice]:
    """Equal parts of at most `most` rows: a short last one would make a thin product. With a `multiple`, all but the last are multiples
    of it where `most` is not below it."""
    count = -(-rows // most) if rows else 0
    if multiple == 1 or most < multiple:
        return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]
    size = min(-(-rows // (max(count, 1) * multiple)) * multiple, most // multiple * multiple)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)] if rows else []


def _host_transform(z_CV: Tensor, bias_V: Tensor | None, loss: RowLoss) -> Tensor:
    if bias_V is not None:
        z_CV.add_(bias_V)
    if loss.logit_scale != 1.0:
        z_CV.mul_(loss.logit_scale)
    if loss.softcap is not None:
        z_CV.div_(loss.softcap).tanh_().mul_(loss.softcap)
    return z_CV


def _host_gradient(p_CV: Tensor, z_CV: Tensor, rows: Rows, lse_C: Tensor, loss: RowLoss) -> Tensor:
    """Turn p, in place, into g."""
    a_C, b_C = rows.objective_weight_C, rows.nll_weight_C
    p_factor: Tensor | float = 1.0 + 2.0 * loss.z_loss * lse_C if loss.z_loss else 1.0
    y_factor: Tensor | float = 1.0 - loss.label_smoothing
    if a_C is not None:
        p_factor, y_factor = a_C * p_factor, a_C * y_factor
    if b_C is not None:
        p_factor, y_factor = p_factor + b_C, y_factor + b_C
    if isinstance(p_factor, Tensor):
        p_CV.mul_(p_factor[:, None])
    if loss.label_smoothing:
        uniform = loss.label_smoothing / p_CV.shape[1]
        p_CV.sub_(uniform if a_C is None else (a_C * uniform)[:, None])
    index = (torch.arange(p_CV.shape[0]), rows.target_C)
    p_CV.index_put_(index, p_CV[index] - y_factor)
    if loss.softcap is not None:
        p_CV.mul_(1.0 - (z_CV / loss.softcap).square_())  # d cap tanh(x / cap) / dx = 1 - tanh^2
    if loss.logit_scale != 1.0:
        p_CV.mul_(loss.logit_scale)
    return p_CV


def _host_tile(z_CV: Tensor, p_CV: Tensor, gradient_CV: Tensor | None, nll_gradient_CV: Tensor | None, bias_V: Tensor | None, rows: Rows,
               loss: RowLoss) -> None:  # fmt: skip
    """One tile: z_CV its logits in fp32, p_CV scratch of that size."""
    _host_transform(z_CV, bias_V, loss)
    torch.softmax(z_CV, -1, out=p_CV)
    # lse = max z - log(max p): one fused softmax instead of a slow logsumexp. The largest p is at least 1/V, so that the log is safe,
    # and the differences are taken one by one, so that logits of 1e4 cost no digits.
    top_C, log_top_C = z_CV.amax(-1), p_CV.amax(-1).log_()
    target_C = z_CV.gather(1, rows.target_C[:, None]).squeeze(1)
    nll_C = torch.sub(top_C, target_C, out=rows.nll_C).sub_(log_top_C)
    lse_C = top_C - log_top_C
    if rows.objective_C is not None:
        objective_C = (1.0 - loss.label_smoothing) * nll_C + loss.z_loss * lse_C.square()
        if loss.label_smoothing:
            objective_C += loss.label_smoothing * (lse_C - z_CV.mean(-1))
        rows.objective_C.copy_(objective_C)
    if nll_gradient_CV is not None:
        plain = RowLoss(loss.softcap, loss.logit_scale)
        unweighted = rows._replace(objective_weight_C=None, nll_weight_C=None)
        nll_gradient_CV.copy_(_host_gradient(p_CV.clone(), z_CV, unweighted, lse_C, plain))
    if gradient_CV is not None:
        gradient_CV.copy_(_host_gradient(p_CV, z_CV, rows, lse_C, loss))


def _by_tiles(z_CV: Tensor, gradient_CV: Tensor | None, nll_gradient_CV: Tensor | None, bias_V: Tensor | None, rows: Rows,
              loss: RowLoss) -> None:  # fmt: skip
    count, vocabulary = z_CV.shape
    wide = torch.promote_types(z_CV.dtype, torch.float32)
    tiles = split(count, max(1, CPU_TILE_BYTES // (4 * vocabulary)))
    most = max((tile.stop - tile.start for tile in tiles), default=0)
    p = z_CV.new_empty(most, vocabulary, dtype=wide)
    widened = None if z_CV.dtype == wide else torch.empty_like(p)
    for tile in tiles:
        size = tile.stop - tile.start
        z = z_CV[tile] if widened is None else widened[:size].copy_(z_CV[tile])
        gradient, nll_gradient = (None if x is None else x[tile] for x in (gradient_CV, nll_gradient_CV))
        _host_tile(z, p[:size], gradient, nll_gradient, bias_V, rows.part(tile), loss)


def row_pass(z_CV: Tensor, gradient_CV: Tensor | None, nll_gradient_CV: Tensor | None, bias_V: Tensor | None, rows: Rows, loss: RowLoss,
             ignore_index: int) -> None:  # fmt: skip
    """Fill the rows' losses and, where asked for, the gradients of their losses and of their plain NLL at the logits.

    z_CV: products h W^T, overwritten. One of the gradients may be z_CV itself, or the narrower view of it that `in_place_view` gives; both
    have one row stride. In host memory no row may be ignored (the caller leaves them out).
    """
    if uses_kernels(z_CV):
        _by_kernel(z_CV, gradient_CV, nll_gradient_CV, bias_V, rows, loss, ignore_index)
    else:
        _by_tiles(z_CV, gradient_CV, nll_gradient_CV, bias_V, rows, loss)


def in_place_view(z_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """The first bytes of every row of z_CV, as a [C, V] matrix of a dtype that is as wide or narrower."""
    return z_CV if z_CV.dtype == dtype else z_CV.view(dtype)[:, : z_CV.shape[1]]


def builds() -> list[KernelBuild]:
    """The kernel for every dtype and program size, with what models ask for: nothing, a cap (Gemma), a bias (Phi), and everything."""
    pairs = [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16")]
    found = [_build(*pair, 128_256, mode) for pair in pairs for mode in ("loss", "gradient", "cap", "bias", "everything")]
    return found + [_build("bf16", "bf16", v, mode) for v in (500, 2000) for mode in ("gradient", "everything")]


def _build(logits: str, gradient: str, vocabulary: int, mode: str) -> KernelBuild:
    everything = mode == "everything"
    block, threads = _launch_shape(vocabulary, mode in ("loss", "gradient"))
    pointers = {"z_ptr": f"*{logits}:16", "target_ptr": "*i64", "nll_ptr": "*fp32"}
    if mode != "loss":
        pointers["gradient_ptr"] = f"*{gradient}:16"
    if everything or mode == "bias":
        pointers["bias_ptr"] = f"*{gradient}"
    if everything:
        rows = dict.fromkeys(("objective_weight_ptr", "nll_weight_ptr", "objective_ptr"), "*fp32")
        pointers |= {"nll_gradient_ptr": f"*{gradient}:16", **rows}
    absent = {name: None for name in _row_pass_kernel.arg_names if name.endswith("_ptr") and name not in pointers}
    constants = {
        **absent, "SCALE": 0.5 if everything else 1.0, "SOFTCAP": 30.0 if everything or mode == "cap" else None,
        "SMOOTHING": 0.1 if everything else 0.0, "Z_LOSS": 1e-4 if everything else 0.0, "NARROWS": logits != gradient and mode != "loss",
        "ACC": tl.float32, "BLOCK": block,
    }  # fmt: skip
    sizes = {"z_stride": "i32:16", "gradient_stride": "i32:16", "width": "i32:16", "vocabulary": "i32", "ignore_index": "i32"}
    signature = {**pointers, **sizes, **dict.fromkeys(constants, "constexpr")}
    name = f"row_pass {logits}{'' if logits == gradient else '->' + gradient} {mode} {block}"
    return KernelBuild(name, _row_pass_kernel, {n: signature[n] for n in _row_pass_kernel.arg_names}, constants, threads)
