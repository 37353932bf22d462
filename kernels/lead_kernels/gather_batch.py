"""Packs pool samples into one micro-batch of fixed capacity, on the device that holds the pool."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lead_kernels.checks import check_device, check_shape


class PackedBatch(NamedTuple):
    """One micro-batch: T token places, B sample slots, R response rows; all on one device, shapes fixed by (T, B, R)."""

    input_ids: Tensor
    """int64 [T]; 0 in the tail."""
    position_ids: Tensor
    """int64 [T]; starts again at 0 in every segment, the tail included."""
    cu_seqlens: Tensor
    """int32 [B+2]; segment b is [cu[b], cu[b+1]), empty slots have length 0; segment B is the dummy tail and cu[B+1] == T."""
    rows: Tensor
    """int64 [R]; ascending positions whose next token is a response token of the same sample; padded with T-1."""
    targets: Tensor
    """int64 [R]; that next token; -100 in the padding."""
    row_slots: Tensor
    """int64 [R]; slot of each row, non-decreasing; B-1 in the padding."""
    sample_ids: Tensor
    """int64 [B]; pool ids, N in empty slots."""


def gather_batch(tokens: Tensor, response: Tensor, offsets: Tensor, sample_ids: Tensor, *, capacity: int, num_rows: int) -> PackedBatch:
    """Lay samples one after another in `capacity` token places and list the positions at which a loss is taken.

    tokens: integer [total]; response: bool [total], True on tokens to be learnt (a sample's first token never counts, as nothing
    predicts it); offsets: int64 [N+1], sample i being tokens[offsets[i]:offsets[i+1]]; sample_ids: int64 [B], N in empty slots, in any
    places. `num_rows` (R) must be at least the number of response rows, and the samples must fit into `capacity`.

    Raises ValueError on shapes or dtypes; RuntimeError (on a GPU a device-side assertion, as nothing is read back) where the samples
    or their rows do not fit.
    """
    check_shape("response", response, (tokens.shape[0],), (torch.bool,))
    check_shape("offsets", offsets, (offsets.shape[0],), (torch.int64,))
    check_shape("sample_ids", sample_ids, (sample_ids.shape[0],), (torch.int64,))
    check_device(tokens.device, response=response, offsets=offsets, sample_ids=sample_ids)
    device, num_samples, slots = tokens.device, offsets.shape[0] - 1, sample_ids.shape[0]

    start_B = offsets[sample_ids]
    length_B = offsets[(sample_ids + 1).clamp(max=num_samples)] - start_B  # 0 for the dummy id N
    end_B = length_B.cumsum(0)
    torch._assert_async(end_B[-1] <= capacity, "gather_batch: the samples do not fit into `capacity` tokens")

    position_T = torch.arange(capacity, device=device)
    slot_T = torch.searchsorted(end_B, position_T, right=True)  # the number of samples that end at or before t; B in the tail
    cu = torch.cat([end_B.new_zeros(1), end_B, end_B.new_full((1,), capacity)])
    local_T = position_T - cu[slot_T]
    in_sample_T = slot_T < slots
    source_T = torch.where(in_sample_T, torch.cat([start_B, start_B.new_zeros(1)])[slot_T] + local_T, 0)
    input_T = torch.where(in_sample_T, tokens[source_T].long(), 0)

    # Position t predicts t + 1, if that is a response token that is not the first of its sample.
    counted_T = response[source_T] & in_sample_T & (local_T > 0)
    predicts_T = torch.cat([counted_T[1:], counted_T.new_zeros(1)])
    rank_T = predicts_T.cumsum(0)
    count = rank_T[-1]
    torch._assert_async(count <= num_rows, "gather_batch: more response rows than `num_rows`")

    # A compaction without a data-dependent shape: row number r goes to place r, everything else to a place R that is cut off.
    place_T = torch.where(predicts_T, rank_T - 1, num_rows).clamp(max=num_rows)
    rows_R = position_T.new_full((num_rows + 1,), capacity - 1).index_put_((place_T,), position_T)[:num_rows]
    filled_R = torch.arange(num_rows, device=device) < count
    return PackedBatch(
        input_ids=input_T,
        position_ids=local_T,
        cu_seqlens=cu.int(),
        rows=rows_R,
        targets=torch.where(filled_R, input_T[(rows_R + 1).clamp(max=capacity - 1)], -100),
        row_slots=torch.where(filled_R, slot_T[rows_R], slots - 1),
        sample_ids=sample_ids,
    )
