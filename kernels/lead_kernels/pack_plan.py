"""Packs an ordered list of samples into micro-batches of fixed capacity, with next to no empty places.

A micro-batch is computed over all of its `capacity` token places, so an empty place costs what a token costs. Bins that
stop at the first sample which does not fit (next-fit) leave E[n^2] / (2 E[n] capacity) of them empty for lengths n: 2.3
% on a real pool of mean length 135 at 4096 places, 10 % where samples have 380 tokens on average and up to 2048. Here a
bin goes on and takes, of the next 32 samples, the longest that still fits, until none does: 0.2 and 0.3 %.
bench/packing.py compares these and best fit over several open bins.

A bin depends on nothing but the samples that remain when it is opened. How bins are grouped into optimizer steps and
rounds is then of no account, and a round that ends anywhere is continued by the next as if it had not ended.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
from torch import Tensor

from lead_kernels.backend import KernelBuild, current_device, num_warps, tl, triton, uses_kernels
from lead_kernels.checks import check_device, check_shape

LOOK_AHEAD = 32
"""Samples that a bin considers after the first that does not fit: one load of a warp. Half as many leave 1.5 times the
places empty, twice as many save 0.1 to 0.2 % of them at 2048 places."""


class PackedPlan(NamedTuple):
    """Samples of every micro-batch of a round."""

    sample_ids: Tensor
    """int64 [num_bins, slots]; N where a slot is empty."""
    tokens: Tensor
    """int64 [num_bins]; tokens used in each bin."""


# --- on the GPU: one program, 32 threads ---


@triton.jit
@no_type_check
def _pack_kernel(
    id_ptr, length_ptr, kept_ptr, out_ptr, tokens_ptr, num_bins, capacity, slots, WINDOW: tl.constexpr,
):  # fmt: skip
    """Fill the bins one after another from a queue in memory, id_ptr and length_ptr [kept], which it consumes.

    What remains is queue[head : kept]. Samples passed over are moved up to those behind them, so that it stays
    contiguous.

    Bins follow one another, so this is latency: about 0.4 us for each 32 samples read (a load from L2, a scan, two
    reductions) and 0.1 us for each sample taken from the look-ahead. A bin of 30 samples costs about 2 us, 64 of them
    (k = 8192 at 128 slots) 0.15 ms.
    """
    lane = tl.arange(0, WINDOW)
    kept = tl.load(kept_ptr).to(tl.int32)
    head = 0
    for place in range(num_bins):
        free = capacity
        count = 0
        # The leading samples that fit, a window at a time. No length is negative, so these are a prefix of the window.
        run = WINDOW
        while run == WINDOW:
            seen = (head + lane < kept) & (count + lane < slots)
            length = tl.load(length_ptr + head + lane, mask=seen, other=0)
            fits = seen & (tl.cumsum(length, 0) <= free)
            tl.store(out_ptr + count + lane, tl.load(id_ptr + head + lane, mask=fits, other=0), mask=fits)
            run = tl.sum(fits.to(tl.int32), 0)
            free -= tl.sum(tl.where(fits, length, 0), 0)
            head += run
            count += run
        # Of the next WINDOW, and never beyond the bin's first `slots`, the longest that fits; of equals the first. Both
        # are in one number for one reduction: the length, then how early the sample comes.
        seen = (head + lane < kept) & (count + lane < slots)
        length = tl.load(length_ptr + head + lane, mask=seen, other=0)
        sample = tl.load(id_ptr + head + lane, mask=seen, other=0)
        rest = seen
        taken = 0
        best = tl.max(tl.where(rest & (length <= free), length * WINDOW + (WINDOW - 1 - lane), -1), 0)
        while best >= 0:
            chosen = lane == WINDOW - 1 - best % WINDOW
            tl.store(out_ptr + count + taken + 0 * lane, sample, mask=chosen)  # a block of pointers, one of them used
            free -= best // WINDOW
            rest = rest & ~chosen
            taken += 1
            best = tl.max(tl.where(rest & (length <= free), length * WINDOW + (WINDOW - 1 - lane), -1), 0)
        # Those passed over move up to the end of the window, so that they still come first.
        if taken > 0:
            behind = tl.sum(rest.to(tl.int32), 0) - tl.cumsum(rest.to(tl.int32), 0)
            moved = head + tl.sum(seen.to(tl.int32), 0) - 1 - behind
            tl.debug_barrier()  # all have been read
            tl.store(length_ptr + moved, length, mask=rest)
            tl.store(id_ptr + moved, sample, mask=rest)
            tl.debug_barrier()  # and are seen by all
            head += taken
        tl.store(tokens_ptr + place, capacity - free)
        out_ptr += slots


def _on_gpu(
    order: Tensor, lengths: Tensor, max_tokens: Tensor, num_bins: int, capacity: int, slots: int
) -> tuple[Tensor, Tensor]:
    length_k, real_k = _lengths(order, lengths)
    torch._assert_async((length_k <= capacity).all(), TOO_LONG)
    # Both conditions hold for a prefix: dummies come last, and the running total never falls.
    kept = (real_k & (length_k.cumsum(0) <= max_tokens)).sum()
    queue, queue_lengths = order.clone(), length_k.to(torch.int32)
    ids, tokens = order.new_full((num_bins, slots), lengths.shape[0]), order.new_empty(num_bins)
    _pack_kernel[(1,)](
        queue, queue_lengths, kept, ids, tokens, num_bins, capacity, slots,
        WINDOW=LOOK_AHEAD, num_warps=num_warps(LOOK_AHEAD, order),
    )  # fmt: skip
    return ids, tokens


# --- in host memory ---


def _on_host(
    order: Tensor, lengths: Tensor, max_tokens: Tensor, num_bins: int, capacity: int, slots: int
) -> tuple[Tensor, Tensor]:
    length_k, real_k = _lengths(order, lengths)
    if bool((length_k > capacity).any()):
        raise RuntimeError(TOO_LONG)
    kept = int((real_k & (length_k.cumsum(0) <= max_tokens)).sum())
    queue, length, head = order[:kept].tolist(), length_k[:kept].tolist(), 0
    bins, tokens = [], []
    for _ in range(num_bins):
        free, end, limit = capacity, head, min(head + slots, kept)
        # The leading samples that fit, then the longest of the next ones, until none does.
        while end < limit and length[end] <= free:
            free -= length[end]
            end += 1
        window = range(end, min(end + LOOK_AHEAD, limit))
        chosen: list[int] = []
        while fitting := [i for i in window if length[i] <= free and i not in chosen]:
            chosen.append(max(fitting, key=length.__getitem__))  # of equals the first
            free -= length[chosen[-1]]
        bins.append(queue[head:end] + [queue[i] for i in chosen])
        tokens.append(capacity - free)
        # Those passed over move up to the end of the window, so that they still come first.
        head = end + len(chosen)
        stay = [i for i in window if i not in chosen]
        queue[head : window.stop] = [queue[i] for i in stay]
        length[head : window.stop] = [length[i] for i in stay]
    ids = torch.tensor([row + [lengths.shape[0]] * (slots - len(row)) for row in bins], dtype=torch.int64)
    return ids, torch.tensor(tokens, dtype=torch.int64)


# --- the operator ---

TOO_LONG = "pack_plan: a sample is longer than `capacity`"


def _lengths(order: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(lengths of the entries, 0 for dummies; which entries are samples), [k] each."""
    real_k = order < lengths.shape[0]
    return torch.where(real_k, lengths[order.clamp(max=lengths.shape[0] - 1)], 0), real_k


@torch.library.custom_op("lead_kernels::pack_plan", mutates_args=())
def _pack_plan(
    order: Tensor, lengths: Tensor, max_tokens: Tensor, num_bins: int, capacity: int, slots: int
) -> tuple[Tensor, Tensor]:
    pack = _on_gpu if uses_kernels(order) else _on_host
    with current_device(order):
        return pack(order, lengths, max_tokens, num_bins, capacity, slots)


@_pack_plan.register_fake
def _(
    order: Tensor, lengths: Tensor, max_tokens: Tensor, num_bins: int, capacity: int, slots: int
) -> tuple[Tensor, Tensor]:
    return order.new_empty(num_bins, slots), order.new_empty(num_bins)


def pack_plan(
    order: Tensor, lengths: Tensor, *, num_bins: int, capacity: int, slots: int, max_tokens: int | Tensor | None = None
) -> PackedPlan:
    """Fill `num_bins` micro-batches (bins) of `capacity` tokens and `slots` samples, one after another.

    A bin takes the leading samples of what remains, as long as they fit, and then, of the `LOOK_AHEAD` samples after
    these, the longest that still fits (the first of equals), until none does. It considers only the first `slots` of
    what remains. Samples that it passes over stay first in what remains. Hence:
    - a bin depends only on what remains: with k = num_bins x slots or more, packing a sequence in parts gives the same
      bins as packing it whole;
    - every bin takes the first of what remains, so at most `LOOK_AHEAD` bins pass over a sample and none is lost;
    - bins are empty only after everything has been packed;
    - a bin ends with fewer free places than the shortest sample that it considered and left, or because of `slots`, or
      as the last one.

    Args:
        order: int64 [k], distinct sample ids in the order of priority; dummies (N) only at the end.
        lengths: int64 [N], tokens of each sample, at most `capacity`.
        max_tokens: budget, an int or a 0-d int64 tensor on order's device. Packed is the longest prefix of `order` with
            at most so many tokens: which samples a budget buys depends on `order` alone.

    Returns:
        `PackedPlan`; `packing_waste` tells how much of it stays empty.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
        RuntimeError: a sample longer than `capacity` (on a GPU a device-side assertion).

    The host reads nothing from a GPU. One program runs there, about 0.15 ms for k = 8192; see `_pack_kernel`.
    """
    check_shape("order", order, (order.shape[0],), (torch.int64,))
    check_shape("lengths", lengths, (lengths.shape[0],), (torch.int64,))
    if not isinstance(max_tokens, Tensor):
        most = torch.iinfo(torch.int64).max if max_tokens is None else max_tokens
        max_tokens = torch.full((), most, dtype=torch.int64, device=order.device)
    check_shape("max_tokens", max_tokens, (), (torch.int64,))
    check_device(order.device, lengths=lengths, max_tokens=max_tokens)
    sample_ids, tokens = _pack_plan(order.contiguous(), lengths, max_tokens, num_bins, capacity, slots)
    return PackedPlan(sample_ids, tokens)


def packing_waste(tokens: Tensor, capacity: int) -> Tensor:
    """fp32 []: the share of computed token places that no token fills; 0 where nothing is computed.

    tokens: int64 [..., M], the tokens of each micro-batch, M of them in an optimizer step (M = 1 for micro-batches of
    their own). A step without a token is not computed, and one with a token is computed whole.
    """
    steps = (tokens.sum(-1) > 0).sum()
    places = (steps * tokens.shape[-1] * capacity).clamp(min=1)
    return torch.where(steps > 0, 1.0 - tokens.sum().double() / places, 0.0).float()


def builds() -> list[KernelBuild]:
    """The one configuration of the one kernel."""
    pointers = {"id_ptr": "*i64", "length_ptr": "*i32", "kept_ptr": "*i64", "out_ptr": "*i64", "tokens_ptr": "*i64"}
    sizes = {"num_bins": "i32", "capacity": "i32", "slots": "i32", "WINDOW": "constexpr"}
    return [KernelBuild("pack_plan", _pack_kernel, {**pointers, **sizes}, {"WINDOW": LOOK_AHEAD}, threads=LOOK_AHEAD)]
