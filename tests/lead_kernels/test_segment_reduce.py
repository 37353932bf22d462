"""Sums over segments: the reference, empty segments, determinism, refusals."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lead_kernels import reference, segment_reduce


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12), trailing=st.sampled_from([(), (3,), (2, 4)]), seed=st.integers(0, 99))
def test_agrees_with_reference(sizes: list[int], trailing: tuple[int, ...], seed: int) -> None:
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    values = torch.randn(len(ids), *trailing, generator=torch.Generator().manual_seed(seed)).double()
    torch.testing.assert_close(segment_reduce(values, ids, len(sizes)), reference.segment_reduce(values, ids, len(sizes)))


def test_low_precision_is_summed_in_fp32() -> None:
    values = torch.ones(4000, 2, dtype=torch.bfloat16)  # in bf16 the sum would stop at 256
    assert segment_reduce(values, torch.zeros(4000, dtype=torch.int64), 2).tolist() == [[4000.0, 4000.0], [0.0, 0.0]]


def test_a_bad_segment_stays_alone() -> None:
    values = torch.tensor([1.0, torch.nan, torch.inf, 2.0, 3.0])
    sums = segment_reduce(values, torch.tensor([0, 1, 2, 3, 3]), 5)
    assert sums[[0, 3, 4]].tolist() == [1.0, 5.0, 0.0]


def test_two_runs_agree_bit_for_bit() -> None:
    values, ids = torch.randn(5000, 3), torch.arange(5000) // 700
    assert torch.equal(segment_reduce(values, ids, 8), segment_reduce(values, ids, 8))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="floating"):
        segment_reduce(torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="sample_ids has shape"):
        segment_reduce(torch.ones(3), torch.zeros(2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="non-decreasing"):
        segment_reduce(torch.ones(3), torch.tensor([0, 1, 0]), 2)
