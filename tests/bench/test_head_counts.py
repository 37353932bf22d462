"""The head's counts, against a case counted by hand."""

from __future__ import annotations

import pytest
import torch
from head_counts import (
    SHAPES,
    Machine,
    Shape,
    all_parts,
    allowed_memory,
    chunk_parts,
    chunk_sizes,
    default_rows,
    expected_seconds,
    floor_seconds,
    naive_memory,
    our_memory,
    product_flops,
)

from lead_kernels import chunk_size
from lead_kernels.chunk_size import chunk_rows

SMALL = Shape(4, 3, 10)
ROOMY = Machine(flops=100.0, bandwidth=10.0, cache=40.0, units=1, programs=2)  # two rows of 10 bf16 logits are 40 bytes
TIGHT = Machine(flops=100.0, bandwidth=10.0, cache=39.0, units=1, programs=2)


def test_bytes_and_flops_of_a_chunk_counted_by_hand() -> None:
    # Two rows: h 6 elements, z and g 20, W 30.
    assert chunk_parts(SMALL, 2, 2, machine=TIGHT) == [
        ("logits", 120, 12 + 60 + 40),
        ("row pass", 0, 40 + 40 + 40),
        ("dh", 120, 40 + 60 + 12),
        ("dW", 120, 40 + 12 + 120 + 120),
    ]
    assert chunk_parts(SMALL, 2, 2, machine=ROOMY)[1].bytes == 40 + 40
    assert chunk_parts(SMALL, 2, 4, machine=ROOMY)[1].bytes == 80 + 80 + 40, "fp32 rows do not fit"
    assert chunk_parts(SMALL, 2, 2, first=True, machine=TIGHT)[3].bytes == 40 + 12 + 120, (
        "the first chunk's dW is not read"
    )
    assert [part.name for part in chunk_parts(SMALL, 2, 2, products=2)] == ["logits", "row pass", "dh"]
    assert chunk_parts(SMALL, 2, 2, products=1, machine=TIGHT)[1:] == [("row pass", 0, 40)], (
        "no gradient, no second read"
    )


def test_time_is_the_sum_of_the_parts_larger_terms() -> None:
    parts = {part.name: part for part in all_parts(SMALL, 2, 2, machine=TIGHT)}
    assert parts["logits"].seconds == pytest.approx(2 * 11.2)
    assert parts["logits"].seconds_in_turn == pytest.approx(2 * (1.2 + 11.2))
    assert parts["dW"].seconds == pytest.approx(17.2 + 29.2)
    assert parts["scaling"].seconds == pytest.approx((4 * 12 + 6 * 30) / 10)
    assert expected_seconds(SMALL, 2, 2, machine=TIGHT) == pytest.approx(22.4 + 24.0 + 22.4 + 46.4 + 22.8)
    whole = {part.name: part for part in all_parts(SMALL, 4, 2, machine=TIGHT)}
    assert (whole["dW"].bytes, whole["scaling"].bytes) == (80 + 24 + 60, 4 * 12 + 4 * 30), "one chunk: dW in bf16"
    slow = Machine(flops=1.0, bandwidth=1000.0)
    assert all_parts(SMALL, 2, 2, machine=slow)[0].seconds == pytest.approx(240), "arithmetic decides"


def test_memory_counted_by_hand() -> None:
    assert our_memory(SMALL, 2, 2) == max(4 * 30 + 2 * 12 + 40, 6 * 30 + 4 * 12)
    assert our_memory(Shape(4, 3, 1000), 2, 4) == 4 * 3000 + 2 * 12 + 8000
    assert our_memory(Shape(4, 3, 1000), 4, 4) == 2 * 3000 + 2 * 12 + 16000, "one chunk: dW in bf16"
    assert allowed_memory(SMALL, 2, 2) == 2 * (12 + 30) + 2 * (12 + 30) + 40
    assert naive_memory(SMALL) == 12 * 40


@pytest.mark.parametrize(("rows", "most"), [(10, 4), (8, 4), (3, 8), (4097, 1024)])
def test_chunks_are_equal_and_cover_the_rows(rows: int, most: int) -> None:
    sizes = chunk_sizes(rows, most)
    assert sum(sizes) == rows
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1


def test_published_sizes() -> None:
    # 6 x 16384 x 4096 = 402,653,184; times 128,000 and times 256, added up. 66.2 ms at 780 TFLOP/s.
    assert product_flops(SHAPES[1], 3) == 51_539_607_552_000 + 103_079_215_104
    assert floor_seconds(SHAPES[1], 3) == pytest.approx(0.0662, abs=1e-4)
    # 1024 rows: 2 x 1024 operations for 8 bytes of fp32 accumulator, 256 a byte, where the machine does 181.
    # 512 rows are too few.
    assert all_parts(SHAPES[1], 1024, 2)[3].seconds == pytest.approx(floor_seconds(SHAPES[1], 1))
    assert all_parts(SHAPES[1], 512, 2)[3].seconds > 1.3 * floor_seconds(SHAPES[1], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory", [24e9, 85e9, 150e9])
def test_default_chunks_are_the_operator_s(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, memory: float) -> None:
    monkeypatch.setattr(chunk_size, "_total_memory", lambda device: int(memory))
    for vocabulary in (32_000, *(shape.vocabulary for shape in SHAPES)):
        theirs = chunk_rows(None, vocabulary, dtype, torch.device("cuda"), False)
        assert default_rows(vocabulary, dtype.itemsize, memory) == theirs
