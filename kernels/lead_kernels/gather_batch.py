"""Packs pool samples into one micro-batch, from the device that holds the pool or from pinned host memory."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
from torch import Tensor

from lead_kernels.backend import KernelBuild, cdiv, current_device, num_warps, tl, triton, uses_kernels
from lead_kernels.checks import check_shape

BLOCK = 512
"""Slots, tokens or rows of a program. Small, so that a micro-batch read over the bus has many reads in flight."""
THREADS = 128


class PackedBatch(NamedTuple):
    """One micro-batch on one device: T tokens, B sample slots, R response rows, which alone fix all shapes."""

    input_ids: Tensor
    """int64 [T]; 0 in the tail."""
    position_ids: Tensor
    """int64 [T]; starts again at 0 in every segment, the tail included."""
    cu_seqlens: Tensor
    """int32 [B+2]; segment b is [cu[b], cu[b+1]), empty for an empty slot; segment B is the tail, so cu[B+1] == T."""
    rows: Tensor
    """int64 [R]; ascending positions whose next token is a response token of the same sample; padded with T-1."""
    targets: Tensor
    """int64 [R]; that next token; -100 in the padding."""
    row_slots: Tensor
    """int64 [R]; slot of each row, non-decreasing; B-1 in the padding."""
    sample_ids: Tensor
    """int64 [B]; pool ids, N in empty slots."""


# --- on the GPU: three launches ---


@triton.jit
@no_type_check
def _segments_kernel(
    id_ptr, offset_ptr, start_ptr, cu_ptr, status_ptr, num_samples, slots, capacity, BLOCK: tl.constexpr
):
    """One program: where the samples of the B slots begin in the pool (start [B]) and in the micro-batch (cu [B+2]).

    status[0]: tokens of all samples; status[1]: ids outside [0, N]. Segments end at `capacity` also where samples do
    not fit, so that the other kernels stay inside their arrays until the assertion is met.
    """
    lane = tl.arange(0, BLOCK)
    used = tl.sum(tl.zeros((BLOCK,), tl.int64), 0)  # a scalar of the type that the loop makes of it
    unknown = tl.sum(tl.zeros((BLOCK,), tl.int64), 0)
    tl.store(cu_ptr, 0)
    tl.store(cu_ptr + slots + 1, capacity)
    for first in range(0, slots, BLOCK):
        slot = first + lane
        inside = slot < slots
        sample = tl.load(id_ptr + slot, mask=inside, other=num_samples)
        real = (sample >= 0) & (sample < num_samples)
        start = tl.load(offset_ptr + sample, mask=real, other=0)
        length = tl.load(offset_ptr + sample + 1, mask=real, other=0) - start
        end = used + tl.cumsum(length, 0)  # an empty slot has length 0, and ends where the one before it does
        tl.store(start_ptr + slot, start, mask=inside)
        tl.store(cu_ptr + 1 + slot, tl.minimum(end, capacity).to(tl.int32), mask=inside)
        used += tl.sum(length, 0)
        unknown += tl.sum((inside & (sample != num_samples) & (real == 0)).to(tl.int64), 0)
    tl.store(status_ptr, used)
    tl.store(status_ptr + 1, unknown)


@triton.jit
@no_type_check
def _tokens_kernel(
    token_ptr, response_ptr, start_ptr, cu_ptr, input_ptr, position_ptr, mark_ptr, count_ptr, slots, search_steps,
    capacity, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens: token, position in the sample, and mark (the slot if the next token is one to learn, else -1).

    count[p]: marks of program p. Neighbouring places read neighbouring tokens, so reads of the pool are whole lines but
    at samples' ends.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < capacity
    # The slot is the number of segments that end at or before the place (B in the tail), by binary search.
    slot = tl.zeros((BLOCK,), tl.int32)
    high = tl.zeros((BLOCK,), tl.int32) + slots
    for _ in range(search_steps):
        middle = (slot + high) // 2
        ends_before = (slot < high) & (tl.load(cu_ptr + 1 + middle) <= place)
        high = tl.where(ends_before, high, middle)
        slot = tl.where(ends_before, middle + 1, slot)

    in_sample = inside & (slot < slots)
    local = place - tl.load(cu_ptr + slot)
    source = tl.load(start_ptr + slot, mask=in_sample, other=0) + local
    token = tl.load(token_ptr + source, mask=in_sample, other=0)
    has_next = in_sample & (place + 1 < tl.load(cu_ptr + slot + 1))
    marked = has_next & (tl.load(response_ptr + source + 1, mask=has_next, other=0) != 0)
    tl.store(input_ptr + place, token.to(tl.int64), mask=inside)
    tl.store(position_ptr + place, local.to(tl.int64), mask=inside)
    tl.store(mark_ptr + place, tl.where(marked, slot, -1), mask=inside)
    tl.store(count_ptr + tl.program_id(0), tl.sum(marked.to(tl.int32), 0))


@triton.jit
@no_type_check
def _rows_kernel(
    mark_ptr, count_ptr, input_ptr, row_ptr, target_ptr, row_slot_ptr, status_ptr, capacity, num_rows, slots,
    num_counts, BLOCK: tl.constexpr,
):  # fmt: skip
    """The marked places in order: row r goes to place r. Also the padding behind them. status[2]: rows."""
    lane = tl.arange(0, BLOCK)
    before = tl.sum(tl.zeros((BLOCK,), tl.int32), 0)
    total = tl.sum(tl.zeros((BLOCK,), tl.int32), 0)
    # Every program adds up the counts of those before it: a scan kernel of its own would cost another launch.
    for first in range(0, num_counts, BLOCK):
        block = first + lane
        count = tl.load(count_ptr + block, mask=block < num_counts, other=0)
        before += tl.sum(tl.where(block < tl.program_id(0), count, 0), 0)
        total += tl.sum(count, 0)
    if tl.program_id(0) == 0:
        tl.store(status_ptr + 2, total)

    place = tl.program_id(0) * BLOCK + lane
    slot = tl.load(mark_ptr + place, mask=place < capacity, other=-1)
    marked = slot >= 0
    row = before + tl.cumsum(marked.to(tl.int32), 0) - 1
    fits = marked & (row < num_rows)
    tl.store(row_ptr + row, place.to(tl.int64), mask=fits)
    tl.store(target_ptr + row, tl.load(input_ptr + place + 1, mask=fits, other=0), mask=fits)
    tl.store(row_slot_ptr + row, slot.to(tl.int64), mask=fits)

    padding = (place >= total) & (place < num_rows)
    tl.store(row_ptr + place, capacity - 1, mask=padding)
    tl.store(target_ptr + place, -100, mask=padding)
    tl.store(row_slot_ptr + place, slots - 1, mask=padding)


def _on_gpu(
    tokens: Tensor, response: Tensor, offsets: Tensor, sample_ids: Tensor, capacity: int, num_rows: int
) -> list[Tensor]:
    for name, tensor in (("tokens", tokens), ("response", response), ("offsets", offsets)):
        if tensor.device != sample_ids.device and not tensor.is_pinned():
            raise ValueError(
                f"{name} is on {tensor.device} and not pinned: the GPU reads only pinned memory, see Tensor.pin_memory"
            )
    num_samples, slots = offsets.shape[0] - 1, sample_ids.shape[0]
    launch = {"BLOCK": BLOCK, "num_warps": num_warps(THREADS, sample_ids)}
    outputs = _empty(sample_ids, capacity, num_rows)
    inputs, positions, cu, rows, targets, row_slots = outputs
    start, status = sample_ids.new_empty(slots), sample_ids.new_empty(3)
    num_counts = cdiv(capacity, BLOCK)
    marks, counts = cu.new_empty(capacity), cu.new_empty(num_counts)

    _segments_kernel[(1,)](sample_ids, offsets, start, cu, status, num_samples, slots, capacity, **launch)
    steps = slots.bit_length()
    _tokens_kernel[(num_counts,)](
        tokens, response, start, cu, inputs, positions, marks, counts, slots, steps, capacity, **launch
    )
    grid = (cdiv(max(capacity, num_rows), BLOCK),)
    _rows_kernel[grid](
        marks, counts, inputs, rows, targets, row_slots, status, capacity, num_rows, slots, num_counts, **launch
    )
    torch._assert_async(status[1] == 0, UNKNOWN)
    torch._assert_async(status[0] <= capacity, TOO_LONG)
    torch._assert_async(status[2] <= num_rows, TOO_MANY)
    return outputs


# --- in host memory ---


def _on_host(
    tokens: Tensor, response: Tensor, offsets: Tensor, sample_ids: Tensor, capacity: int, num_rows: int
) -> list[Tensor]:
    num_samples, slots = offsets.shape[0] - 1, sample_ids.shape[0]
    if bool(((sample_ids < 0) | (sample_ids > num_samples)).any()):
        raise RuntimeError(UNKNOWN)
    start_B = offsets[sample_ids]
    length_B = offsets[(sample_ids + 1).clamp(max=num_samples)] - start_B  # 0 for the dummy id N
    end_B = length_B.cumsum(0)
    used = int(end_B[-1])
    if used > capacity:
        raise RuntimeError(TOO_LONG)
    outputs = _empty(sample_ids, capacity, num_rows)
    inputs, positions, cu, rows, targets, row_slots = outputs
    cu[0], cu[1:-1], cu[-1] = 0, end_B, capacity

    # Of the U tokens used: slot, position in the sample (the tail counts from 0 as well), place in the pool.
    slot_U = torch.repeat_interleave(torch.arange(slots), length_B, output_size=used)
    torch.arange(used, out=positions[:used]).sub_((end_B - length_B)[slot_U])
    torch.arange(capacity - used, out=positions[used:])
    source_U = start_B[slot_U] + positions[:used]
    inputs[:used], inputs[used:] = tokens[source_U], 0

    # Position t predicts t + 1, if that is a response token and not the first of its sample.
    # All of it lies in host memory here: reading the count waits for no device.
    predicted = (response[source_U] & (positions[:used] > 0)).nonzero().squeeze(1)
    count = len(predicted)
    if count > num_rows:
        raise RuntimeError(TOO_MANY)
    rows[:count], rows[count:] = predicted - 1, capacity - 1
    targets[:count], targets[count:] = inputs[predicted], -100
    row_slots[:count], row_slots[count:] = slot_U[predicted], slots - 1
    return outputs


# --- the operator ---

UNKNOWN = "gather_batch: a sample id is not in [0, N]"
TOO_LONG = "gather_batch: the samples do not fit into `capacity` tokens"
TOO_MANY = "gather_batch: more response rows than `num_rows`"


def _empty(sample_ids: Tensor, capacity: int, num_rows: int) -> list[Tensor]:
    """input_ids, position_ids, cu_seqlens, rows, targets, row_slots, not filled in."""
    input_ids, position_ids = sample_ids.new_empty(capacity), sample_ids.new_empty(capacity)
    cu_seqlens = sample_ids.new_empty(sample_ids.shape[0] + 2, dtype=torch.int32)
    rows, targets, row_slots = (sample_ids.new_empty(num_rows) for _ in range(3))
    return [input_ids, position_ids, cu_seqlens, rows, targets, row_slots]


@torch.library.custom_op("lead_kernels::gather_batch", mutates_args=())
def _gather_batch(
    tokens: Tensor, response: Tensor, offsets: Tensor, sample_ids: Tensor, capacity: int, num_rows: int
) -> list[Tensor]:
    gather = _on_gpu if uses_kernels(sample_ids) else _on_host
    with current_device(sample_ids):
        return gather(tokens, response, offsets, sample_ids, capacity, num_rows)


@_gather_batch.register_fake
def _(
    tokens: Tensor, response: Tensor, offsets: Tensor, sample_ids: Tensor, capacity: int, num_rows: int
) -> list[Tensor]:
    return _empty(sample_ids, capacity, num_rows)


def gather_batch(
    tokens: Tensor, response: Tensor, offsets: Tensor, sample_ids: Tensor, *, capacity: int, num_rows: int
) -> PackedBatch:
    """Lay samples one after another in `capacity` token places and list the positions at which a loss is taken.

    The result is on the device of `sample_ids`. On a GPU, the other three tensors may be there too or in pinned host
    memory: the kernels then read only the samples over the bus, about 5 bytes a token, and nothing waits for the host.

    Args:
        tokens: integer [total]; total may pass 2^31.
        response: bool [total], True for tokens to learn. A sample's first token never counts, as nothing predicts it.
        offsets: int64 [N+1]; sample i is tokens[offsets[i]:offsets[i+1]].
        sample_ids: int64 [B]; N marks an empty slot, anywhere.
        capacity: T, which the samples must fit into.
        num_rows: R, at least the number of response rows.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
        RuntimeError: an id outside [0, N], or samples or rows that do not fit (on a GPU device-side assertions, as
            nothing is read back).
    """
    check_shape("response", response, (tokens.shape[0],), (torch.bool,))
    check_shape("offsets", offsets, (offsets.shape[0],), (torch.int64,))
    check_shape("sample_ids", sample_ids, (sample_ids.shape[0],), (torch.int64,))
    for name, tensor in (("tokens", tokens), ("response", response), ("offsets", offsets)):
        if tensor.device != sample_ids.device and tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}, expected {sample_ids.device} or pinned host memory")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: pass {name}.contiguous()")
    inputs, positions, cu, rows, targets, row_slots = _gather_batch(
        tokens, response, offsets, sample_ids.contiguous(), capacity, num_rows
    )
    return PackedBatch(inputs, positions, cu, rows, targets, row_slots, sample_ids)


def builds() -> list[KernelBuild]:
    """Each kernel in its one configuration, for tokens of 32 and of 64 bits."""
    segments = {
        "id_ptr": "*i64", "offset_ptr": "*i64", "start_ptr": "*i64", "cu_ptr": "*i32", "status_ptr": "*i64",
        "num_samples": "i32", "slots": "i32", "capacity": "i32", "BLOCK": "constexpr",
    }  # fmt: skip
    tokens = {
        "token_ptr": "*i32", "response_ptr": "*i1", "start_ptr": "*i64", "cu_ptr": "*i32", "input_ptr": "*i64",
        "position_ptr": "*i64", "mark_ptr": "*i32", "count_ptr": "*i32", "slots": "i32", "search_steps": "i32",
        "capacity": "i32", "BLOCK": "constexpr",
    }  # fmt: skip
    rows = {
        "mark_ptr": "*i32", "count_ptr": "*i32", "input_ptr": "*i64", "row_ptr": "*i64", "target_ptr": "*i64",
        "row_slot_ptr": "*i64", "status_ptr": "*i64", "capacity": "i32", "num_rows": "i32", "slots": "i32",
        "num_counts": "i32", "BLOCK": "constexpr",
    }  # fmt: skip
    return [
        KernelBuild(f"gather_batch {name}", kernel, signature, {"BLOCK": BLOCK}, threads=THREADS)
        for name, kernel, signature in (
            ("segments", _segments_kernel, segments),
            ("tokens i32", _tokens_kernel, tokens),
            ("tokens i64", _tokens_kernel, {**tokens, "token_ptr": "*i64"}),
            ("rows", _rows_kernel, rows),
        )
    ]
