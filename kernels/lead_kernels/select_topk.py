"""The fine stage of the selection: tasks in proportion in every prefix of the order, the best samples first.

Only k samples are wanted, so the pool is never sorted. A sample's *key* is (utility descending, id ascending) as one
integer of 32 bits and those of an id: keys are unique, smaller is better. Task j can fill at most c_j of the first k
places (`_quota`), so a radix select finds the key of its c_j-th best sample: a pass over the pool counts, per task, the
values of the key's next digit among the samples that agree with what is known of the wanted key; the digit in which the
c_j-th falls is then known too. The samples up to those keys, at most k - 1 + J altogether, are copied out in the order
of their ids, and only they are sorted. Weights of the tasks instead of their numbers of samples change the c_j
(`_weighted_quota`) and that last order; the pool is read in the same way.

Source of the select: Alabi, Blanchard, Gordon, Steinbach, "Fast k-selection algorithms for graphics processing units",
ACM JEA 17 (2012), here for all tasks at once.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
from torch import Tensor

from lead_kernels.backend import KernelBuild, current_device, tl, triton, uses_kernels, warps, wave_size
from lead_kernels.checks import check_device, check_shape

ORDER_BITS = 32
MAX_SAMPLES = 2**30
"""So that a key has at most 62 bits, and a quota's products and a share's fraction fit into int64."""
MAX_WEIGHT = 2**28
"""So that the products of a weighted quota fit into int64, and 62 bits after the point tell weighted shares apart."""
OFFSETS = 2**12
"""Steps in which a task's first key may lie; times a weight of 2^18 they are a denominator of 2^30."""
TASK_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
NONE = 2**63 - 1  # sorts behind every key


@triton.jit
@no_type_check
def _load(vector, start, num_samples, BLOCK: tl.constexpr):
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
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, -0x00800000, bits)
    bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # IEEE 754: negative floats order the wrong way round
    return 0x7FFFFFFF - ascending.to(tl.int64)


@triton.jit(do_not_specialize=["num_tasks", "copies", "shift", "width", "bits", "id_bits", "tiles"])
@no_type_check
def _histogram_kernel(
    utility, eligible, task, prefix, closed, histogram, num_samples, num_tasks, copies, shift, width, bits, id_bits, tiles,
    BLOCK: tl.constexpr
):  # fmt: skip
    """histogram[copy, task, digit] += 1 for eligible samples whose key starts with the digits that their task knows."""
    if tl.load(closed) == num_tasks:
        return
    program = tl.program_id(0)
    mine = histogram + (program % copies).to(tl.int64) * (num_tasks << bits)
    for tile in range(tiles):
        start = (program.to(tl.int64) * tiles + tile) * BLOCK
        counts = _load(eligible, start, num_samples, BLOCK) != 0
        group = _load(task, start, num_samples, BLOCK).to(tl.int64)
        key = (_descending(_load(utility, start, num_samples, BLOCK)) << id_bits) | (start + tl.arange(0, BLOCK))
        counts = counts & ((key >> (shift + width)) == tl.load(prefix + group, mask=counts, other=-1))
        digit = (key >> shift) & ((1 << width) - 1)
        tl.atomic_add(mine + (group << bits) + digit, 1, mask=counts, sem="relaxed")


@triton.jit(do_not_specialize=["num_tasks", "copies", "shift", "width"])
@no_type_check
def _choose_kernel(
    histogram,
    prefix,
    need,
    threshold,
    closed,
    num_tasks,
    copies,
    shift,
    width,
    DIGITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One task: add up the copies of its histogram, leave them empty for the next pass, and take the digit that holds
    the `need`-th key. A task is closed when that digit's samples are all needed: prefix -1, and the largest key with
    its digits as threshold."""
    task = tl.program_id(0)
    known = tl.load(prefix + task)
    if known < 0:
        return
    digit, row = tl.arange(0, DIGITS), tl.arange(0, ROWS)
    at_RD = histogram + ((row.to(tl.int64) * num_tasks + task) * DIGITS)[:, None] + digit[None, :]
    count_RD = tl.zeros([ROWS, DIGITS], tl.int32)
    for first in range(0, copies, ROWS):
        exists = (first + row < copies)[:, None]
        count_RD += tl.load(at_RD, mask=exists, other=0)
        tl.store(at_RD, tl.zeros([ROWS, DIGITS], tl.int32), mask=exists)
        at_RD += num_tasks.to(tl.int64) * (ROWS * DIGITS)
    count = tl.sum(count_RD, 0)
    wanted = tl.load(need + task)
    chosen = tl.sum((tl.cumsum(count, 0) < wanted).to(tl.int32))
    here = tl.sum(tl.where(digit == chosen, count, 0))
    rest = wanted - tl.sum(tl.where(digit < chosen, count, 0))
    known = (known << width) | chosen
    if (wanted == 0) | (rest == here):
        tl.store(threshold + task, tl.where(wanted == 0, -1, ((known + 1) << shift) - 1))
        tl.store(prefix + task, -1)
        tl.atomic_add(closed, 1, sem="relaxed")
    else:
        tl.store(prefix + task, known)
        tl.store(need + task, rest)


@triton.jit(do_not_specialize=["id_bits", "tiles"])
@no_type_check
def _winners_kernel(
    utility,
    eligible,
    task,
    threshold,
    place,
    sort_key,
    sample,
    num_samples,
    id_bits,
    tiles,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the samples up to their task's threshold into place[program]; or, with WRITE, copy them there."""
    program = tl.program_id(0)
    to = tl.zeros([], tl.int64)
    if WRITE:
        to = tl.load(place + program)
    for tile in range(tiles):
        start = (program.to(tl.int64) * tiles + tile) * BLOCK
        ids = start + tl.arange(0, BLOCK)
        wins = _load(eligible, start, num_samples, BLOCK) != 0
        group = _load(task, start, num_samples, BLOCK).to(tl.int64)
        descending = _descending(_load(utility, start, num_samples, BLOCK))
        wins = wins & (((descending << id_bits) | ids) <= tl.load(threshold + group, mask=wins, other=-1))
        one = wins.to(tl.int32)
        if WRITE:
            at = to + tl.cumsum(one, 0) - one
            tl.store(sort_key + at, (group << 32) | descending, mask=wins)
            tl.store(sample + at, ids, mask=wins)
        to += tl.sum(one)
    if not WRITE:
        tl.store(place + program, to)


@triton.jit
@no_type_check
def _share_kernel(
    sorted_key, by_task, sample, weight, offset, start, whole, share, sample_by_task, num_candidates,
    WEIGHTED: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`_share` of the candidates, which stand task after task, and their ids in that order. With WEIGHTED, shares are
    not below 1: `whole` gets their integer parts and `share` the rest. With OFFSET, a task's first share is not 1/2 of
    its step but offset / 4096."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < num_candidates
    key = tl.load(sorted_key + position, mask=inside, other=0)
    real = inside & (key != 0x7FFFFFFFFFFFFFFF)
    rank = position - tl.load(start + (key >> 32), mask=real, other=0)
    below = 2 * tl.load(weight + (key >> 32), mask=real, other=1)
    above = 2 * rank + 1
    if OFFSET:
        below <<= 11
        above = (rank << 12) + tl.load(offset + (key >> 32), mask=real, other=0)
    if WEIGHTED:
        integer = above // below
        tl.store(whole + position, tl.where(real, integer, 0x7FFFFFFFFFFFFFFF), mask=inside)
        above -= integer * below
    high = (above << 31) // below
    low = (((above << 31) - high * below) << 31) // below
    tl.store(share + position, tl.where(real, (high << 31) | low, 0x7FFFFFFFFFFFFFFF), mask=inside)
    tl.store(
        sample_by_task + position,
        tl.load(sample + tl.load(by_task + position, mask=inside, other=0), mask=inside),
        mask=inside,
    )


@triton.jit(do_not_specialize=["tiles"])
@no_type_check
def _present_kernel(mask, group, present, num_samples, tiles, BLOCK: tl.constexpr):
    """present[group] = 1 where `mask` holds. Only the first to see a 0 writes: a pool would queue at few addresses."""
    for tile in range(tiles):
        start = (tl.program_id(0).to(tl.int64) * tiles + tile) * BLOCK
        holds = _load(mask, start, num_samples, BLOCK) != 0
        label = _load(group, start, num_samples, BLOCK).to(tl.int64)
        new = tl.load(present + label, mask=holds, other=1) == 0
        tl.store(present + label, tl.full([BLOCK], 1, tl.uint8), mask=new)


class Launch(NamedTuple):
    """How a pool is cut up. All of it follows from shapes alone."""

    block: int
    """Samples that a program takes at a time."""
    tiles: int
    """Blocks of one program."""
    programs: int
    bits: int
    """Most bits of a digit."""
    copies: int
    """Histograms; program p counts in the one of number p mod copies."""


THREADS = 256
COUNTERS = 2**22
CHOOSE_TILE = 2**13


def _launch(num_samples: int, num_tasks: int) -> Launch:
    """Blocks, digits and histograms for a pool of N samples and J tasks.

    Bytes. A pass reads 4 of utility, 1 of eligibility and the bytes of a task: 6 per sample with a task of 1 byte.
    Values take ceil(32 / bits) passes, ids, where the wanted value is not unique in its task, up to ceil((32 + bits of
    an id) / bits) together; a pass with nothing left to find returns at once. Counting and copying the chosen out are
    two more.
    At N = 100 million, J <= 64: 3 to 6 and 2 passes, 30 to 48 N = 3.0 to 4.8 GB, 0.6 to 1.0 ms at the 4.8 TB/s of an
    H200 (one pass 0.13 ms). Sorting it all as int64 costs 8 radix passes of 32 N (a read and a write of key and index)
    and 3 GB of scratch. Scratch here: 16 MiB, and about 80 bytes a candidate. Small pools cost launches: about 50 for
    600 thousand samples.

    Contention. Counting is one integer atomic for every sample still in question: all eligible ones in the first pass,
    in later passes those of one digit; with equal utilities all, at one address. 100 million at one address would take
    about 60 ms (one a clock), so there are up to 256 copies of the histogram, all together of 2^22 counters, which stay
    in the second-level cache. A digit has 11 bits, fewer where J x 2^bits would pass 2^17 counters, so that 32 copies
    fit up to 8192 tasks.
    """
    block = 2048
    tiles = min(max(num_samples // (block * 1024), 1), 16)
    programs = max(1, -(-num_samples // (block * tiles)))
    bits = min(max(17 - (num_tasks - 1).bit_length(), 4), 11)
    copies = max(1, min(COUNTERS // (num_tasks << bits), programs // 4, 256))
    return Launch(block, tiles, programs, bits, copies)


def _digits(total_bits: int, bits: int) -> list[tuple[int, int]]:
    """(shift, width) of the digits of a key, from the top; the last may be narrower."""
    shifts = [*range(total_bits - bits, 0, -bits), 0]
    return [(shift, min(bits, total_bits - index * bits)) for index, shift in enumerate(shifts)]


def _reach(k: int, num_samples: int, num_tasks: int, offset: bool = False) -> int:
    """2 (k - 1) + J, see `_quota`, with offsets 2 (k - 1) + 2 J; more than N places change nothing."""
    return 2 * min(k, num_samples) - 2 + (2 * num_tasks if offset else num_tasks)


def _quota(size_J: Tensor, reach: int) -> Tensor:
    """c_j = min(n_j, floor((n_j (2 (k - 1) + J) + n) / (2 n))): the most samples of task j among the first k.

    Let x be the k-th key of the order. Of task j, ceil(x n_j - 1/2) samples have keys below x, and these are fewer than
    k over all tasks: x n - J/2 <= k - 1. And floor(x n_j + 1/2) of its samples have keys up to x, so that c_j =
    floor(n_j (k - 1 + J/2) / n + 1/2) is enough. The sum over the tasks is at most k - 1 + J/2 + J/2.
    """
    eligible = size_J.sum()
    return torch.minimum(size_J, (size_J * reach + eligible) // (2 * eligible).clamp(min=1))


def _weighted_quota(size_J: Tensor, weight_J: Tensor, reach: int, offset: bool = False) -> Tensor:
    """c_j = min(n_j, floor(X w_j + 1/2)): the most samples of task j among the first k, where tasks may run out before.

    X is the level up to which water fills the tasks, vessels of width w_j and volume n_j, when k - 1 + J/2 of it are
    poured in: f(X) = sum_j min(n_j, X w_j) = k - 1 + J/2; no bound where they hold less. A task without weight holds
    nothing: n_j = 0 below.

    Let x be the k-th key of the order, or the last if there are fewer. Of task j, min(n_j, ceil(x w_j - 1/2)) >=
    min(n_j, x w_j) - 1/2 samples have keys below x, and these are fewer than k over all tasks: f(x) <= k - 1 + J/2 and
    so, f growing up to the last key, x <= X. And min(n_j, floor(x w_j + 1/2)) of its samples have keys up to x, so that
    c_j is enough. The sum over the tasks is at most f(X) + J/2 <= k - 1 + J.

    With the tasks in ascending order of n_j / w_j, where they run out, let N be the samples of those before task j and
    W the weights of the others. Task j has run out at X where f(n_j / w_j) = N + W n_j / w_j <= k - 1 + J/2, that is
    where n_j <= w_j (2 (k - 1) + J - 2 N) / (2 W). These tasks taken out, X = (2 (k - 1) + J - 2 N) / (2 W) with the N
    of all of them and the W of the rest. All in int64: with n <= 2^30 and w_j <= 2^28 the products stay below 2^28 (2^31 + J).

    With `offset`, keys are (r + u_j) / w_j for any u_j in [0, 1). Then min(n_j, x w_j) - 1 samples at least have keys
    below x and min(n_j, floor(x w_j) + 1) at most keys up to x: reach is 2 (k - 1) + 2 J, c_j = min(n_j, floor(X w_j) +
    1), and their sum at most k - 1 + 2 J.
    """
    size_J = size_J * (weight_J > 0)
    order = _ascending(size_J, weight_J.clamp(min=1))
    size, weight = size_J[order], weight_J[order]
    left = weight.sum() - weight.cumsum(0) + weight
    out = size <= weight * (reach - 2 * (size.cumsum(0) - size)) // (2 * left).clamp(min=1)
    rest, left = reach - 2 * (size * out).sum(), (weight * ~out).sum()
    bound_J = (weight_J * rest + (2 * left if offset else left)) // (2 * left).clamp(min=1)
    return torch.where(left > 0, torch.minimum(size_J, bound_J), size_J)


def _fraction(above: Tensor, below: Tensor) -> Tensor:
    """floor(2^62 a / b) for 0 <= a < b <= 2^31, in int64."""
    high = (above << 31) // below
    rest = (above << 31) - high * below
    return (high << 31) | ((rest << 31) // below)


def _share(rank: Tensor, size: Tensor) -> Tensor:
    """floor(2^62 (2 r + 1) / (2 n)): orders candidates by (r + 1/2) / n exactly, in int64.

    Two unequal fractions with denominators 2 n and 2 m differ by at least 1 / (2 n m) > 2^-62, as n + m <= 2^30; equal
    ones stay equal.
    """
    return _fraction(2 * rank + 1, 2 * size)


def _by_parts(whole: Tensor, fraction: Tensor) -> Tensor:
    """The indices that sort numbers of two parts, the earlier first among equal ones."""
    by_fraction = torch.sort(fraction, stable=True).indices
    return by_fraction[torch.sort(whole[by_fraction], stable=True).indices]


def _ascending(above: Tensor, below: Tensor) -> Tensor:
    """Indices that sort the quotients a / b exactly, ties in order; 0 <= a < 2^63, 1 <= b <= 2^29.

    Two unequal fractions with denominators up to 2^29 differ by at least 2^-58, so that 62 bits after the point tell
    them apart; with the bits before it they do not fit into one integer.
    """
    whole = above // below
    return _by_parts(whole, _fraction(above - whole * below, below))


def _on_gpu(
    utility: Tensor,
    eligible: Tensor,
    task: Tensor,
    num_tasks: int,
    k: int,
    weight: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    utility, eligible, task = utility.contiguous(), eligible.contiguous(), task.contiguous()
    num_samples, device = utility.shape[0], utility.device
    launch, wave = _launch(num_samples, num_tasks), wave_size(utility.device)
    id_bits = (num_samples - 1).bit_length()
    num_warps, grid = warps(THREADS, wave), (launch.programs,)

    # Rows of even length start at multiples of 16 bytes, as whole tensors do: one compilation serves all.
    prefix, threshold = torch.zeros(2, num_tasks + num_tasks % 2, dtype=torch.int64, device=device)
    closed = torch.zeros(1, dtype=torch.int32, device=device)
    histogram = torch.zeros(launch.copies, num_tasks, 1 << launch.bits, dtype=torch.int32, device=device)
    pool, rows = (utility, eligible, task), max(1, CHOOSE_TILE >> launch.bits)
    for number, (shift, width) in enumerate(_digits(ORDER_BITS + id_bits, launch.bits)):
        _histogram_kernel[grid](
            *pool, prefix, closed, histogram, num_samples, num_tasks, launch.copies, shift, width, launch.bits, id_bits, launch.tiles,
            BLOCK=launch.block, num_warps=num_warps,
        )  # fmt: skip
        if number == 0:  # all of them have been counted
            size = histogram.sum((0, 2))
            reach = _reach(k, num_samples, num_tasks, offset is not None)
            quota = _quota(size, reach) if weight is None else _weighted_quota(size, weight, reach, offset is not None)
            need = quota.clone()
        _choose_kernel[(num_tasks,)](
            histogram, prefix, need, threshold, closed, num_tasks, launch.copies, shift, width,
            DIGITS=1 << launch.bits, ROWS=rows, num_warps=num_warps,
        )  # fmt: skip

    # The winners in the order of their ids, so that a stable sort keeps it among equal ones: count, scan, copy.
    candidates = min(num_samples, k - 1 + (1 if offset is None else 2) * num_tasks)
    sort_key = torch.full((candidates,), NONE, dtype=torch.int64, device=device)
    sample = torch.full((candidates,), num_samples, dtype=torch.int64, device=device)
    count = torch.empty(launch.programs, dtype=torch.int64, device=device)
    arguments = (sort_key, sample, num_samples, id_bits, launch.tiles)
    _winners_kernel[grid](*pool, threshold, count, *arguments, WRITE=False, BLOCK=launch.block, num_warps=num_warps)
    _winners_kernel[grid](
        *pool, threshold, count.cumsum(0) - count, *arguments, WRITE=True, BLOCK=launch.block, num_warps=num_warps
    )

    sort_key, by_task = torch.sort(sort_key, stable=True)
    share, sample_by_task = torch.empty_like(sort_key), torch.empty_like(sample)
    whole = share if weight is None else torch.empty_like(share)
    _share_kernel[(triton.cdiv(candidates, launch.block),)](
        sort_key, by_task, sample, size if weight is None else weight, size if offset is None else offset, quota.cumsum(0) - quota,
        whole, share, sample_by_task, candidates,
        WEIGHTED=weight is not None, OFFSET=offset is not None, BLOCK=launch.block, num_warps=num_warps,
    )  # fmt: skip
    best = torch.sort(share, stable=True).indices if weight is None else _by_parts(whole, share)
    return _padded(sample_by_task[best[:k]], k, num_samples)


def _padded(order: Tensor, k: int, num_samples: int) -> Tensor:
    return order if order.shape[0] == k else torch.cat([order, order.new_full((k - order.shape[0],), num_samples)])


def _descending_on_host(utility: Tensor) -> Tensor:
    """`_descending` in PyTorch."""
    bits = (torch.where(utility.isnan(), -torch.inf, utility) + 0.0).view(torch.int32)
    return 0x7FFFFFFF - (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def _on_host(
    utility: Tensor,
    eligible: Tensor,
    task: Tensor,
    num_tasks: int,
    k: int,
    weight: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """The eligible samples' number is known here, and sorting them all as integers is no slower than selecting."""
    num_samples = utility.shape[0]
    ids = eligible.nonzero().squeeze(1)
    group = task.index_select(0, ids).long()
    by_task = torch.sort((group << 32) | _descending_on_host(utility.index_select(0, ids)), stable=True).indices

    size_J = torch.bincount(group, minlength=num_tasks)
    reach = _reach(k, num_samples, num_tasks, offset is not None)
    quota_J = _quota(size_J, reach) if weight is None else _weighted_quota(size_J, weight, reach, offset is not None)
    group = torch.repeat_interleave(quota_J)
    rank = torch.arange(group.shape[0]) - (quota_J.cumsum(0) - quota_J).index_select(0, group)
    if weight is None:
        best = torch.sort(_share(rank, size_J.index_select(0, group)), stable=True).indices[:k]
    elif offset is None:
        best = _ascending(2 * rank + 1, 2 * weight.index_select(0, group))[:k]
    else:
        best = _ascending((rank << 12) + offset.index_select(0, group), weight.index_select(0, group) << 12)[:k]
    place = (size_J.cumsum(0) - size_J).index_select(0, group[best]) + rank[best]
    return _padded(ids[by_task[place]], k, num_samples)


@torch.library.custom_op("lead_kernels::select_topk", mutates_args=())
def _select_topk(
    utility: Tensor,
    eligible: Tensor,
    task: Tensor,
    num_tasks: int,
    k: int,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    with current_device(utility):
        if weight is not None:  # a wrong one would give more candidates than there is room for
            weight = weight.clamp(0, MAX_WEIGHT if offset is None else MAX_WEIGHT >> 10).contiguous()
        if offset is not None:
            offset = offset.clamp(0, OFFSETS - 1).contiguous()
        return (_on_gpu if uses_kernels(utility) else _on_host)(utility, eligible, task, num_tasks, k, weight, offset)


@_select_topk.register_fake
def _(
    utility: Tensor,
    eligible: Tensor,
    task: Tensor,
    num_tasks: int,
    k: int,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    return utility.new_empty((k,), dtype=torch.int64)


@torch.library.custom_op("lead_kernels::groups_present", mutates_args=())
def _groups_present(mask: Tensor, group: Tensor, num_groups: int) -> Tensor:
    present = torch.zeros(num_groups, dtype=torch.uint8, device=mask.device)
    if uses_kernels(mask):
        launch = _launch(mask.shape[0], 1)
        with current_device(mask):
            _present_kernel[(launch.programs,)](
                mask.contiguous(), group.contiguous(), present, mask.shape[0], launch.tiles,
                BLOCK=launch.block, num_warps=warps(THREADS, wave_size(mask.device)),
            )  # fmt: skip
    else:
        present.scatter_reduce_(0, group.long(), mask.to(torch.uint8), "amax")
    return present.view(torch.bool)


@_groups_present.register_fake
def _(mask: Tensor, group: Tensor, num_groups: int) -> Tensor:
    return mask.new_empty((num_groups,))


def select_topk(
    utility: Tensor,
    eligible: Tensor,
    task: Tensor,
    num_tasks: int,
    k: int,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The first `k` eligible samples: tasks interleaved by their eligible samples or `weight`, highest utility first.

    utility: fp32 [N] (NaN ranks last, with -inf); eligible: bool [N]; task: integer [N] (int64 or smaller: a byte is
    read fastest), in [0, num_tasks), which is not checked; weight: int64 [num_tasks], 0 to 2^28 each (values are not
    checked: what is outside counts as the nearest of these). Returns int64 [k]; entries past the number of eligible
    samples (of the tasks with a weight) are N.

    Within a task, samples are ranked r = 0, 1, ... by utility descending (ties by id); a sample's key is (r + 0.5) /
    (eligible samples of the task), and the order is by key ascending (ties by task), compared exactly. The samples of
    task j with key <= x number x n_j to within 1/2, so that with J tasks the share of task j in any prefix of m samples
    is within 1/2 + J/2 n_j / n of m n_j / n (n = all eligible).

    With `weight`, a sample's key is (r + 0.5) / weight[task] instead, compared as exactly: tasks of equal weight get
    equally many places whatever their sizes. A task of weight 0 gives no sample. One whose samples run out has no more
    keys, and the others fill the places in proportion to their weights. Weights in proportion to the eligible samples
    give the order that None gives.

    With `offset` (int64 [num_tasks], 0 to 4095; weights then at most 2^18), a sample's key is (r + offset[task] / 4096)
    / weight[task]. With 1/2 for all, a task that is due less than half a sample in a prefix gets none, and in every
    short prefix anew; with offsets drawn uniformly it gets as many as it is due on average.

    Raises ValueError on shapes, dtypes, devices, k or num_tasks below 1, or N above 2^30. Time and memory: see
    `_launch`; weights add sorts of [num_tasks] and one more of the candidates.
    """
    num_samples = utility.shape[0]
    check_shape("utility", utility, (num_samples,), (torch.float32,))
    check_shape("eligible", eligible, (num_samples,), (torch.bool,))
    check_shape("task", task, (num_samples,), TASK_DTYPES)
    if weight is not None:
        check_shape("weight", weight, (num_tasks,), (torch.int64,))
    if offset is not None:
        check_shape("offset", offset, (num_tasks,), (torch.int64,))
        if weight is None:
            raise ValueError("offset: needs weights")
    check_device(utility.device, eligible=eligible, task=task, weight=weight, offset=offset)
    if not 1 <= num_samples <= MAX_SAMPLES or num_tasks < 1 or k < 1:
        raise ValueError(
            f"{num_samples} samples, num_tasks {num_tasks}, k {k}: expected 1 to 2^30 samples, and at least 1 of the others"
        )
    return _select_topk(utility, eligible, task, num_tasks, k, weight, offset)


def groups_present(mask: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """bool [num_groups]: whether `mask` (bool [N]) holds for a sample of `group` (integer [N] < num_groups, unchecked).

    Which clusters still have eligible samples, without counting them: atomics of a whole pool on a few counters would
    queue up. Reads each sample once. Raises ValueError on shapes, dtypes and devices.
    """
    check_shape("group", group, (mask.shape[0],), TASK_DTYPES)
    check_shape("mask", mask, (mask.shape[0],), (torch.bool,))
    check_device(mask.device, group=group)
    return _groups_present(mask, group, num_groups)


def builds() -> list[KernelBuild]:
    """Every kernel with every type of `task` and every width of a digit."""
    pool = {"utility": "*fp32", "eligible": "*i1"}
    found = []
    block = _launch(1, 1).block
    for kind in ("u8", "i16", "i32", "i64"):
        state = {**pool, "task": f"*{kind}", "threshold": "*i64", "place": "*i64", "sort_key": "*i64", "sample": "*i64"}
        for write in (False, True):
            signature = {
                **state,
                "num_samples": "i32",
                "id_bits": "i32",
                "tiles": "i32",
                "WRITE": "constexpr",
                "BLOCK": "constexpr",
            }
            name = f"select_topk {'copy' if write else 'count'} {kind}"
            found.append(KernelBuild(name, _winners_kernel, signature, {"WRITE": write, "BLOCK": block}, THREADS))
        numbers = ("num_samples", "num_tasks", "copies", "shift", "width", "bits", "id_bits", "tiles")
        signature = {
            **pool,
            "task": f"*{kind}",
            "prefix": "*i64",
            "closed": "*i32",
            "histogram": "*i32",
            **dict.fromkeys(numbers, "i32"),
        }
        signature |= {"BLOCK": "constexpr"}
        found.append(
            KernelBuild(f"select_topk histogram {kind}", _histogram_kernel, signature, {"BLOCK": block}, THREADS)
        )
        signature = {
            "mask": "*i1",
            "group": f"*{kind}",
            "present": "*u8",
            "num_samples": "i32",
            "tiles": "i32",
            "BLOCK": "constexpr",
        }
        found.append(KernelBuild(f"groups_present {kind}", _present_kernel, signature, {"BLOCK": block}, THREADS))
    vectors = {**dict.fromkeys(("prefix", "need", "threshold"), "*i64"), "closed": "*i32"}
    numbers = dict.fromkeys(("num_tasks", "copies", "shift", "width"), "i32")
    signature = {"histogram": "*i32:16", **vectors, **numbers, "DIGITS": "constexpr", "ROWS": "constexpr"}
    for bits in range(4, 12):
        constants = {"DIGITS": 1 << bits, "ROWS": max(1, CHOOSE_TILE >> bits)}
        found.append(KernelBuild(f"select_topk choose {bits} bits", _choose_kernel, signature, constants, THREADS))
    names = ("sorted_key", "by_task", "sample", "weight", "offset", "start", "whole", "share", "sample_by_task")
    vectors = dict.fromkeys(names, "*i64")
    signature = {
        **vectors,
        "num_candidates": "i32",
        "WEIGHTED": "constexpr",
        "OFFSET": "constexpr",
        "BLOCK": "constexpr",
    }
    for name, weighted, offset in (
        ("share", False, False),
        ("weighted share", True, False),
        ("weighted share with offsets", True, True),
    ):
        constants = {"WEIGHTED": weighted, "OFFSET": offset, "BLOCK": block}
        found.append(KernelBuild(f"select_topk {name}", _share_kernel, signature, constants, THREADS))
    return found
