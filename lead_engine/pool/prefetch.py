"""Micro-batches gathered on the host by a background thread, a few ahead of the training device."""

from __future__ import annotations

import queue
import threading
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lead_kernels import PackedBatch, gather_batch

DEPTH = 4
"""Micro-batches that may be ready at once; also the number of staging buffers."""
GRAIN = 4096
"""Staging buffers grow in steps of so many tokens, so that they are rarely allocated anew (pinning memory is slow)."""


class HostPool(NamedTuple):
    """tokens int32 [total] and response bool [total], mapped from disk; offsets int64 [N + 1] in memory."""

    tokens: Tensor
    response: Tensor
    offsets: NDArray[np.int64]


class Staging:
    """One micro-batch's samples, end to end: tokens int32 [S], response bool [S], offsets int64 [B + 1], ids int64 [B].

    S is the largest micro-batch so far, rounded up. In pinned memory for CUDA.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.copied: torch.cuda.Event | None = None
        self._allocate(0, 0)

    def _allocate(self, num_tokens: int, num_slots: int) -> None:
        self.tokens = torch.zeros(num_tokens, dtype=torch.int32, pin_memory=self.pinned)
        self.response = torch.zeros(num_tokens, dtype=torch.bool, pin_memory=self.pinned)
        self.offsets = torch.zeros(num_slots + 1, dtype=torch.int64, pin_memory=self.pinned)
        self.ids = torch.zeros(num_slots, dtype=torch.int64, pin_memory=self.pinned)

    def fill(self, pool: HostPool, ids: NDArray[np.int64]) -> None:
        """Copy the samples `ids` int64 [B] in; N is an empty slot."""
        if self.copied is not None:
            self.copied.synchronize()  # the device may still be reading what lay here before
        count = len(pool.offsets) - 1
        if len(ids) and not 0 <= ids.min() <= ids.max() <= count:
            raise IndexError(f"sample ids must lie in [0, {count}], found {ids.min()} to {ids.max()}")
        # An empty slot, id N, begins and ends at the pool's end: it has length 0.
        begins, ends = pool.offsets[np.minimum(ids, count)], pool.offsets[np.minimum(ids + 1, count)]
        bounds = np.concatenate([[0], np.cumsum(ends - begins)])
        if bounds[-1] > len(self.tokens) or len(ids) != len(self.ids):
            needed = -(-int(bounds[-1]) // GRAIN) * GRAIN
            self._allocate(max(len(self.tokens), needed, GRAIN), len(ids))
        for slot in np.flatnonzero(ids < count):
            here, there = slice(bounds[slot], bounds[slot + 1]), slice(begins[slot], ends[slot])
            # Tensor.copy_ lets go of the interpreter lock, so waiting for the disk does not stall the training thread.
            self.tokens[here].copy_(pool.tokens[there])
            self.response[here].copy_(pool.response[there])
        self.offsets.numpy()[:] = bounds
        self.ids.numpy()[:] = ids


class Prefetcher:
    """Fills staging buffers in the order of requests, at most DEPTH ahead; `take` hands them out in that order.

    The thread starts with the first request. An exception in it is raised by the `take` that would have got the batch.
    """

    def __init__(self, pool: HostPool, device: torch.device) -> None:
        self.device = device
        self._pool = pool
        self._requests: queue.SimpleQueue[NDArray[np.int64] | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[Staging | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Staging | BaseException] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._pending = 0
        self._closed = False

    def request(self, sample_ids: Tensor) -> None:
        """Ask for micro-batches sample_ids int64 [n, B] (CPU), N in empty slots."""
        if self._closed:
            raise RuntimeError("the token store is closed")
        if sample_ids.ndim != 2 or sample_ids.dtype != torch.int64 or sample_ids.device.type != "cpu":
            found = f"{sample_ids.dtype} {list(sample_ids.shape)} on {sample_ids.device}"
            raise ValueError(f"sample_ids: expected int64 [n, B] on the CPU, got {found}")
        if self._thread is None:
            for _ in range(DEPTH):
                self._free.put(Staging(self.device.type == "cuda"))
            self._thread = threading.Thread(target=self._work, name="lead-engine-prefetch", daemon=True)
            self._thread.start()
        for row in sample_ids.numpy().copy():
            self._requests.put(row)
        self._pending += len(sample_ids)

    def take(self, sample_ids: Tensor, *, capacity: int, num_rows: int) -> PackedBatch:
        """The next micro-batch asked for, gathered on the device; see TokenStore.batch."""
        if self._closed or not self._pending:
            raise RuntimeError(
                "no micro-batch was asked for: call prefetch with the same sample ids first (and before close)"
            )
        staging = self._ready.get()
        if isinstance(staging, BaseException):
            self.close()
            raise staging
        self._pending -= 1
        try:
            return self._to_device(staging, sample_ids, capacity, num_rows)
        finally:
            self._free.put(staging)

    def _to_device(self, staging: Staging, sample_ids: Tensor, capacity: int, num_rows: int) -> PackedBatch:
        tokens = staging.tokens.to(self.device, non_blocking=True)
        response = staging.response.to(self.device, non_blocking=True)
        offsets = staging.offsets.to(self.device, non_blocking=True)
        ids = staging.ids.to(self.device, non_blocking=True)
        if self.device.type == "cuda":  # the buffer may be filled again once the copies are done
            staging.copied = torch.cuda.Event()
            staging.copied.record(torch.cuda.current_stream(self.device))
        torch._assert_async((ids == sample_ids).all(), "micro-batches must be taken in the order of prefetch")
        # Inside the buffer slot b is sample b, of length 0 where the slot is empty; the pool's ids are put back after.
        slots = torch.arange(len(sample_ids), device=self.device)
        batch = gather_batch(tokens, response, offsets, slots, capacity=capacity, num_rows=num_rows)
        return batch._replace(sample_ids=sample_ids)

    def _work(self) -> None:
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # else pinning memory opens a context on the first GPU
            while True:
                row = self._requests.get()
                if row is None:  # None is what `close` wakes the thread with, whatever it waits for
                    return
                staging = self._free.get()
                if staging is None or self._closed:
                    return
                staging.fill(self._pool, row)
                self._ready.put(staging)
        except BaseException as error:  # handed to the consumer, who would wait for ever otherwise
            self._ready.put(error)

    def close(self) -> None:
        """End the thread, whatever it is waiting for. May be called more than once."""
        self._closed = True
        if self._thread is not None:
            self._free.put(None)
            self._requests.put(None)
            self._thread.join()
            self._thread = None
