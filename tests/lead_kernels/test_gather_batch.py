"""Packing tokens of a micro-batch against a loop over tokens."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lead_kernels import PackedBatch, gather_batch, reference

module = importlib.import_module("lead_kernels.gather_batch")  # the package's attribute of this name is the function


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs also for the few token places of a test."""
    monkeypatch.setattr(module, "BLOCK", 8)


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


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=10),
    picks=st.lists(st.integers(0, 10), min_size=1, max_size=12),
    tail=st.integers(0, 19),
    extra_rows=st.integers(0, 19),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
def test_agrees_with_reference(
    form: str,
    small_blocks: None,
    lengths: list[int],
    picks: list[int],
    tail: int,
    extra_rows: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    tokens, response, offsets = make_store(lengths, seed)
    tokens = tokens.to(dtype)
    ids = torch.tensor(picks).clamp(max=len(lengths))  # N, the empty slot, in any place
    used = sum(lengths[i] for i in ids.tolist() if i < len(lengths))
    wide = {"capacity": max(used + tail, 1), "num_rows": used + extra_rows}
    expected = reference.gather_batch(tokens, response, offsets, ids, **wide)
    assert_equal(gather_batch(tokens, response, offsets, ids, **wide), expected)
    exact = {**wide, "num_rows": int((expected.targets >= 0).sum())}
    assert_equal(
        gather_batch(tokens, response, offsets, ids, **exact),
        reference.gather_batch(tokens, response, offsets, ids, **exact),
    )


def test_more_blocks_than_a_block_has_places(form: str, small_blocks: None) -> None:
    """Sums over blocks go on beyond one block of counts, and slots beyond one block of slots."""
    lengths = [3, 9, 1, 7] * 10
    tokens, response, offsets = make_store(lengths, 1)
    ids = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    sizes = {"capacity": 8 * 8 * 3 + 21, "num_rows": 230}
    assert_equal(
        gather_batch(tokens, response, offsets, ids, **sizes),
        reference.gather_batch(tokens, response, offsets, ids, **sizes),
    )
    for place in (1, 20, 39):
        with pytest.raises(RuntimeError, match=r"not in \[0, N\]"):
            gather_batch(tokens, response, offsets, ids.index_fill(0, torch.tensor([place]), 41), **sizes)


def test_agrees_with_reference_in_blocks_of_the_real_size(form: str) -> None:
    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 40, (120,), generator=g).tolist()
    tokens, response, offsets = make_store(lengths, 3)
    ids = torch.randint(0, 121, (53,), generator=g)
    sizes = {"capacity": 2 * module.BLOCK + 77, "num_rows": 2 * module.BLOCK + 300}
    assert_equal(
        gather_batch(tokens, response, offsets, ids, **sizes),
        reference.gather_batch(tokens, response, offsets, ids, **sizes),
    )


def test_no_target_across_samples_and_none_for_a_first_token(form: str) -> None:
    tokens = torch.tensor([10, 11, 12, 20, 21, 30], dtype=torch.int32)
    response = torch.ones(6, dtype=torch.bool)  # also on first tokens, which nothing predicts
    batch = gather_batch(
        tokens, response, torch.tensor([0, 3, 5, 6]), torch.tensor([1, 3, 0, 2]), capacity=8, num_rows=5
    )
    assert batch.input_ids.tolist() == [20, 21, 10, 11, 12, 30, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 5, 6, 8]
    assert batch.rows.tolist() == [0, 2, 3, 7, 7]
    assert batch.targets.tolist() == [21, 11, 12, -100, -100]
    assert batch.row_slots.tolist() == [0, 2, 2, 3, 3]
    assert batch.sample_ids.tolist() == [1, 3, 0, 2]


def test_an_empty_micro_batch(form: str) -> None:
    tokens, response, offsets = make_store([3, 4], 0)
    batch = gather_batch(tokens, response, offsets, torch.tensor([2, 2]), capacity=5, num_rows=3)
    assert batch.input_ids.tolist() == [0] * 5
    assert batch.cu_seqlens.tolist() == [0, 0, 0, 5]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4]
    assert batch.targets.tolist() == [-100] * 3
    assert batch.rows.tolist() == [4] * 3


def test_pools_of_more_than_two_to_the_31_tokens(form: str, tmp_path: Path) -> None:
    """Files with holes stand for the pool: only the two samples at its end take room on the disk."""
    total, tail = 2**31 + 40, 30
    tokens = np.memmap(tmp_path / "tokens", np.int32, "w+", shape=(total,))
    response = np.memmap(tmp_path / "response", np.bool_, "w+", shape=(total,))
    tokens[-tail:] = np.arange(1, tail + 1)
    response[-tail:] = np.arange(tail) % 3 > 0
    pool, mask = torch.from_numpy(tokens), torch.from_numpy(response)
    offsets = torch.tensor([0, total - tail, total - 12, total])
    batch = gather_batch(pool, mask, offsets, torch.tensor([2, 3, 1]), capacity=40, num_rows=33)
    near = reference.gather_batch(
        pool[-tail:].clone(),
        mask[-tail:].clone(),
        torch.tensor([0, 0, 18, 30]),
        torch.tensor([2, 3, 1]),
        capacity=40,
        num_rows=33,
    )
    assert_equal(batch, near)
    assert batch.input_ids.tolist() == [*range(19, 31), *range(1, 19), *[0] * 10]


def test_ids_may_be_a_column_of_a_plan(form: str) -> None:
    tokens, response, offsets = make_store([3, 4, 2], 0)
    plan = torch.tensor([[0, 1], [2, 3]])
    ours = gather_batch(tokens, response, offsets, plan[:, 0], capacity=9, num_rows=9)
    assert_equal(ours, reference.gather_batch(tokens, response, offsets, torch.tensor([0, 2]), capacity=9, num_rows=9))


def test_refusals(form: str, small_blocks: None) -> None:
    tokens, response, offsets = make_store([3, 14], 0)
    response[:] = True
    ids = torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="do not fit into `capacity`"):
        gather_batch(tokens, response, offsets, ids, capacity=16, num_rows=19)
    with pytest.raises(RuntimeError, match="more response rows"):
        gather_batch(tokens, response, offsets, ids, capacity=17, num_rows=14)
    gather_batch(tokens, response, offsets, ids, capacity=17, num_rows=15)
    for unknown in (-1, 3):
        with pytest.raises(RuntimeError, match=r"not in \[0, N\]"):
            gather_batch(tokens, response, offsets, torch.tensor([0, unknown]), capacity=17, num_rows=17)
    with pytest.raises(ValueError, match=r"response is torch\.uint8"):
        gather_batch(tokens, response.to(torch.uint8), offsets, ids, capacity=17, num_rows=15)
    with pytest.raises(ValueError, match="tokens is not contiguous"):
        gather_batch(tokens.repeat_interleave(2)[::2], response, offsets, ids, capacity=17, num_rows=15)


def test_where_the_pool_may_lie() -> None:
    tokens, response, offsets = make_store([3, 4], 0)
    ids = torch.tensor([0, 1], device="meta")  # stands for a GPU
    with pytest.raises(ValueError, match="tokens is on cpu and not pinned"):
        module._on_gpu(tokens, response, offsets, ids, 7, 7)
    with pytest.raises(ValueError, match="response is on meta, expected cpu"):
        gather_batch(tokens, response.to("meta"), offsets, torch.tensor([0, 1]), capacity=7, num_rows=7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pinned", [(), ("offsets",), ("tokens", "response"), ("tokens", "response", "offsets")])
def test_from_pinned_memory(pinned: tuple[str, ...]) -> None:
    names = ("tokens", "response", "offsets")
    arrays = make_store(torch.randint(1, 300, (500,), generator=torch.Generator().manual_seed(0)).tolist(), 0)
    places = [x.pin_memory() if name in pinned else x.cuda() for name, x in zip(names, arrays, strict=True)]
    ids = torch.randint(0, 501, (40,), generator=torch.Generator().manual_seed(1))
    sizes = {"capacity": 12_000, "num_rows": 8_000}
    ours = gather_batch(*places, ids.cuda(), **sizes)
    assert {x.device.type for x in ours} == {"cuda"}
    assert_equal(PackedBatch(*[x.cpu() for x in ours]), gather_batch(*arrays, ids, **sizes))


@pytest.mark.parametrize("form", ["kernels"], indirect=True)
def test_the_kernels_way_never_looks_at_the_device(no_host_reads: Callable[[], Any], form: str) -> None:
    tokens, response, offsets = make_store([3, 4, 9], 0)
    ids = torch.tensor([2, 0])
    with no_host_reads():
        outputs = module._on_gpu(tokens, response, offsets, ids, 20, 15)
    assert_equal(
        PackedBatch(*outputs, ids), reference.gather_batch(tokens, response, offsets, ids, capacity=20, num_rows=15)
    )


@pytest.mark.parametrize("pool", ["beside", "on the host"])
def test_without_data(blind_host: Callable[[], Any], pool: str) -> None:
    with blind_host() if pool == "beside" else FakeTensorMode() as device:
        device, where = (device, device) if pool == "beside" else ("meta", "cpu")
        tokens, response = (
            torch.empty(1000, dtype=torch.int32, device=where),
            torch.empty(1000, dtype=torch.bool, device=where),
        )
        offsets = torch.empty(51, dtype=torch.int64, device=where)
        batch = gather_batch(
            tokens, response, offsets, torch.empty(5, dtype=torch.int64, device=device), capacity=64, num_rows=40
        )
    assert [tuple(x.shape) for x in batch] == [(64,), (64,), (7,), (40,), (40,), (40,), (5,)]
    assert {x.device.type for x in batch} == {device}
    assert [x.dtype for x in batch] == [torch.int32 if name == "cu_seqlens" else torch.int64 for name in batch._fields]


def test_compiles_into_one_graph(form: str) -> None:
    tokens, response, offsets = make_store([3, 4, 9], 0)

    def gather(ids: Tensor) -> PackedBatch:
        return gather_batch(tokens, response, offsets, ids, capacity=20, num_rows=15)

    ids = torch.tensor([2, 3, 1])
    assert_equal(torch.compile(gather, fullgraph=True, backend="aot_eager")(ids), gather(ids))
    torch.library.opcheck(module._gather_batch, (tokens, response, offsets, ids, 20, 15))
