"""The order of the fine stage: proportional prefixes, utility, ties, dummies, weights; and the radix select."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lead_kernels import groups_present, radix_select, reference, select_topk, task_shares
from lead_kernels.radix_kernels import NONE, ORDER_BITS, share_kernel

pytestmark = pytest.mark.slow

module = importlib.import_module("lead_kernels.select_topk")  # the package's attribute of this name is the function

VALUES = st.sampled_from([0.0, -0.0, 1.5, -2.0, 1e-40, -1e-40, 3e38, -3e38, torch.inf, -torch.inf, torch.nan, 0.1, 0.2])
DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
property_test = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pools then have several programs of two blocks, with three histograms that are added up two at a time."""

    def launch(num_samples: int, num_tasks: int) -> Any:
        block = 8 if num_samples < 100 else 256
        return radix_select.Launch(block, 2, max(1, -(-num_samples // (2 * block))), 5 if num_tasks < 10 else 3, 3)

    monkeypatch.setattr(radix_select, "launch_shape", launch)
    monkeypatch.setattr(importlib.import_module("lead_kernels.groups_present"), "launch_shape", launch)
    monkeypatch.setattr(radix_select, "CHOOSE_TILE", 64)


def expected(
    utility: Tensor, eligible: Tensor, task: Tensor, num_tasks: int, k: int, *weights: Tensor | None
) -> Tensor:
    return reference.select_topk(
        torch.where(utility.isnan(), -torch.inf, utility), eligible, task, num_tasks, k, *weights
    )


@property_test
@given(
    rows=st.lists(st.tuples(VALUES, st.booleans(), st.integers(0, 3)), min_size=1, max_size=40),
    k=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES),
)
def test_agrees_with_reference(form: str, rows: list[tuple[float, bool, int]], k: int, dtype: torch.dtype) -> None:
    utility, eligible, task = (torch.tensor(column) for column in zip(*rows, strict=True))
    want = expected(utility, eligible, task, 4, k)
    assert torch.equal(select_topk(utility, eligible, task.to(dtype), 4, k), want)


WEIGHTS = st.one_of(st.integers(0, 5), st.integers(0, 2**28), st.sampled_from([0, 1, 2**28 - 1, 2**28]))


@property_test
@given(
    rows=st.lists(st.tuples(VALUES, st.booleans(), st.integers(0, 3)), min_size=1, max_size=40),
    k=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES),
    weights=st.lists(WEIGHTS, min_size=4, max_size=4),
)
def test_agrees_with_reference_by_weight(
    form: str, rows: list[tuple[float, bool, int]], k: int, dtype: torch.dtype, weights: list[int]
) -> None:
    utility, eligible, task = (torch.tensor(column) for column in zip(*rows, strict=True))
    weight = torch.tensor(weights)
    want = expected(utility, eligible, task, 4, k, weight)
    assert torch.equal(select_topk(utility, eligible, task.to(dtype), 4, k, weight), want)


@property_test
@given(
    rows=st.lists(st.tuples(VALUES, st.booleans(), st.integers(0, 3)), min_size=1, max_size=40),
    k=st.integers(1, 50),
    weights=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 2**18)), min_size=4, max_size=4),
    offsets=st.lists(st.integers(0, 4095), min_size=4, max_size=4),
)
def test_agrees_with_reference_by_weight_and_offset(
    form: str, rows: list[tuple[float, bool, int]], k: int, weights: list[int], offsets: list[int]
) -> None:
    utility, eligible, task = (torch.tensor(column) for column in zip(*rows, strict=True))
    weight, offset = torch.tensor(weights), torch.tensor(offsets)
    want = expected(utility, eligible, task, 4, k, weight, offset)
    assert torch.equal(select_topk(utility, eligible, task, 4, k, weight, offset), want)


def test_with_drawn_offsets_a_small_task_gets_what_it_is_due(form: str) -> None:
    """Of 8 places a task with 1/32 of the weight is due a quarter of a sample: none in every round by halves, one in a
    quarter of them by offsets; and offsets of a half are the halves."""
    g = torch.Generator().manual_seed(0)
    utility, task = torch.rand(64, generator=g), (torch.arange(64) < 2).long()
    every, weight = torch.ones(64, dtype=torch.bool), torch.tensor([31, 1])
    halves = select_topk(utility, every, task, 2, 8, weight)
    assert int((task[halves] == 1).sum()) == 0
    assert torch.equal(select_topk(utility, every, task, 2, 8, weight, torch.full((2,), 2048)), halves)
    drawn = [select_topk(utility, every, task, 2, 8, weight, torch.tensor([2048, 64 * u + 32])) for u in range(64)]
    assert sum(int((task[order] == 1).sum()) for order in drawn) in (
        15,
        16,
    )  # of 64; the 8th place ends between 7.5 and 8 times 1 / 31
    with pytest.raises(ValueError, match="given without weight"):
        select_topk(utility, every, task, 2, 8, None, torch.zeros(2, dtype=torch.int64))


@property_test
@given(
    rows=st.lists(st.tuples(VALUES, st.booleans(), st.integers(0, 3)), min_size=1, max_size=40),
    k=st.integers(1, 50),
    factor=st.integers(1, 1000),
)
def test_weights_like_sizes_change_nothing(form: str, rows: list[tuple[float, bool, int]], k: int, factor: int) -> None:
    utility, eligible, task = (torch.tensor(column) for column in zip(*rows, strict=True))
    weight = factor * torch.bincount(task[eligible], minlength=4)
    assert torch.equal(select_topk(utility, eligible, task, 4, k, weight), select_topk(utility, eligible, task, 4, k))


SHAPES = {  # samples, tasks, k, share of the first task, share of eligible samples, values
    "one task": (300, 1, 20, 1.0, 0.8, "any"),
    "one best": (300, 3, 1, 0.5, 0.8, "any"),
    "more places than samples": (50, 3, 80, 0.4, 1.0, "any"),
    "as many places as samples": (50, 3, 50, 0.4, 1.0, "any"),
    "more tasks than samples": (40, 90, 25, 0.1, 1.0, "any"),
    "one task has nearly all": (600, 5, 40, 0.99, 1.0, "any"),
    "empty tasks": (300, 40, 30, 0.9, 0.1, "any"),
    "nobody": (300, 4, 10, 0.5, 0.0, "any"),
    "one sample": (1, 1, 3, 1.0, 1.0, "any"),
    "all equal": (530, 2, 33, 0.7, 1.0, "equal"),
    "few values": (530, 3, 100, 0.4, 0.9, "few"),
    "neighbours": (530, 3, 100, 0.4, 0.9, "neighbours"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_pools_of_every_kind(form: str, shape: str) -> None:
    count, tasks, k, first, open_share, values = SHAPES[shape]
    g = torch.Generator().manual_seed(3)
    task = torch.where(torch.rand(count, generator=g) < first, 0, torch.randint(0, tasks, (count,), generator=g))
    eligible = torch.rand(count, generator=g) < open_share
    utility = {
        "any": torch.randn(count, generator=g),
        "equal": torch.full((count,), 2.5),
        "few": torch.randint(-2, 3, (count,), generator=g).float(),
        "neighbours": (torch.randint(-40, 40, (count,), generator=g, dtype=torch.int32) + 0x40000000).view(
            torch.float32
        ),
    }[values]
    want = expected(utility, eligible, task, tasks, k)
    for _ in range(2):
        assert torch.equal(select_topk(utility, eligible, task.to(torch.uint8), tasks, k), want)
    uneven = (2**28 * torch.rand(tasks, generator=g) ** 5).long() * (torch.arange(tasks) % 5 > 0)
    for weight in (torch.ones(tasks, dtype=torch.int64), uneven):
        want = expected(utility, eligible, task, tasks, k, weight)
        assert torch.equal(select_topk(utility, eligible, task.to(torch.uint8), tasks, k, weight), want)


def test_every_prefix_is_proportional_and_takes_the_best(form: str) -> None:
    g = torch.Generator().manual_seed(0)
    count, tasks = 3000, 5
    utility, eligible = torch.randn(count, generator=g), torch.rand(count, generator=g) < 0.7
    task = torch.multinomial(torch.tensor([0.5, 0.3, 0.15, 0.049, 0.001]), count, replacement=True, generator=g)
    order = select_topk(utility, eligible, task, tasks, 2500)
    valid = order[order < count]
    assert len(valid) == int(eligible.sum()) == len(set(valid.tolist()))
    sizes = torch.bincount(task[eligible], minlength=tasks)
    share = sizes / sizes.sum()
    for length in range(1, len(valid) + 1):
        taken = torch.bincount(task[valid[:length]], minlength=tasks)
        assert bool(((taken - length * share).abs() <= 0.5 + tasks / 2 * share + 1e-9).all())
    for label in range(tasks):
        chosen = utility[valid[task[valid] == label]]
        assert torch.equal(chosen, chosen.sort(descending=True).values)
    assert torch.equal(select_topk(utility, eligible, task, tasks, 300), order[:300])


def test_ties_go_by_task_and_then_by_id(form: str) -> None:
    utility, eligible = torch.zeros(6), torch.ones(6, dtype=torch.bool)
    assert select_topk(utility, eligible, torch.tensor([1, 0, 1, 0, 1, 0]), 2, 6).tolist() == [1, 0, 3, 2, 5, 4]
    assert select_topk(utility, eligible, torch.zeros(6, dtype=torch.int64), 1, 4).tolist() == [0, 1, 2, 3]


def test_equal_weights_take_turns_and_the_others_fill_up(form: str) -> None:
    """Tasks of 1, 3 and 6 samples: a place each until one runs out; weights 0, 1 and 2: none, then two for one."""
    task, every = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2, 2, 2]), torch.ones(10, dtype=torch.bool)
    utility = torch.arange(10.0).flip(0)
    for k in (1, 2, 6, 9, 12):
        even = select_topk(utility, every, task, 3, k, torch.full((3,), 7))
        assert even.tolist() == [0, 1, 4, 2, 5, 3, 6, 7, 8, 9, 10, 10][:k]
        uneven = select_topk(utility, every, task, 3, k, torch.tensor([0, 1, 2]))
        assert uneven.tolist() == [4, 1, 5, 6, 2, 7, 8, 3, 9, 10, 10, 10][:k]


def test_weights_outside_their_range_write_nowhere_else(form: str) -> None:
    """They are taken as 0 and 2^28: the candidates must fit into the memory that is set aside for them."""
    g = torch.Generator().manual_seed(0)
    utility, every, task = (
        torch.randn(300, generator=g),
        torch.ones(300, dtype=torch.bool),
        torch.randint(0, 4, (300,), generator=g),
    )
    order = select_topk(utility, every, task, 4, 20, torch.tensor([-(2**62), 2**62, 3, -1]))
    assert torch.equal(order, expected(utility, every, task, 4, 20, torch.tensor([0, 2**28, 3, 0])))


def test_a_weight_without_memory_of_its_own(form: str) -> None:
    utility, every, task = torch.tensor([3.0, 9.0, 1.0]), torch.ones(3, dtype=torch.bool), torch.tensor([1, 1, 0])
    assert select_topk(utility, every, task, 2, 3, torch.ones(1, dtype=torch.int64).expand(2)).tolist() == [2, 1, 0]
    assert select_topk(utility, every, task, 2, 3, torch.tensor([0, 5, 1])[::2]).tolist() == [1, 0, 3]


def test_nan_comes_last_and_ineligible_never(form: str) -> None:
    utility = torch.tensor([torch.nan, 1.0, -torch.inf, 5.0])
    eligible = torch.tensor([True, True, True, False])
    assert select_topk(utility, eligible, torch.zeros(4, dtype=torch.int64), 1, 6).tolist() == [1, 0, 2, 4, 4, 4]
    nobody = torch.zeros(4, dtype=torch.bool)
    assert select_topk(utility, nobody, torch.zeros(4, dtype=torch.int64), 1, 2).tolist() == [4, 4]
    weight = torch.tensor([5])
    assert select_topk(utility, eligible, torch.zeros(4, dtype=torch.int64), 1, 6, weight).tolist() == [
        1,
        0,
        2,
        4,
        4,
        4,
    ]
    assert select_topk(utility, nobody, torch.zeros(4, dtype=torch.int64), 1, 2, weight).tolist() == [4, 4]
    assert select_topk(utility, eligible, torch.arange(4), 4, 3, torch.zeros(4, dtype=torch.int64)).tolist() == [
        4,
        4,
        4,
    ]


def test_the_sign_of_zero_is_no_rank(form: str) -> None:
    every, task = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    assert select_topk(torch.tensor([-0.0, 0.0, -1e-45]), every, task, 1, 3).tolist() == [0, 1, 2]


def test_a_task_without_a_place_gives_no_candidate(form: str) -> None:
    """Eight of 300 samples get none of the first places, however high they stand."""
    g = torch.Generator().manual_seed(0)
    utility = torch.cat([torch.full((8,), torch.inf), torch.randn(292, generator=g)])
    every, task = torch.ones(300, dtype=torch.bool), (torch.arange(300) >= 8).long()
    assert select_topk(utility, every, task, 2, 1).tolist() == [8 + int(utility[8:].argmax())]


def test_views_of_a_larger_vector(form: str) -> None:
    """The engine's utility has an entry for the dummy at its end; a stride is allowed too."""
    utility = torch.tensor([3.0, 9.0, 1.0, 9.0, 2.0, 9.0])
    every, task = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.uint8)
    assert select_topk(utility[::2], every, task, 1, 3).tolist() == [0, 2, 1]
    assert select_topk(utility[:3], every, task, 1, 3).tolist() == [1, 0, 2]
    mixed = torch.tensor([1, 1, 0, 0, 1, 0])
    assert select_topk(utility[:3], (mixed == 0)[3:], mixed[::2], 2, 3).tolist() == [0, 2, 3]
    assert select_topk(utility[:3], every, mixed[::2], 2, 3).tolist() == [0, 1, 2]
    assert groups_present((mixed < 1)[1::2], mixed[::2], 3).tolist() == [True, True, False]


def test_a_task_fills_no_more_places_than_its_quota() -> None:
    """Against the definition, for every k; and the candidates fit into the memory that is set aside for them."""
    g = torch.Generator().manual_seed(0)
    reached = 0
    for tasks in (1, 2, 3, 5, 9):
        for _ in range(15):
            size = torch.randint(0, 12, (tasks,), generator=g)
            n = int(size.sum())
            keys = sorted((Fraction(2 * r + 1, 2 * int(c)), j) for j, c in enumerate(size) for r in range(int(c)))
            for k in range(1, n + 3):
                first = torch.bincount(torch.tensor([j for _, j in keys[:k]], dtype=torch.int64), minlength=tasks)
                quota = task_shares.quota(size, task_shares.reach_of(k, n, tasks))
                assert bool((first <= quota).all())
                assert bool((quota <= size).all())
                assert int(quota.sum()) <= min(n, k - 1 + tasks)
                reached += int((first == quota).all() and n > k > 1)
    assert reached > 100  # so the bound is no idle one


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("largest", [4, 50, 2**18, 2**28])
def test_by_weight_a_task_fills_no_more_places_than_its_quota(largest: int, drawn: bool) -> None:
    """As above, with tasks that run out before and tasks without weight; and with any offsets."""
    g = torch.Generator().manual_seed(0)
    reached = exhausted = 0
    for tasks in (1, 2, 3, 5, 9):
        for _ in range(12):
            size, weight = (
                torch.randint(0, 12, (tasks,), generator=g),
                torch.randint(0, largest + 1, (tasks,), generator=g),
            )
            n, pairs = int(size.sum()), list(zip(size.tolist(), weight.tolist(), strict=True))
            first = [
                Fraction(int(torch.randint(0, 4096, (), generator=g)), 4096) if drawn else Fraction(1, 2) for _ in pairs
            ]
            keys = sorted(((r + first[j]) / w, j) for j, (c, w) in enumerate(pairs) if w for r in range(c))
            for k in range(1, n + 3):
                found = torch.bincount(torch.tensor([j for _, j in keys[:k]], dtype=torch.int64), minlength=tasks)
                quota = task_shares.weighted_quota(size, weight, task_shares.reach_of(k, n, tasks, drawn), drawn)
                assert bool((found <= quota).all())
                assert bool((quota <= size * (weight > 0)).all())
                assert int(quota.sum()) <= min(n, k - 1 + (2 * tasks if drawn else tasks))
                reached += int((found == quota).all() and len(keys) > k > 1)
                exhausted += int(((found == size) & (size > 0)).any() and len(keys) > k)
    assert drawn or reached > 100  # so the bound is no idle one (which offsets may reach differs from task to task)
    assert exhausted > 100


def water_level(sizes: list[int], weights: list[int], volume: Fraction) -> Fraction | None:
    """x with sum_j min(n_j, x w_j) = volume, from vessel to vessel; None where all of them hold no more than that."""
    level = Fraction(0)
    vessels = sorted((Fraction(n, w), w) for n, w in zip(sizes, weights, strict=True) if w)
    for i, (height, _) in enumerate(vessels):
        width = sum(w for _, w in vessels[i:])
        if volume < (height - level) * width:
            return level + volume / width
        volume -= (height - level) * width
        level = height
    return None


@settings(max_examples=300, deadline=None)
@given(data=st.data(), tasks=st.integers(1, 6))
def test_a_weighted_quota_is_exact_up_to_the_largest_pools(data: st.DataObject, tasks: int) -> None:
    """Pools of up to 2^30 samples, weights up to 2^28, tasks that run out at almost one level: no product overflows."""
    sizes = data.draw(
        st.lists(st.one_of(st.integers(0, 2**30 // tasks), st.integers(0, 9)), min_size=tasks, max_size=tasks)
    )
    near = st.sampled_from(sizes).map(lambda n: min(max(n, 1), 2**28))
    weights = data.draw(st.lists(st.one_of(WEIGHTS, st.just(2**28), near), min_size=tasks, max_size=tasks))
    samples = max(sum(sizes), 1)
    k = data.draw(st.one_of(st.integers(1, samples), st.integers(1, min(samples, 50)), st.just(samples)))
    level = water_level(sizes, weights, Fraction(2 * (k - 1) + tasks, 2))
    bounds = [samples if level is None else int(level * w + Fraction(1, 2)) for w in weights]
    want = [min(n, bound) if w else 0 for n, w, bound in zip(sizes, weights, bounds, strict=True)]
    quota = task_shares.weighted_quota(
        torch.tensor(sizes), torch.tensor(weights), task_shares.reach_of(k, samples, tasks)
    )
    assert quota.tolist() == want


@settings(max_examples=200, deadline=None)
@given(data=st.data(), below=st.integers(1, 2**29), other=st.integers(1, 2**29))
def test_quotients_are_sorted_exactly(data: st.DataObject, below: int, other: int) -> None:
    """Neighbouring quotients of 31 bits before the point and differences of 2^-58; equal ones keep their order."""
    above = data.draw(st.one_of(st.integers(0, 2**31), st.integers(0, 2 * below)))
    near = above * other // below
    rivals = [(max(near + step, 0), other) for step in (-1, 0, 1, 2)]
    pairs = data.draw(st.permutations([(above, below), *rivals, (2 * above, 2 * below)]))
    want = sorted(range(len(pairs)), key=lambda i: Fraction(*pairs[i]))
    assert task_shares.ascending(*(torch.tensor(column) for column in zip(*pairs, strict=True))).tolist() == want


SIZES = st.integers(1, 2**29)


@settings(max_examples=200, deadline=None)
@given(size=SIZES, other=SIZES, share=st.floats(0, 1, exclude_max=True), near=st.integers(-1, 1))
def test_shares_are_compared_exactly(size: int, other: int, share: float, near: int) -> None:
    """Ranks of two tasks whose shares are next to each other, tasks of up to 2^29 samples."""
    rank = int(share * size)
    rival = min(max((2 * rank + 1) * other // (2 * size) + near, 0), other - 1)
    ours, theirs = task_shares.share(torch.tensor([rank, rival]), torch.tensor([size, other])).tolist()
    exact, rival_exact = Fraction(2 * rank + 1, 2 * size), Fraction(2 * rival + 1, 2 * other)
    assert (ours < theirs, ours == theirs) == (exact < rival_exact, exact == rival_exact)
    assert 0 <= ours < NONE


def test_shares_that_doubles_cannot_tell_apart() -> None:
    """1/2 - 1/n for n = 2^29 - 1 and n = 2^29 - 3 differ by 2^-57, less than the spacing of doubles there."""
    size = torch.tensor([2**29 - 1, 2**29 - 3])
    rank = (size - 1) // 2 - 1
    a, b = task_shares.share(rank, size).tolist()
    assert a > b
    a, b = ((rank.double() + 0.5) / size).tolist()
    assert a == b


@pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET"), reason="CPU tensors reach the kernels in Triton's interpreter only"
)
@pytest.mark.parametrize(("weighted", "drawn"), [(False, False), (True, False), (True, True)])
def test_the_kernel_computes_the_same_shares(weighted: bool, drawn: bool) -> None:
    """Candidates of three large tasks: the kernel's ranks are places behind the start of the task."""
    g = torch.Generator().manual_seed(0)
    weight = torch.tensor([2**29 - 1, 2**29 - 3, 5])
    if weighted:
        weight = torch.tensor([2**18 if drawn else 2**28, 1, 5])
    offset = torch.tensor([4095, 0, 77])
    start = torch.tensor([0, -(2**30) + 20 if weighted else -(2**28), 12])
    group, position = torch.tensor([0] * 5 + [1] * 7 + [2] * 5), torch.arange(19)
    sorted_key = torch.cat([(group << 32) | torch.randint(0, 2**32, (17,), generator=g), torch.full((2,), NONE)])
    by_task, sample = torch.randperm(19, generator=g), torch.randint(0, 2**29, (19,), generator=g)
    whole, share, sample_by_task = (
        torch.full_like(sorted_key, -7),
        torch.empty_like(sorted_key),
        torch.empty_like(sample),
    )
    vectors = sorted_key, by_task, sample, weight, offset, start, whole, share, sample_by_task
    share_kernel[(3,)](*vectors, 19, WEIGHTED=weighted, OFFSET=drawn, BLOCK=8)
    rank = position[:17] - start[group]
    above, below = 2 * rank + 1, 2 * weight[group]
    if drawn:
        above, below = 4096 * rank + offset[group], 4096 * weight[group]
    assert torch.equal(whole[:17], above // below if weighted else torch.full((17,), -7))
    assert torch.equal(share[:17], task_shares.fraction(above % below, below))
    assert share[17:].tolist() == [NONE] * 2
    assert whole[17:].tolist() == [NONE if weighted else -7] * 2
    assert torch.equal(sample_by_task, sample[by_task])


@pytest.mark.parametrize("num_tasks", [1, 2, 7, 64, 65, 1000, 4096, 100_000])
@pytest.mark.parametrize("num_samples", [1, 2049, 600_000, 10_000_000, 100_000_000, 2**30])
def test_launches_cover_the_pool_and_no_index_overflows(
    monkeypatch: pytest.MonkeyPatch, num_samples: int, num_tasks: int
) -> None:
    monkeypatch.undo()
    block, tiles, programs, bits, copies = radix_select.launch_shape(num_samples, num_tasks)
    assert programs * tiles * block >= num_samples > (programs - 1) * tiles * block
    assert programs * tiles < 2**31
    assert 1 <= copies <= programs
    assert copies * num_tasks << bits <= max(
        radix_select.COUNTERS, num_tasks << 4
    )  # 16 MiB, or the least that so many tasks need
    assert num_tasks > 8192 or programs < 128 or copies >= 32
    id_bits = (num_samples - 1).bit_length()
    digits = radix_select.digits_of(ORDER_BITS + id_bits, bits)
    assert sum(width for _, width in digits) == ORDER_BITS + id_bits <= 62
    assert [shift for shift, _ in digits] == [sum(width for _, width in digits[i + 1 :]) for i in range(len(digits))]
    assert max(width for _, width in digits) <= bits
    # The largest products: of a quota, of a weighted one, and of a share.
    reach = task_shares.reach_of(num_samples, num_samples, num_tasks)
    assert num_samples * reach + num_samples < 2**63
    assert module.MAX_WEIGHT * (reach + num_tasks) < 2**63
    assert 2 * num_samples << 31 < 2**63


def test_every_configuration_is_listed_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    listed = {
        build.constants["DIGITS"]: build.constants["ROWS"]
        for build in radix_select.builds()
        if "DIGITS" in build.constants
    }
    for num_tasks in range(1, 20_000, 7):
        bits = radix_select.launch_shape(10**8, num_tasks).bits
        assert listed[1 << bits] == max(1, radix_select.CHOOSE_TILE >> bits)
    assert {build.constants["BLOCK"] for build in radix_select.builds() if "BLOCK" in build.constants} == {
        radix_select.launch_shape(10**8, 1).block
    }


@pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET"), reason="CPU tensors reach the kernels in Triton's interpreter only"
)
@pytest.mark.parametrize("weight", [None, [4, 0, 9], [0, 0, 0]])
def test_the_kernels_path_reads_nothing(no_host_reads: type, weight: list[int] | None) -> None:
    g = torch.Generator().manual_seed(0)
    utility, eligible, task = (
        torch.randn(90, generator=g),
        torch.rand(90, generator=g) < 0.6,
        torch.randint(0, 3, (90,), generator=g),
    )
    weights = None if weight is None else torch.tensor(weight)
    want = expected(utility, eligible, task, 3, 20, weights)
    with no_host_reads():
        order = radix_select.select_on_gpu(utility, eligible, task, 3, 20, weights, None)
        with pytest.raises(AssertionError, match="reads the device"):
            module._on_host(utility, eligible, task, 3, 20, weights, None)
    assert torch.equal(order, want)


def test_without_data(blind_host: Callable[[], Any]) -> None:
    with blind_host() as device:
        utility, eligible = torch.empty(50, device=device), torch.empty(50, device=device, dtype=torch.bool)
        task = torch.empty(50, device=device, dtype=torch.uint8)
        order, present = select_topk(utility, eligible, task, 3, 70), groups_present(eligible, task, 5)
        assert (order.shape, order.dtype, order.device.type) == ((70,), torch.int64, device)
        order = select_topk(utility, eligible, task, 3, 70, torch.empty(3, device=device, dtype=torch.int64))
        assert (order.shape, order.dtype, order.device.type) == ((70,), torch.int64, device)
        assert (present.shape, present.dtype, present.device.type) == ((5,), torch.bool, device)


def test_under_torch_compile(form: str) -> None:
    g = torch.Generator().manual_seed(0)
    utility, task = torch.randn(30, generator=g), torch.randint(0, 3, (30,), generator=g)

    def plan(utility: Tensor, task: Tensor) -> tuple[Tensor, ...]:
        eligible = utility > -1
        weighted = select_topk(utility, eligible, task, 3, 9, weight=torch.arange(3, device=task.device))
        return select_topk(utility, eligible, task, 3, 9) + 1, weighted + 1, ~groups_present(eligible, task, 4)

    compiled = torch.compile(plan, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(utility, task), plan(utility, task), strict=True))


@property_test
@given(
    rows=st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=60), dtype=st.sampled_from(DTYPES)
)
def test_groups_present(form: str, rows: list[tuple[bool, int]], dtype: torch.dtype) -> None:
    mask, group = (torch.tensor(column) for column in zip(*rows, strict=True))
    present = groups_present(mask, group.to(dtype), 7)
    assert present.tolist() == [any(holds and label == j for holds, label in rows) for j in range(7)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("tasks", "values"), [(1, "any"), (7, "few"), (1000, "any"), (3, "equal")])
def test_on_a_gpu_as_on_the_host(monkeypatch: pytest.MonkeyPatch, tasks: int, values: str) -> None:
    monkeypatch.undo()  # the real blocks
    g = torch.Generator().manual_seed(0)
    count = 1_000_003
    few = torch.randint(0, 9, (count,), generator=g).float()
    utility = {"any": torch.randn(count, generator=g), "few": few, "equal": torch.ones(count)}
    pool = (
        utility[values],
        torch.rand(count, generator=g) < 0.7,
        (torch.rand(count, generator=g) ** 2 * tasks).to(torch.int16),
    )
    want = select_topk(*pool, tasks, 20_000)
    assert torch.equal(select_topk(*(x.cuda() for x in pool), tasks, 20_000).cpu(), want)
    weight = (2**28 * torch.rand(tasks, generator=g) ** 5).long()
    want = select_topk(*pool, tasks, 20_000, weight)
    assert torch.equal(select_topk(*(x.cuda() for x in pool), tasks, 20_000, weight.cuda()).cpu(), want)
    assert torch.equal(groups_present(pool[1].cuda(), pool[2].cuda(), tasks).cpu(), groups_present(*pool[1:], tasks))


def test_refusals() -> None:
    every, task = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"utility is torch\.float64"):
        select_topk(torch.zeros(3).double(), every, task, 1, 2)
    with pytest.raises(ValueError, match="eligible has shape"):
        select_topk(torch.zeros(3), every[:2], task, 1, 2)
    with pytest.raises(ValueError, match=r"task is torch\.float32"):
        select_topk(torch.zeros(3), every, task.float(), 1, 2)
    with pytest.raises(ValueError, match="weight has shape"):
        select_topk(torch.zeros(3), every, task, 1, 2, torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weight is torch\.float32"):
        select_topk(torch.zeros(3), every, task, 1, 2, torch.ones(1))
    with pytest.raises(ValueError, match="weight is on meta"):
        select_topk(torch.zeros(3), every, task, 1, 2, torch.ones(1, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="k 0"):
        select_topk(torch.zeros(3), every, task, 1, 0)
    with pytest.raises(ValueError, match="0 samples"):
        select_topk(torch.zeros(0), every[:0], task[:0], 1, 2)
    with pytest.raises(ValueError, match="group has shape"):
        groups_present(every, task[:2], 1)
