"""Sums over segments in both forms: reference, empty segments, rows outside, precision, determinism, errors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lead_kernels import reference, segment_reduce

module = sys.modules["lead_kernels.segment_reduce"]  # the package's attribute of this name is the function


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 rows, 4 at a time, 4 columns: short segments have several pieces of several steps."""
    monkeypatch.setattr(module, "tile", lambda width: module.Tile(rows=8, step=4, columns=1 if width == 1 else 4))


def loop(values: Tensor, bounds: Tensor) -> Tensor:
    return torch.stack([values[a:b].sum(0) for a, b in pairwise(bounds.tolist())])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 2, 7, 8, 9, 21]), min_size=1, max_size=6),
    outside=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    trailing=st.sampled_from([(), (1,), (3,), (3, 3)]),
    seed=st.integers(0, 99),
)
def test_agrees_with_a_loop_also_with_rows_of_nobody(
    form: str, small_tiles: None, sizes: list[int], outside: tuple[int, int], trailing: tuple[int, ...], seed: int
) -> None:
    values = torch.randn(sum(sizes) + sum(outside), *trailing, generator=torch.Generator().manual_seed(seed)).double()
    bounds = outside[0] + torch.tensor([0, *sizes]).cumsum(0)
    values[: outside[0]], values[len(values) - outside[1] :] = torch.nan, torch.nan
    torch.testing.assert_close(module.segment_sum(values, bounds), loop(values, bounds))


@pytest.mark.parametrize(("width", "rows"), [(1, 2500), (7, 1100), (130, 150)])
def test_real_tiles_have_several_blocks(form: str, width: int, rows: int) -> None:
    tile = module.tile(width)
    assert rows > 2 * tile.rows
    assert width in (1, 7) or width > tile.columns
    ids = torch.arange(rows) // (rows // 2 + 5)
    values = torch.randn(rows, width).double()
    torch.testing.assert_close(segment_reduce(values, ids, 3), reference.segment_reduce(values, ids, 3))


def test_many_one_row_segments(form: str, small_tiles: None) -> None:
    values = torch.randn(101, 2)
    assert torch.equal(segment_reduce(values, torch.arange(101), 101), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_summed_in_fp32(form: str, dtype: torch.dtype) -> None:
    values = torch.ones(4000, 2, dtype=dtype)  # in bf16 the sum would stop at 256, in fp16 at 2048
    sums = segment_reduce(values, torch.zeros(4000, dtype=torch.int64), 2)
    assert sums.dtype == torch.float32
    assert sums.tolist() == [[4000.0, 4000.0], [0.0, 0.0]]


@pytest.mark.parametrize("rows", [1700, 3000])
def test_error_is_no_larger_than_that_of_torch_sum(form: str, rows: int) -> None:
    values = torch.randn(3000, 40, generator=torch.Generator().manual_seed(0)) + 1.0
    ids = torch.arange(3000) // rows
    for part in (values, values[:, 0]):
        exact, unfused, ours = (
            f(x, ids, 2).double()
            for f, x in (
                (reference.segment_reduce, part.double()),
                (reference.segment_reduce, part),
                (segment_reduce, part),
            )
        )
        assert float((ours - exact).norm()) <= 1.2 * float((unfused - exact).norm()) + 2**-24 * float(
            exact.norm()
        )  # one rounding


def test_a_bad_segment_stays_alone(form: str) -> None:
    values = torch.tensor([1.0, torch.nan, torch.inf, 2.0, 3.0])
    sums = segment_reduce(values, torch.tensor([0, 1, 2, 3, 3]), 5)
    assert sums[[0, 3, 4]].tolist() == [1.0, 5.0, 0.0]


def test_two_runs_agree_bit_for_bit(form: str) -> None:
    values, ids = torch.randn(1500, 3), torch.arange(1500) // 700
    assert torch.equal(segment_reduce(values, ids, 8), segment_reduce(values, ids, 8))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0), (0, 2, 2)])
def test_nothing_to_sum(form: str, shape: tuple[int, ...]) -> None:
    sums = segment_reduce(torch.ones(shape), torch.zeros(shape[0], dtype=torch.int64), 3)
    assert torch.equal(sums, torch.zeros(3, *shape[1:]))


def test_values_need_not_be_contiguous(form: str) -> None:
    values, ids = torch.randn(6, 9).t(), torch.tensor([0, 0, 1, 1, 1, 1, 3, 3, 3], dtype=torch.int32)
    assert torch.equal(segment_reduce(values, ids, 4), segment_reduce(values.contiguous(), ids.long(), 4))


@pytest.mark.parametrize("form", ["kernels"], indirect=True)
def test_rows_beyond_two_to_the_31_elements(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 GiB of addresses, of which only the last rows are ever touched."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(
        GridExecutor, "_restore_args_dev", lambda *_: None
    )  # it would copy the arguments onto themselves
    monkeypatch.setattr(module, "tile", lambda width: module.Tile(rows=2**18, step=4, columns=2048))
    rows, width = 2**20 + 8, 2048
    values = torch.empty(rows, width, dtype=torch.float16)
    values[-7:] = torch.randn(7, width)
    bounds = torch.tensor([rows - 7, rows - 6, rows], dtype=torch.int32)
    torch.testing.assert_close(module.segment_sum(values, bounds), loop(values[-7:].float(), torch.tensor([0, 1, 7])))


@pytest.mark.parametrize("form", ["kernels"], indirect=True)
def test_kernels_never_look_at_the_device(form: str, small_tiles: None, no_host_reads: Callable[[], Any]) -> None:
    values, ids = torch.randn(40, 5), torch.arange(40) // 9
    with no_host_reads():
        sums = module.segment_sum(values, module.segment_bounds(ids, 6))
    torch.testing.assert_close(sums, reference.segment_reduce(values, ids, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fake_tensors(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        sums = segment_reduce(
            torch.empty(9, 2, 3, dtype=dtype, device="meta"), torch.empty(9, dtype=torch.int64, device="meta"), 4
        )
    assert (sums.shape, sums.dtype) == ((4, 2, 3), torch.promote_types(dtype, torch.float32))


def test_compiles_without_a_graph_break(form: str) -> None:
    values, ids = torch.randn(20, 3), torch.arange(20) // 6
    compiled = torch.compile(lambda v, i: 2 * segment_reduce(v, i, 4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values, ids), 2 * segment_reduce(values, ids, 4))
    torch.library.opcheck(module._segment_reduce, (values, ids, 4))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="floating"):
        segment_reduce(torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="sample_ids has shape"):
        segment_reduce(torch.ones(3), torch.zeros(2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="sample_ids is torch"):
        segment_reduce(torch.ones(3), torch.zeros(3), 1)
    with pytest.raises(ValueError, match="non-decreasing"):
        segment_reduce(torch.ones(3), torch.tensor([0, 1, 0]), 2)
