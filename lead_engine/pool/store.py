"""The pool as flat arrays of tokens, on disk, in host memory or on the training device, and micro-batches gathered
from it.

Placements: `device` keeps everything on the training device and gathers there. `pinned` keeps everything in host
memory, where a GPU's gather reads a micro-batch's samples over the bus, like any others. `mmap` (pool on disk, read
through the page cache) copies them into a small staging buffer in a background thread, then runs the same gather on the
device over that buffer. All three give equal batches. `store_files` says what lies on disk.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from lead_engine.config import Placement
from lead_engine.config.options import argument, device_argument
from lead_engine.pool.prefetch import HostPool, Prefetcher
from lead_engine.pool.store_files import Arrays, open_store, write_store
from lead_kernels import PackedBatch, gather_batch

ANSWERS = "answers"
"""Beside a pool's `store`: its answers without their instructions, for methods that measure both losses again."""


class TokenStore:
    """N tokenised samples, made by `open`.

    tokens int32 [num_tokens], response bool [num_tokens] (the tokens to learn), offsets int64 [N + 1] (sample i is
    tokens[offsets[i] : offsets[i + 1]]): on `device` for placement `device`, else on the host, in pinned memory for
    placement `pinned` on a GPU. lengths int64 [N] (tokens) and response_rows int64 [N] (tokens with a loss; a sample's
    first token never has one): on the CPU.

    `close` (or leaving a `with` block) ends the background thread of placement `mmap`.
    """

    def __init__(self, arrays: Arrays, meta: dict[str, Any], placement: Placement, device: torch.device) -> None:
        self.placement: Placement = placement
        self.device = device
        self.num_samples: int = meta["num_samples"]
        self.num_tokens: int = meta["num_tokens"]
        self.max_token_id: int = meta["max_token_id"]
        self.lengths = torch.from_numpy(np.diff(arrays["offsets"]))
        self.response_rows = torch.from_numpy(np.array(arrays["response_rows"]))
        tokens, response, offsets = (_as_tensor(arrays[name]) for name in ("tokens", "response", "offsets"))
        self._prefetcher: Prefetcher | None = None
        if placement == "mmap":
            self.tokens, self.response, self.offsets = tokens, response, offsets
            self._prefetcher = Prefetcher(HostPool(tokens, response, np.array(arrays["offsets"])), device)
            weakref.finalize(self, self._prefetcher.close)
        else:
            self.tokens = _placed(tokens, placement, device)
            self.response = _placed(response, placement, device)
            self.offsets = _placed(offsets, placement, device)

    @staticmethod
    def open(folder: Path | str, placement: Placement = "auto", device: torch.device | str = "cpu") -> TokenStore:
        """Open a written store.

        placement `auto` is `device` where the pool fits in a quarter of the device's free memory, else `mmap`.
        Raises UserError naming the file that is missing or damaged.
        """
        path: Path = argument(Path, folder, "TokenStore.open(folder)")
        placement = argument(Placement, placement, "TokenStore.open(placement)")
        where: torch.device = device_argument(device, "TokenStore.open(device)")
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        arrays, meta = open_store(path)
        if placement == "auto":
            needed = sum(arrays[name].nbytes for name in ("tokens", "response", "offsets"))
            placement = "device" if needed <= _free_bytes(where) // 4 else "mmap"
        return TokenStore(arrays, meta, placement, where)

    @staticmethod
    def write(folder: Path | str, samples: Iterable[Sequence[Any]]) -> None:
        """Write a store from (token ids, response mask, ...) of each sample; replaces an older one.

        Raises UserError where there is no sample, ValueError for an empty sample or a mask of another length.
        """
        write_store(argument(Path, folder, "TokenStore.write(folder)"), samples)

    @property
    def wants_prefetch(self) -> bool:
        """Whether `batch` hands out only what `prefetch` has asked for, which needs the ids on the host."""
        return self._prefetcher is not None

    def prefetch(self, sample_ids_host: Tensor) -> None:
        """For placement `mmap`: start gathering micro-batches in the background; `batch` then takes them in this order.

        sample_ids_host int64 [n, B] on the CPU, N in empty slots. May be called again before all are taken. Does
        nothing for other placements (`wants_prefetch` is False).
        """
        if self._prefetcher is not None:
            self._prefetcher.request(sample_ids_host)

    def batch(self, sample_ids: Tensor, *, capacity: int, num_rows: int) -> PackedBatch:
        """The packed micro-batch of sample_ids int64 [B] on the device, N in empty slots (`lead_kernels.gather_batch`).

        For placement `mmap` this is the next micro-batch asked for by `prefetch`, whose ids must be the same.
        RuntimeError where none was asked for, and whatever the background thread failed with.
        """
        if self._prefetcher is not None:
            return self._prefetcher.take(sample_ids, capacity=capacity, num_rows=num_rows)
        return gather_batch(self.tokens, self.response, self.offsets, sample_ids, capacity=capacity, num_rows=num_rows)

    def close(self) -> None:
        """End the background thread; the arrays stay readable."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _placed(mapped: Tensor, placement: Placement, device: torch.device) -> Tensor:
    """A copy of a mapped array where `placement` (not `mmap`) wants it."""
    if placement == "device":
        return mapped.to(device, copy=True)
    # A CPU reads any memory. PyTorch rounds a pinned tensor's memory up to a power of two.
    return mapped.pin_memory() if device.type == "cuda" else mapped.clone()


def _as_tensor(array: NDArray[Any]) -> Tensor:
    with warnings.catch_warnings():
        # The map is read-only on purpose: the kernel refuses a writable private map of a pool larger than memory.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
