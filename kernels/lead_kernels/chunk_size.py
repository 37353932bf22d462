"""How many rows of logits the head computes at a time, and in which dtype it adds up gradients over the chunks.

Legend: C rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools

import torch

from lead_kernels.backend import cdiv

CHUNK_BYTES_CPU = 64 * 2**20
CHUNK_BYTES_DEVICE = (2**30, 4 * 2**30)
"""Least and most; between them 1/32 of the device's memory. Of all of it: what is free depends on what else runs, and
results would with it. 5,000 rows of 128k logits in bf16 are one chunk on 80 GB, 16,384 on an H200. One chunk needs no
weight gradient in fp32."""
DEVICE_BUFFER_ROWS = 256
"""A GPU's buffers of logits are rounded up to this many rows, so that calls of similar size reuse the same memory."""
CPU_CHUNK_ROWS = 1024
"""More rows do not make the products faster on a CPU."""
DEVICE_CHUNK_ROWS = 2048
"""The fewest that the default budget gives on a GPU. Every chunk reads and writes the fp32 weight gradient, 8 V H bytes
at 4 TB/s, beside 6 C V H FLOPs at some 700 TFLOP/s: with 2048 rows a tenth of the products' time, partly hidden under
them."""
DEVICE_TILE_ROWS = 128
"""A GPU's products work on tiles of this many rows: five chunks of 3277 rows would fill 130 of them instead of 128."""


@functools.cache
def _total_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory; 0 where there is none to ask, as for fake tensors."""
    available = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).total_memory if available else 0


def _device_budget(device: torch.device) -> int:
    least, most = CHUNK_BYTES_DEVICE
    return min(most, max(least, _total_memory(device) // 32))


def chunk_rows(
    chunk_bytes: int | None,
    vocabulary: int,
    logits_dtype: torch.dtype,
    device: torch.device,
    two_blocks: bool,
    narrows: bool = False,
) -> int:
    """Rows whose logits fill the budget, at least one.

    two_blocks: gradients of the loss and of the plain NLL are both kept. narrows: the gradient at the logits has a
    narrower dtype than they.
    """
    blocks = 2 if two_blocks else 1
    if device.type == "cpu":
        # The row pass widens logits to fp32 tile by tile, and a narrower gradient has a block of its own.
        row_bytes = vocabulary * (blocks * max(4, logits_dtype.itemsize) + (2 if narrows else 0))
        rows = (chunk_bytes or CHUNK_BYTES_CPU) // row_bytes
        return min(max(1, rows), CPU_CHUNK_ROWS)
    row_bytes = vocabulary * blocks * logits_dtype.itemsize
    if chunk_bytes:
        return max(1, chunk_bytes // row_bytes)
    return max(_device_budget(device) // row_bytes, DEVICE_CHUNK_ROWS)


def buffer_rows(largest: int, most_rows: int) -> int:
    """Rows of a GPU's buffer for chunks of `largest` rows: rounded up, within the budget where that has room."""
    step = min(DEVICE_BUFFER_ROWS, max(most_rows, 1))
    rounded = cdiv(largest, step) * step
    return min(rounded, max(most_rows, largest))


def narrow_sums(rows: int, most_rows: int, dtype: torch.dtype) -> bool:
    """Whether the parameters' gradients stay in the parameters' dtype: where a single product is all there is to add.

    Not in fp16, whose range a sum over rows may leave before it is scaled by 1 / rows.
    """
    return rows <= most_rows and dtype != torch.float16
