"""Next-fit packing of an ordered list of samples into micro-batches, vectorised and without a device read."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lead_kernels.checks import check_device, check_shape


class PackedPlan(NamedTuple):
    """Samples of every micro-batch of a round."""

    sample_ids: Tensor
    """int64 [num_bins, slots]; N where a slot is empty."""
    tokens: Tensor
    """int64 [num_bins]; tokens used in each bin."""


def _bin_starts(next_start: Tensor, num_bins: int) -> Tensor:
    """Starts of bins 0..num_bins, following `next_start` from 0 by pointer doubling: log2(num_bins) steps instead of num_bins."""
    starts, jump = next_start.new_zeros(1), next_start
    while starts.shape[0] < num_bins + 1:
        starts = torch.cat([starts, jump[starts]])
        jump = jump[jump]
    return starts[: num_bins + 1]


def pack_plan(
    order: Tensor, lengths: Tensor, *, num_bins: int, capacity: int, slots: int, max_tokens: int | Tensor | None = None
) -> PackedPlan:
    """Fill `num_bins` bins of `capacity` tokens and `slots` samples in the order of priority.

    order: int64 [k], sample ids with dummies (N) only at the end; lengths: int64 [N], each at most `capacity` (a RuntimeError, on a GPU a
    device-side assertion, otherwise). A bin takes samples until the next one would not fit, the next bin goes on with that one: the
    order is kept and nobody is passed over. Packing stops before the first sample with which the running total of tokens would exceed
    `max_tokens` (an int, or a 0-d integer tensor on the device), and when the bins are full; all later samples are left out.

    Waste: a bin that is not the last, and not stopped by `slots`, has fewer free places than the sample that opens the next bin is long; on
    average half of it, that is about E[n^2] / (2 E[n] capacity) of the places for lengths n.
    """
    num_order, num_samples = order.shape[0], lengths.shape[0]
    check_shape("order", order, (num_order,), (torch.int64,))
    check_shape("lengths", lengths, (num_samples,), (torch.int64,))
    check_device(order.device, lengths=lengths)

    length_k = torch.cat([lengths, lengths.new_zeros(1)])[order]
    torch._assert_async((length_k <= capacity).all(), "pack_plan: a sample is longer than `capacity`")
    total = torch.cat([length_k.new_zeros(1), length_k.cumsum(0)])  # tokens before entry i, [k+1]
    keep = order < num_samples
    if max_tokens is not None:
        keep = keep & (total[1:] <= max_tokens)
    kept = keep.to(torch.int64).cumprod(0).sum()

    place = torch.arange(num_order + 1, device=order.device)
    fits = torch.searchsorted(total, total + capacity, right=True) - 1  # a bin that starts at i ends before fits[i]
    next_start = torch.minimum(torch.minimum(fits, place + slots), kept).maximum(torch.minimum(place, kept))
    starts = _bin_starts(next_start, num_bins)

    entry = starts[:-1, None] + torch.arange(slots, device=order.device)
    padded = torch.cat([order, order.new_full((1,), num_samples)])
    ids = torch.where(entry < starts[1:, None], padded[entry.clamp(max=num_order)], num_samples)
    return PackedPlan(ids, total[starts[1:]] - total[starts[:-1]])
