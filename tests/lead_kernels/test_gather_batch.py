"""Packing tokens of a micro-batch against a loop over tokens."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lead_kernels import PackedBatch, gather_batch, reference


def make_store(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    tokens = torch.randint(1, 1000, (total,), generator=g, dtype=torch.int32)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return tokens, torch.rand(total, generator=g) < 0.6, offsets


def assert_equal(ours: PackedBatch, expected: PackedBatch) -> None:
    for name, a, b in zip(ours._fields, ours, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=10),
    picks=st.lists(st.integers(0, 10), min_size=1, max_size=8),
    tail=st.integers(0, 7),
    extra_rows=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_agrees_with_reference(lengths: list[int], picks: list[int], tail: int, extra_rows: int, seed: int) -> None:
    tokens, response, offsets = make_store(lengths, seed)
    ids = torch.tensor(picks).clamp(max=len(lengths))  # N, the empty slot, in any place
    used = sum(lengths[i] for i in ids.tolist() if i < len(lengths))
    wide = {"capacity": max(used + tail, 1), "num_rows": used + extra_rows}
    expected = reference.gather_batch(tokens, response, offsets, ids, **wide)
    assert_equal(gather_batch(tokens, response, offsets, ids, **wide), expected)
    exact = {**wide, "num_rows": int((expected.targets >= 0).sum())}
    assert_equal(gather_batch(tokens, response, offsets, ids, **exact), reference.gather_batch(tokens, response, offsets, ids, **exact))


def test_no_target_across_samples_and_none_for_a_first_token() -> None:
    tokens = torch.tensor([10, 11, 12, 20, 21, 30], dtype=torch.int32)
    response = torch.ones(6, dtype=torch.bool)  # also on first tokens, which nothing predicts
    batch = gather_batch(tokens, response, torch.tensor([0, 3, 5, 6]), torch.tensor([1, 3, 0, 2]), capacity=8, num_rows=5)
    assert batch.input_ids.tolist() == [20, 21, 10, 11, 12, 30, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 5, 6, 8]
    assert batch.rows.tolist() == [0, 2, 3, 7, 7]
    assert batch.targets.tolist() == [21, 11, 12, -100, -100]
    assert batch.row_slots.tolist() == [0, 2, 2, 3, 3]
    assert batch.sample_ids.tolist() == [1, 3, 0, 2]


def test_an_empty_micro_batch() -> None:
    tokens, response, offsets = make_store([3, 4], 0)
    batch = gather_batch(tokens, response, offsets, torch.tensor([2, 2]), capacity=5, num_rows=3)
    assert batch.input_ids.tolist() == [0] * 5
    assert batch.cu_seqlens.tolist() == [0, 0, 0, 5]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4]
    assert batch.targets.tolist() == [-100] * 3
    assert batch.rows.tolist() == [4] * 3


def test_refusals() -> None:
    tokens, response, offsets = make_store([3, 4], 0)
    response[:] = True
    with pytest.raises(RuntimeError, match="do not fit into `capacity`"):
        gather_batch(tokens, response, offsets, torch.tensor([0, 1]), capacity=6, num_rows=9)
    with pytest.raises(RuntimeError, match="more response rows"):
        gather_batch(tokens, response, offsets, torch.tensor([0, 1]), capacity=7, num_rows=4)
    with pytest.raises(ValueError, match=r"response is torch\.uint8"):
        gather_batch(tokens, response.to(torch.uint8), offsets, torch.tensor([0, 1]), capacity=7, num_rows=5)
