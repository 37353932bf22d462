"""The selection on a GPU: a radix select for all tasks at once, so that the pool is never sorted.

Task j can fill at most c_j of the first k places (`task_shares.quota`), and a radix select finds the key of its c_j-th
best sample: a pass over the pool counts, per task, the values of the key's next digit among the samples that agree with
what is known of the wanted key; the digit in which the c_j-th falls is then known too. The samples up to those keys, at
most k - 1 + J altogether, are copied out in the order of their ids, and only they are sorted. Weights of the tasks
change the c_j (`task_shares.weighted_quota`) and that last order; the pool is read in the same way.

Source of the select: Alabi, Blanchard, Gordon, Steinbach, "Fast k-selection algorithms for graphics processing units",
ACM JEA 17 (2012), here for all tasks at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lead_kernels.backend import KernelBuild, cdiv, num_warps
from lead_kernels.radix_kernels import (
    NONE,
    ORDER_BITS,
    choose_kernel,
    histogram_kernel,
    share_kernel,
    winners_kernel,
)
from lead_kernels.task_shares import reach_of, sorted_by_parts, task_quota

THREADS = 256
COUNTERS = 2**22
"""Of all histograms together: 16 MiB, which stay in the L2 cache."""
CHOOSE_TILE = 2**13
"""Counters that a program adds up at a time."""


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


def launch_shape(num_samples: int, num_tasks: int) -> Launch:
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
    programs = max(1, cdiv(num_samples, block * tiles))
    bits = min(max(17 - (num_tasks - 1).bit_length(), 4), 11)
    copies = max(1, min(COUNTERS // (num_tasks << bits), programs // 4, 256))
    return Launch(block, tiles, programs, bits, copies)


def digits_of(total_bits: int, bits: int) -> list[tuple[int, int]]:
    """(shift, width) of the digits of a key, from the top; the last may be narrower."""
    shifts = [*range(total_bits - bits, 0, -bits), 0]
    return [(shift, min(bits, total_bits - index * bits)) for index, shift in enumerate(shifts)]


def select_on_gpu(
    utility: Tensor,
    eligible: Tensor,
    task: Tensor,
    num_tasks: int,
    k: int,
    weight: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """The first k of the order, as ids; fewer where there are not so many candidates, N after the last sample."""
    pool = (utility.contiguous(), eligible.contiguous(), task.contiguous())
    num_samples = utility.shape[0]
    launch = launch_shape(num_samples, num_tasks)
    reach = reach_of(k, num_samples, num_tasks, offset is not None)

    def quota_of(size_J: Tensor) -> Tensor:
        return task_quota(size_J, weight, reach, offset is not None)

    threshold_J, size_J, quota_J = _thresholds(pool, num_tasks, launch, quota_of)
    room = min(num_samples, k - 1 + (1 if offset is None else 2) * num_tasks)  # the most that the quotas add up to
    sort_key, sample = _candidates(pool, threshold_J, room, launch)

    # By task and, within it, by utility: what a share depends on is then a candidate's place.
    sort_key, by_task = torch.sort(sort_key, stable=True)
    share, sample_by_task = torch.empty_like(sort_key), torch.empty_like(sample)
    whole = share if weight is None else torch.empty_like(share)
    share_kernel[(cdiv(room, launch.block),)](
        sort_key, by_task, sample, size_J if weight is None else weight, size_J if offset is None else offset,
        quota_J.cumsum(0) - quota_J, whole, share, sample_by_task, room,
        WEIGHTED=weight is not None, OFFSET=offset is not None, BLOCK=launch.block,
        num_warps=num_warps(THREADS, utility),
    )  # fmt: skip
    best = torch.sort(share, stable=True).indices if weight is None else sorted_by_parts(whole, share)
    return sample_by_task[best[:k]]


def _thresholds(
    pool: tuple[Tensor, ...], num_tasks: int, launch: Launch, quota_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every task: the key of its c_j-th sample, its eligible samples, and c_j = quota_of(eligible samples)."""
    num_samples, device = pool[0].shape[0], pool[0].device
    id_bits = (num_samples - 1).bit_length()
    warps = num_warps(THREADS, pool[0])
    # Rows of even length start at multiples of 16 bytes, as whole tensors do: one compilation serves all.
    prefix, threshold = torch.zeros(2, num_tasks + num_tasks % 2, dtype=torch.int64, device=device)
    closed = torch.zeros(1, dtype=torch.int32, device=device)
    histogram = torch.zeros(launch.copies, num_tasks, 1 << launch.bits, dtype=torch.int32, device=device)
    rows = max(1, CHOOSE_TILE >> launch.bits)
    for number, (shift, width) in enumerate(digits_of(ORDER_BITS + id_bits, launch.bits)):
        histogram_kernel[(launch.programs,)](
            *pool, prefix, closed, histogram, num_samples, num_tasks, launch.copies, shift, width, launch.bits, id_bits,
            launch.tiles, BLOCK=launch.block, num_warps=warps,
        )  # fmt: skip
        if number == 0:  # no key had to begin in any way: all eligible samples have been counted
            size_J = histogram.sum((0, 2))
            quota_J = quota_of(size_J)
            need = quota_J.clone()
        choose_kernel[(num_tasks,)](
            histogram, prefix, need, threshold, closed, num_tasks, launch.copies, shift, width,
            DIGITS=1 << launch.bits, ROWS=rows, num_warps=warps,
        )  # fmt: skip
    return threshold, size_J, quota_J


def _candidates(pool: tuple[Tensor, ...], threshold_J: Tensor, room: int, launch: Launch) -> tuple[Tensor, Tensor]:
    """(task and utility as one sort key, id) of the samples up to their task's threshold, in the order of their ids.

    In that order a stable sort leaves equal ones. Count, scan, copy; the rest of the `room` is NONE and N.
    """
    num_samples, device = pool[0].shape[0], pool[0].device
    id_bits = (num_samples - 1).bit_length()
    sort_key = torch.full((room,), NONE, dtype=torch.int64, device=device)
    sample = torch.full((room,), num_samples, dtype=torch.int64, device=device)
    count = torch.empty(launch.programs, dtype=torch.int64, device=device)

    def pass_over_pool(place: Tensor, write: bool) -> None:
        winners_kernel[(launch.programs,)](
            *pool, threshold_J, place, sort_key, sample, num_samples, id_bits, launch.tiles,
            WRITE=write, BLOCK=launch.block, num_warps=num_warps(THREADS, pool[0]),
        )  # fmt: skip

    pass_over_pool(count, write=False)
    pass_over_pool(count.cumsum(0) - count, write=True)
    return sort_key, sample


def builds() -> list[KernelBuild]:
    """Every kernel with every type of `task` and every width of a digit."""
    found = []
    for kind in ("u8", "i16", "i32", "i64"):
        found += _pool_builds(kind)
    for bits in range(4, 12):
        constants = {"DIGITS": 1 << bits, "ROWS": max(1, CHOOSE_TILE >> bits)}
        signature = {
            "histogram": "*i32:16", "prefix": "*i64", "need": "*i64", "threshold": "*i64", "closed": "*i32",
            "num_tasks": "i32", "copies": "i32", "shift": "i32", "width": "i32",
            "DIGITS": "constexpr", "ROWS": "constexpr",
        }  # fmt: skip
        found.append(KernelBuild(f"select_topk choose {bits} bits", choose_kernel, signature, constants, THREADS))
    shares = (
        ("share", False, False),
        ("weighted share", True, False),
        ("weighted share with offsets", True, True),
    )
    for name, weighted, offset in shares:
        signature = {
            "sorted_key": "*i64", "by_task": "*i64", "sample": "*i64", "weight": "*i64", "offset": "*i64",
            "start": "*i64", "whole": "*i64", "share": "*i64", "sample_by_task": "*i64", "num_candidates": "i32",
            "WEIGHTED": "constexpr", "OFFSET": "constexpr", "BLOCK": "constexpr",
        }  # fmt: skip
        constants = {"WEIGHTED": weighted, "OFFSET": offset, "BLOCK": launch_shape(1, 1).block}
        found.append(KernelBuild(f"select_topk {name}", share_kernel, signature, constants, THREADS))
    return found


def _pool_builds(kind: str) -> list[KernelBuild]:
    """The kernels that read the pool, whose `task` has type `kind`."""
    block = launch_shape(1, 1).block
    pool = {"utility": "*fp32", "eligible": "*i1", "task": f"*{kind}"}
    histogram = {
        **pool, "prefix": "*i64", "closed": "*i32", "histogram": "*i32", "num_samples": "i32", "num_tasks": "i32",
        "copies": "i32", "shift": "i32", "width": "i32", "bits": "i32", "id_bits": "i32", "tiles": "i32",
        "BLOCK": "constexpr",
    }  # fmt: skip
    winners = {
        **pool, "threshold": "*i64", "place": "*i64", "sort_key": "*i64", "sample": "*i64", "num_samples": "i32",
        "id_bits": "i32", "tiles": "i32", "WRITE": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    return [
        KernelBuild(f"select_topk histogram {kind}", histogram_kernel, histogram, {"BLOCK": block}, THREADS),
        KernelBuild(f"select_topk count {kind}", winners_kernel, winners, {"WRITE": False, "BLOCK": block}, THREADS),
        KernelBuild(f"select_topk copy {kind}", winners_kernel, winners, {"WRITE": True, "BLOCK": block}, THREADS),
    ]
