"""Packing: capacity, slots, an exact budget, no sample lost or repeated, the same bins in parts, little waste."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lead_kernels import PackedPlan, pack_plan, reference
from lead_kernels.pack_plan import LOOK_AHEAD, packing_waste

pytestmark = pytest.mark.slow

module = importlib.import_module("lead_kernels.pack_plan")  # the package's attribute of this name is the function
PER_FORM = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """An order with dummies at its end over lengths that often fill a bin exactly, and any layout."""
    capacity = draw(st.integers(1, 40))
    lengths = torch.tensor(draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60)))
    chosen = draw(st.permutations(range(len(lengths))))[: draw(st.integers(0, len(lengths)))]
    order = torch.tensor(chosen + [len(lengths)] * draw(st.integers(0, 3)), dtype=torch.int64)
    layout = {"num_bins": draw(st.integers(1, 9)), "capacity": capacity, "slots": draw(st.integers(1, 12))}
    return {"order": order, "lengths": lengths, **layout, "max_tokens": draw(st.none() | st.integers(0, 400))}


def drawn(mean: float, longest: int, count: int, seed: int = 1) -> Tensor:
    """Lengths of a skewed kind: log-normal, as those of instruction samples are."""
    lengths = torch.randn(count, generator=torch.Generator().manual_seed(seed)).exp() * (mean / 1.65)
    return lengths.round().long().clamp(3, longest)


def bins_of(plan: PackedPlan, num_samples: int) -> list[list[int]]:
    return [[i for i in row if i < num_samples] for row in plan.sample_ids.tolist()]


@PER_FORM
@given(problem=problems())
def test_agrees_with_reference(form: str, problem: dict[str, Any]) -> None:
    plan, expected = pack_plan(**problem), reference.pack_plan(**problem)
    assert torch.equal(plan.sample_ids, expected.sample_ids)
    assert torch.equal(plan.tokens, expected.tokens)


@PER_FORM
@given(problem=problems())
def test_promises(form: str, problem: dict[str, Any]) -> None:
    order, lengths = problem["order"], problem["lengths"]
    count, capacity, slots = len(lengths), problem["capacity"], problem["slots"]
    plan = pack_plan(**problem)
    before = order.clone()
    bins = bins_of(plan, count)
    packed = [i for samples in bins for i in samples]
    assert torch.equal(order, before)  # the kernel's queue is its own
    assert plan.sample_ids.shape == (problem["num_bins"], slots)
    assert [
        row[: len(b)] for row, b in zip(plan.sample_ids.tolist(), bins, strict=True)
    ] == bins  # empty slots come last
    assert len(packed) == len(set(packed))
    assert plan.tokens.tolist() == [sum(int(lengths[i]) for i in b) for b in bins]
    assert int(plan.tokens.max()) <= capacity
    filled = (plan.tokens > 0).tolist()
    assert filled == sorted(filled, reverse=True)
    # Exactly the budget's prefix is packed, where there are bins enough.
    budget = problem["max_tokens"]
    real = order[order < count]
    allowed = real[lengths[real].cumsum(0) <= (10**9 if budget is None else budget)].tolist()
    assert set(packed) <= set(allowed)
    left = [i for i in allowed if i not in packed]
    assert not left or all(filled)
    # Nobody waits long: the first of what remains is always taken.
    remaining = list(allowed)
    for samples in bins:
        assert remaining[:1] == samples[:1]
        considered = remaining[: min(slots, len(samples) + LOOK_AHEAD)]
        assert set(samples) <= set(considered)
        remaining = [i for i in remaining if i not in samples]


@PER_FORM
@given(problem=problems(), parts=st.integers(1, 4), width=st.integers(1, 4))
def test_bins_do_not_depend_on_where_a_round_ends(form: str, problem: dict[str, Any], parts: int, width: int) -> None:
    """Rounds of `width` bins that see only the next width x slots samples give the bins of one long round."""
    order, lengths, slots = problem["order"], problem["lengths"], problem["slots"]
    count, budget = len(lengths), problem["max_tokens"]
    layout = {"capacity": problem["capacity"], "slots": slots}
    whole = bins_of(pack_plan(order, lengths, num_bins=parts * width, max_tokens=budget, **layout), count)
    pieces, rest = [], order.tolist()
    for _ in range(parts):
        seen = (rest + [count] * width * slots)[: width * slots]
        plan = pack_plan(torch.tensor(seen), lengths, num_bins=width, max_tokens=budget, **layout)
        pieces += bins_of(plan, count)
        trained = [i for row in bins_of(plan, count) for i in row]
        rest = [i for i in rest if i not in trained]
        budget = None if budget is None else budget - int(plan.tokens.sum())
    assert pieces == whole


@pytest.mark.parametrize("budget", [0, 1, 99, 100, 101, 777, 10**9])
def test_budget_is_the_longest_prefix_that_fits(form: str, budget: int) -> None:
    lengths = torch.randint(1, 20, (200,), generator=torch.Generator().manual_seed(2))
    plan = pack_plan(torch.arange(200), lengths, num_bins=40, capacity=64, slots=8, max_tokens=budget)
    packed = sorted(i for samples in bins_of(plan, 200) for i in samples)
    assert packed == list(range(len(packed)))
    assert int(plan.tokens.sum()) == int(lengths[: len(packed)].sum()) <= budget
    assert len(packed) == 200 or int(lengths[: len(packed) + 1].sum()) > budget
    on_device = pack_plan(
        torch.arange(200), lengths, num_bins=40, capacity=64, slots=8, max_tokens=torch.tensor(budget)
    )
    assert torch.equal(on_device.sample_ids, plan.sample_ids)


def test_gaps_are_filled_with_the_longest_that_fits(form: str) -> None:
    lengths = torch.tensor([5, 8, 3, 4, 4, 1, 6])
    plan = pack_plan(torch.arange(7), lengths, num_bins=4, capacity=10, slots=6)
    assert bins_of(plan, 7) == [
        [0, 3, 5],
        [1],
        [2, 4],
        [6],
    ]  # behind 0: 8 is too long, the first 4 before the second and before 3
    assert plan.tokens.tolist() == [10, 8, 7, 6]


@pytest.mark.parametrize("distance", [LOOK_AHEAD - 1, LOOK_AHEAD])
def test_the_look_ahead_ends(form: str, distance: int) -> None:
    lengths = torch.tensor([6] + [7] * distance + [4])
    first, *_ = bins_of(pack_plan(torch.arange(len(lengths)), lengths, num_bins=2, capacity=10, slots=99), len(lengths))
    assert first == ([0, len(lengths) - 1] if distance < LOOK_AHEAD else [0])


def test_slots_close_a_bin_and_its_look_ahead(form: str) -> None:
    plan = pack_plan(torch.arange(5), torch.ones(5, dtype=torch.int64), num_bins=4, capacity=100, slots=2)
    assert plan.sample_ids.tolist() == [[0, 1], [2, 3], [4, 5], [5, 5]]
    assert plan.tokens.tolist() == [2, 2, 1, 0]
    lengths = torch.tensor([6, 7, 7, 4])  # the sample of 4 is the fourth of what remains: beyond the bin's three slots
    assert bins_of(pack_plan(torch.arange(4), lengths, num_bins=1, capacity=10, slots=3), 4) == [[0]]
    assert bins_of(pack_plan(torch.arange(4), lengths, num_bins=1, capacity=10, slots=4), 4) == [[0, 3]]


def test_runs_longer_than_a_window(form: str) -> None:
    """Bins of more samples than the kernel reads at once, which end inside, at the end of and beyond a window."""
    lengths = torch.tensor([1] * (3 * LOOK_AHEAD) + [2] * 70)
    for capacity in (LOOK_AHEAD - 1, LOOK_AHEAD, 2 * LOOK_AHEAD, 2 * LOOK_AHEAD + 1):
        problem = {
            "order": torch.arange(len(lengths)),
            "lengths": lengths,
            "num_bins": 7,
            "capacity": capacity,
            "slots": 90,
        }
        assert torch.equal(pack_plan(**problem).sample_ids, reference.pack_plan(**problem).sample_ids)


def test_nothing_to_pack(form: str) -> None:
    plan = pack_plan(torch.full((3,), 7), torch.ones(7, dtype=torch.int64), num_bins=2, capacity=4, slots=3)
    assert plan.sample_ids.tolist() == [[7, 7, 7], [7, 7, 7]]
    assert plan.tokens.tolist() == [0, 0]


def test_refusals(form: str) -> None:
    order, lengths = torch.arange(2), torch.tensor([3, 9])
    with pytest.raises(RuntimeError, match="longer than `capacity`"):
        pack_plan(order, lengths, num_bins=2, capacity=8, slots=4)
    with pytest.raises(RuntimeError, match="longer than `capacity`"):  # also one that the budget leaves out
        pack_plan(order, lengths, num_bins=2, capacity=8, slots=4, max_tokens=3)
    with pytest.raises(ValueError, match=r"order is torch\.int32"):
        pack_plan(order.int(), lengths, num_bins=2, capacity=9, slots=4)
    with pytest.raises(ValueError, match=r"max_tokens has shape \[1\]"):
        pack_plan(order, lengths, num_bins=2, capacity=9, slots=4, max_tokens=torch.tensor([3]))


@pytest.mark.parametrize(("mean", "longest", "most"), [(135, 512, 0.004), (380, 2048, 0.005)])
def test_waste_is_small(mean: float, longest: int, most: float) -> None:
    """At 4096 places; next-fit would leave E[n^2] / (2 E[n] capacity) empty: 3.4 and 9.3 % for these lengths."""
    lengths, capacity = drawn(mean, longest, 20_000), 4096
    plan = pack_plan(torch.arange(20_000), lengths, num_bins=400, capacity=capacity, slots=128)
    next_fit = float((lengths.double() ** 2).mean() / lengths.double().mean() / 2 / capacity)
    waste = float(packing_waste(plan.tokens[:, None], capacity))
    assert waste == pytest.approx(1 - float(plan.tokens.sum()) / (400 * capacity), abs=1e-6)
    assert waste <= most < next_fit / 5


def test_waste_counts_the_steps_that_are_computed() -> None:
    tokens = torch.tensor(
        [[10, 8], [6, 0], [0, 0]]
    )  # the third step has nothing to train and is left out, the second is computed whole
    assert float(packing_waste(tokens, 10)) == pytest.approx(1 - 24 / 40)
    assert float(packing_waste(tokens[2:], 10)) == 0.0
    assert packing_waste(tokens, 10).dtype == torch.float32


@pytest.mark.parametrize("form", ["kernels"], indirect=True)
def test_the_kernels_way_never_looks_at_the_device(no_host_reads: Callable[[], Any], form: str) -> None:
    lengths, order = drawn(10, 40, 50), torch.arange(50)
    with no_host_reads():
        ids, tokens = module._on_gpu(order, lengths, torch.tensor(300), 3, 64, 9)
        waste = packing_waste(tokens, 64)
    expected = reference.pack_plan(order, lengths, num_bins=3, capacity=64, slots=9, max_tokens=300)
    assert torch.equal(ids, expected.sample_ids)
    assert 0 <= float(waste) < 1


def test_without_data(blind_host: Callable[[], Any]) -> None:
    with blind_host() as device:
        order, lengths = (torch.empty(n, dtype=torch.int64, device=device) for n in (12, 30))
        for budget in (None, 7, torch.empty((), dtype=torch.int64, device=device)):
            plan = pack_plan(order, lengths, num_bins=3, capacity=8, slots=4, max_tokens=budget)
            packing_waste(plan.tokens, 8)
            assert (plan.sample_ids.shape, plan.tokens.shape) == ((3, 4), (3,))
            assert {x.device.type for x in plan} == {device}
            assert {x.dtype for x in plan} == {torch.int64}


def test_compiles_into_one_graph(form: str) -> None:
    def plan(order: Tensor, lengths: Tensor, budget: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = pack_plan(order, lengths, num_bins=3, capacity=64, slots=9, max_tokens=budget)
        return packed.sample_ids, packed.tokens, packing_waste(packed.tokens, 64)

    inputs = (torch.arange(50), drawn(10, 40, 50), torch.tensor(150))
    compiled = torch.compile(plan, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), plan(*inputs), strict=True))
    torch.library.opcheck(module._pack_plan, (*inputs, 3, 64, 9))
