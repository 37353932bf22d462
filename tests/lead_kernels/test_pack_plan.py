"""Packing: capacity, slots, order, nobody lost or twice, an exact budget, and how much is wasted."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lead_kernels import pack_plan, reference


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=40),
    dummies=st.integers(0, 5),
    num_bins=st.integers(1, 9),
    slots=st.integers(1, 6),
    max_tokens=st.one_of(st.none(), st.integers(0, 300)),
    seed=st.integers(0, 99),
)
def test_agrees_with_reference(lengths: list[int], dummies: int, num_bins: int, slots: int, max_tokens: int | None, seed: int) -> None:
    count = len(lengths)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: max(1, count - seed % 3)]
    order = torch.cat([chosen, torch.full((dummies,), count)])
    arguments = {"num_bins": num_bins, "capacity": 16, "slots": slots, "max_tokens": max_tokens}
    plan, expected = pack_plan(order, torch.tensor(lengths), **arguments), reference.pack_plan(order, torch.tensor(lengths), **arguments)
    assert torch.equal(plan.sample_ids, expected.sample_ids)
    assert torch.equal(plan.tokens, expected.tokens)
    if max_tokens is not None:
        on_device = pack_plan(order, torch.tensor(lengths), **{**arguments, "max_tokens": torch.tensor(max_tokens)})
        assert torch.equal(on_device.sample_ids, plan.sample_ids)


def test_invariants_on_a_large_round() -> None:
    g = torch.Generator().manual_seed(1)
    lengths = (torch.randn(5000, generator=g).exp() * 60).long().clamp(3, 512)
    order = torch.randperm(5000, generator=g)
    capacity, slots, bins = 2048, 128, 64
    plan = pack_plan(order, lengths, num_bins=bins, capacity=capacity, slots=slots)
    padded = torch.cat([lengths, torch.zeros(1, dtype=torch.int64)])
    assert torch.equal(padded[plan.sample_ids].sum(1), plan.tokens)
    assert bool((plan.tokens <= capacity).all())
    packed = plan.sample_ids[plan.sample_ids < 5000]
    assert torch.equal(packed, order[: len(packed)])  # the order, without gaps: nobody lost, nobody twice
    first_of_next = lengths[order[len(packed)]]
    opens = torch.cat([padded[plan.sample_ids[1:, 0]], first_of_next[None]])
    assert bool((capacity - plan.tokens < opens).all())  # the stated bound on the waste
    # On average half of the sample that did not fit, which is length-biased: E[n^2] / E[n] / 2 places, 3.9 % of the capacity here.
    expected = float((lengths.double() ** 2).mean() / lengths.double().mean() / 2 / capacity)
    assert float(1 - plan.tokens.sum() / (bins * capacity)) == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("budget", [0, 1, 99, 100, 101, 777, 10**9])
def test_budget_is_the_longest_prefix_that_fits(budget: int) -> None:
    lengths = torch.randint(1, 20, (200,), generator=torch.Generator().manual_seed(2))
    order = torch.arange(200)
    plan = pack_plan(order, lengths, num_bins=200, capacity=64, slots=8, max_tokens=budget)
    count = int((plan.sample_ids < 200).sum())
    assert int(plan.tokens.sum()) == int(lengths[:count].sum()) <= budget
    assert count == 200 or int(lengths[: count + 1].sum()) > budget


def test_slots_close_a_bin() -> None:
    plan = pack_plan(torch.arange(5), torch.ones(5, dtype=torch.int64), num_bins=4, capacity=100, slots=2)
    assert plan.sample_ids.tolist() == [[0, 1], [2, 3], [4, 5], [5, 5]]
    assert plan.tokens.tolist() == [2, 2, 1, 0]


def test_nothing_to_pack() -> None:
    plan = pack_plan(torch.full((3,), 7), torch.ones(7, dtype=torch.int64), num_bins=2, capacity=4, slots=3)
    assert plan.sample_ids.tolist() == [[7, 7, 7], [7, 7, 7]]
    assert plan.tokens.tolist() == [0, 0]


def test_a_sample_longer_than_a_bin_is_refused() -> None:
    with pytest.raises(RuntimeError, match="longer than `capacity`"):
        pack_plan(torch.arange(2), torch.tensor([3, 9]), num_bins=2, capacity=8, slots=4)
