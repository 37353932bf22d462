"""The kernels of the radix select in `radix_select`.

A sample's *key* is (utility descending, id ascending) as one integer of `ORDER_BITS` bits and those of an id: keys are
unique, and smaller is better. A *digit* is a run of a key's bits.
"""

from __future__ import annotations

from typing import no_type_check

from lead_kernels.backend import tl, triton

ORDER_BITS = 32
NONE = 2**63 - 1
"""Sorts behind every key."""


@triton.jit
@no_type_check
def load_block(vector, start, num_samples, BLOCK: tl.constexpr):
    """vector[start : start + BLOCK], 0 past the end. Only the last block is masked: a mask prevents wide loads."""
    ids = start + tl.arange(0, BLOCK)
    if start + BLOCK <= num_samples:
        value = tl.load(vector + ids)
    else:
        value = tl.load(vector + ids, mask=ids < num_samples, other=0)
    return value


@triton.jit
@no_type_check
def _descending(value):
    """fp32 -> int64 in [0, 2^32), larger values first; NaN counts as -inf, -0 as 0. Integers: GPUs flush subnormals."""
    bits = value.to(tl.int32, bitcast=True)
    # NaN -> -inf, and both zeros to one. What follows is monotone in the floats' order.
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, -0x00800000, bits)
    bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # IEEE 754: negative floats order the wrong way round
    return 0x7FFFFFFF - ascending.to(tl.int64)


@triton.jit(do_not_specialize=["num_tasks", "copies", "shift", "width", "bits", "id_bits", "tiles"])
@no_type_check
def histogram_kernel(
    utility, eligible, task, prefix, closed, histogram, num_samples, num_tasks, copies, shift, width, bits, id_bits,
    tiles, BLOCK: tl.constexpr,
):  # fmt: skip
    """histogram[copy, task, digit] += 1 for eligible samples whose key starts with the digits that their task knows."""
    if tl.load(closed) == num_tasks:  # every task's key is known: this digit need not be counted
        return
    program = tl.program_id(0)
    # Programs count in different copies: with one, equal utilities would all queue at one address.
    mine = histogram + (program % copies).to(tl.int64) * (num_tasks << bits)
    for tile in range(tiles):
        start = (program.to(tl.int64) * tiles + tile) * BLOCK
        counts = load_block(eligible, start, num_samples, BLOCK) != 0
        group = load_block(task, start, num_samples, BLOCK).to(tl.int64)
        key = (_descending(load_block(utility, start, num_samples, BLOCK)) << id_bits) | (start + tl.arange(0, BLOCK))
        # A closed task's prefix is -1, which no key starts with.
        counts = counts & ((key >> (shift + width)) == tl.load(prefix + group, mask=counts, other=-1))
        digit = (key >> shift) & ((1 << width) - 1)
        tl.atomic_add(mine + (group << bits) + digit, 1, mask=counts, sem="relaxed")


@triton.jit(do_not_specialize=["num_tasks", "copies", "shift", "width"])
@no_type_check
def choose_kernel(
    histogram, prefix, need, threshold, closed, num_tasks, copies, shift, width,
    DIGITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One task: choose the digit that holds its `need`-th key, from the copies of its histogram.

    The copies are emptied for the next pass. A task is closed when all samples with that digit are needed: its prefix
    becomes -1, and its threshold the largest key that starts with its digits.
    """
    task = tl.program_id(0)
    known = tl.load(prefix + task)
    if known < 0:  # closed by an earlier digit
        return
    # Rows of copies at a time, as many as fit into the registers.
    digit, row = tl.arange(0, DIGITS), tl.arange(0, ROWS)
    at_RD = histogram + ((row.to(tl.int64) * num_tasks + task) * DIGITS)[:, None] + digit[None, :]
    count_RD = tl.zeros([ROWS, DIGITS], tl.int32)
    for first in range(0, copies, ROWS):
        exists = (first + row < copies)[:, None]
        count_RD += tl.load(at_RD, mask=exists, other=0)
        tl.store(at_RD, tl.zeros([ROWS, DIGITS], tl.int32), mask=exists)
        at_RD += num_tasks.to(tl.int64) * (ROWS * DIGITS)
    count = tl.sum(count_RD, 0)
    # The wanted key has as its digit the number of digits before whose end fewer than `wanted` samples lie.
    wanted = tl.load(need + task)
    chosen = tl.sum((tl.cumsum(count, 0) < wanted).to(tl.int32))
    here = tl.sum(tl.where(digit == chosen, count, 0))
    rest = wanted - tl.sum(tl.where(digit < chosen, count, 0))
    known = (known << width) | chosen
    if (wanted == 0) | (rest == here):  # the lower digits do not matter
        tl.store(threshold + task, tl.where(wanted == 0, -1, ((known + 1) << shift) - 1))
        tl.store(prefix + task, -1)
        tl.atomic_add(closed, 1, sem="relaxed")
    else:
        tl.store(prefix + task, known)
        tl.store(need + task, rest)


@triton.jit(do_not_specialize=["id_bits", "tiles"])
@no_type_check
def winners_kernel(
    utility, eligible, task, threshold, place, sort_key, sample, num_samples, id_bits, tiles,
    WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the samples up to their task's threshold into place[program]; or, with WRITE, copy them there."""
    program = tl.program_id(0)
    to = tl.zeros([], tl.int64)
    if WRITE:
        to = tl.load(place + program)
    for tile in range(tiles):
        start = (program.to(tl.int64) * tiles + tile) * BLOCK
        ids = start + tl.arange(0, BLOCK)
        wins = load_block(eligible, start, num_samples, BLOCK) != 0
        group = load_block(task, start, num_samples, BLOCK).to(tl.int64)
        descending = _descending(load_block(utility, start, num_samples, BLOCK))
        wins = wins & (((descending << id_bits) | ids) <= tl.load(threshold + group, mask=wins, other=-1))
        one = wins.to(tl.int32)
        if WRITE:  # in the order of the ids, so that a stable sort later leaves equal ones in it
            at = to + tl.cumsum(one, 0) - one
            tl.store(sort_key + at, (group << 32) | descending, mask=wins)
            tl.store(sample + at, ids, mask=wins)
        to += tl.sum(one)
    if not WRITE:
        tl.store(place + program, to)


@triton.jit
@no_type_check
def share_kernel(
    sorted_key, by_task, sample, weight, offset, start, whole, share, sample_by_task, num_candidates,
    WEIGHTED: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`task_shares.share` of the candidates, which stand task after task, and their ids in that order.

    WEIGHTED: shares are not below 1, and `whole` gets their integer parts, `share` the rest. OFFSET: a task's first
    share is not 1/2 of its step but offset / 4096.
    """
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < num_candidates
    key = tl.load(sorted_key + position, mask=inside, other=0)
    real = inside & (key != 0x7FFFFFFFFFFFFFFF)
    # Candidates stand sorted: a task's first has rank 0.
    rank = position - tl.load(start + (key >> 32), mask=real, other=0)
    below = 2 * tl.load(weight + (key >> 32), mask=real, other=1)
    above = 2 * rank + 1
    if OFFSET:  # (rank + offset / 4096) / weight, with one denominator
        below <<= 11
        above = (rank << 12) + tl.load(offset + (key >> 32), mask=real, other=0)
    if WEIGHTED:
        integer = above // below
        tl.store(whole + position, tl.where(real, integer, 0x7FFFFFFFFFFFFFFF), mask=inside)
        above -= integer * below
    # 62 bits after the point, in two steps of 31, each of which fits into int64.
    high = (above << 31) // below
    low = (((above << 31) - high * below) << 31) // below
    tl.store(share + position, tl.where(real, (high << 31) | low, 0x7FFFFFFFFFFFFFFF), mask=inside)
    tl.store(
        sample_by_task + position,
        tl.load(sample + tl.load(by_task + position, mask=inside, other=0), mask=inside),
        mask=inside,
    )
