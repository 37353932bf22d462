"""The pool as flat arrays of tokens, on disk, in host memory or on the training device, and micro-batches gathered from
it.

A store is a folder: tokens.npy int32 [total], response.npy bool [total] (the tokens to learn), offsets.npy int64 [N +
1] (sample i is tokens[offsets[i] : offsets[i + 1]]), response_rows.npy int64 [N] and meta.json. It is written beside
its final place and renamed when complete, so a folder of that name is always whole.

Placements: `device` keeps everything on the training device and gathers there. `pinned` keeps everything in host memory,
where a GPU's gather reads a micro-batch's samples over the bus, like any others. `mmap` (pool on disk, read through the
page cache) copies them into a small staging buffer in a background thread, then runs the same gather on the device over
that buffer. All three give equal batches.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from lead_engine.base.errors import UserError
from lead_engine.config import Placement
from lead_engine.config.options import argument, device_argument
from lead_engine.pool.prefetch import HostPool, Prefetcher
from lead_kernels import PackedBatch, gather_batch

VERSION = 1
ANSWERS = "answers"
"""Beside a pool's `store`: its answers without their instructions, for methods that measure both losses again."""
ARRAYS = {"tokens": np.int32, "response": np.bool_, "offsets": np.int64, "response_rows": np.int64}
AGAIN = "prepare the pool again (lead-engine prepare)"


class TokenStore:
    """N tokenised samples. Made by `open`; `close` (or leaving a `with` block) ends the background thread of placement
    `mmap`.

    tokens int32 [num_tokens], response bool [num_tokens], offsets int64 [N + 1]: on `device` for placement `device`,
    else on the host, in pinned memory for placement `pinned` on a GPU. lengths int64 [N] (tokens) and response_rows
    int64 [N] (tokens with a loss; a sample's first token never has one): on the CPU.
    """

    def __init__(
        self, arrays: dict[str, np.ndarray], meta: dict[str, Any], placement: Placement, device: torch.device
    ) -> None:
        self.placement: Placement = placement
        self.device = device
        self.num_samples: int = meta["num_samples"]
        self.num_tokens: int = meta["num_tokens"]
        self.max_token_id: int = meta["max_token_id"]
        self.lengths = torch.from_numpy(np.diff(arrays["offsets"]))
        self.response_rows = torch.from_numpy(np.array(arrays["response_rows"]))
        mapped = [_as_tensor(arrays[name]) for name in ("tokens", "response", "offsets")]
        self._prefetcher: Prefetcher | None = None
        if placement == "device":
            self.tokens, self.response, self.offsets = (x.to(device, copy=True) for x in mapped)
            return
        if placement == "pinned":
            # A CPU reads any memory. Mind that PyTorch rounds a pinned tensor's memory up to a power of two.
            pin = device.type == "cuda"
            self.tokens, self.response, self.offsets = (x.pin_memory() if pin else x.clone() for x in mapped)
            return
        self.tokens, self.response, self.offsets = mapped
        pool = HostPool(self.tokens, self.response, np.array(arrays["offsets"]))
        self._prefetcher = Prefetcher(pool, device)
        weakref.finalize(self, self._prefetcher.close)

    @staticmethod
    def open(folder: Path | str, placement: Placement = "auto", device: torch.device | str = "cpu") -> TokenStore:
        """Open a written store. `auto` is `device` where the pool fits in a quarter of the device's free memory, else
        `mmap`.

        Raises UserError naming the file that is missing or damaged.
        """
        folder = argument(Path, folder, "TokenStore.open(folder)")
        placement = argument(Placement, placement, "TokenStore.open(placement)")
        device = device_argument(device, "TokenStore.open(device)")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        meta = _read_meta(folder)
        arrays = {name: _map(folder / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
        _check(folder, arrays, meta)
        if placement == "auto":
            size = sum(arrays[name].nbytes for name in ("tokens", "response", "offsets"))
            placement = "device" if size <= _free_bytes(device) // 4 else "mmap"
        return TokenStore(arrays, meta, placement, device)

    @staticmethod
    def write(folder: Path | str, samples: Iterable[Sequence[Any]]) -> None:
        """Write a store from an iterator of (ids, response mask, ...), without holding it in memory; replaces an older
        one.

        Raises UserError where there is no sample, ValueError for an empty sample or a mask of another length.
        """
        folder = argument(Path, folder, "TokenStore.write(folder)")
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        meta = _write_arrays(partial, samples)
        if meta["num_samples"] == 0:
            shutil.rmtree(partial)
            raise UserError(f"{folder}: no sample is left to train on")
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        if folder.exists():  # a folder cannot be renamed onto another: move the old one aside first
            old = folder.with_name(folder.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
            os.replace(partial, folder)
            shutil.rmtree(old)
        else:
            os.replace(partial, folder)

    @property
    def wants_prefetch(self) -> bool:
        """Whether `batch` hands out only what `prefetch` has asked for, which needs the ids on the host."""
        return self._prefetcher is not None

    def prefetch(self, sample_ids_host: Tensor) -> None:
        """Start gathering micro-batches in the background, for placement `mmap`; `batch` then takes them in this order.

        sample_ids_host int64 [n, B] on the CPU, N in empty slots. May be called again before all are taken. Nothing to
        do for other placements (`wants_prefetch` is False).
        """
        if self._prefetcher is not None:
            self._prefetcher.request(sample_ids_host)

    def batch(self, sample_ids: Tensor, *, capacity: int, num_rows: int) -> PackedBatch:
        """The packed micro-batch of sample_ids int64 [B] (on the device; N in empty slots), see
        `lead_kernels.gather_batch`.

        For placement `mmap` this is the next micro-batch asked for by `prefetch`, whose ids must be the same;
        RuntimeError where none was asked for, and whatever the background thread failed with.
        """
        if self._prefetcher is None:
            return gather_batch(
                self.tokens, self.response, self.offsets, sample_ids, capacity=capacity, num_rows=num_rows
            )
        return self._prefetcher.take(sample_ids, capacity=capacity, num_rows=num_rows)

    def close(self) -> None:
        """End the background thread; the arrays stay readable."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- writing ---


class _ArrayFile:
    """A one-dimensional .npy file that grows: numpy pads the header so that the final length can be written over the
    first.
    """

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype, self.length, self.sha = np.dtype(dtype), 0, hashlib.sha256()
        self.file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by `close`)
        self._header()
        self.start = self.file.tell()

    def _header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, values: np.ndarray) -> None:
        data = values.astype(self.dtype, copy=False).tobytes()
        self.file.write(data)
        self.sha.update(data)
        self.length += len(values)

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        if self.file.tell() != self.start:
            raise RuntimeError("the header of the .npy file grew; the data behind it is overwritten")
        self.file.close()


def _write_arrays(folder: Path, samples: Iterable[Sequence[Any]]) -> dict[str, Any]:
    files = {name: _ArrayFile(folder / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
    limit = np.iinfo(np.int32).max
    total, largest, rows_total = 0, 0, 0
    files["offsets"].append(np.zeros(1, dtype=np.int64))
    for number, sample in enumerate(samples):
        ids, response = np.asarray(sample[0], dtype=np.int64), np.asarray(sample[1], dtype=bool)
        if not len(ids) or ids.shape != response.shape or ids.min() < 0 or ids.max() > limit:
            raise ValueError(
                f"sample {number}: needs token ids in int32 and a mask of the same length, has shapes {ids.shape} and {response.shape}"
            )
        total, rows = total + len(ids), int(response[1:].sum())
        largest, rows_total = max(largest, int(ids.max())), rows_total + rows
        files["tokens"].append(ids)
        files["response"].append(response)
        files["offsets"].append(np.array([total]))
        files["response_rows"].append(np.array([rows]))
    for file in files.values():
        file.close()
    return {
        "version": VERSION,
        "num_samples": files["response_rows"].length,
        "num_tokens": total,
        "num_response_rows": rows_total,
        "max_token_id": largest,
        "dtypes": {name: np.dtype(dtype).name for name, dtype in ARRAYS.items()},
        "digests": {name: file.sha.hexdigest() for name, file in files.items()},
    }


# --- opening ---


def store_digest(folder: Path) -> tuple[int, str]:
    """(samples, digest of tokens, masks and bounds) of a written store, as noted when it was written; one of an older
    version is read for it. UserError as `open` raises.
    """
    meta = _read_meta(folder)
    noted = meta.get("digests")
    if noted is None:
        arrays = {name: _map(folder / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
        noted = {name: hashlib.sha256(array).hexdigest() for name, array in arrays.items()}
    return meta["num_samples"], hashlib.sha256("".join(noted[name] for name in ARRAYS).encode()).hexdigest()[:32]


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    if not path.is_file():
        cut = folder.with_name(folder.name + ".partial").exists()
        raise UserError(
            f"{path}: no such file; {'preparing was interrupted' if cut else 'this is no token store'}, {AGAIN}"
        )
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version, _ = (
            meta["version"],
            [int(meta[k]) for k in ("num_samples", "num_tokens", "num_response_rows", "max_token_id")],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); {AGAIN}") from None
    if version != VERSION:
        raise UserError(f"{path}: version {version}, this program reads {VERSION}; {AGAIN}")
    return meta


def _map(path: Path, dtype: Any) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {AGAIN}") from None
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); {AGAIN}") from None
    if array.dtype != dtype or array.ndim != 1:
        raise UserError(
            f"{path}: damaged (holds {array.dtype} {array.shape}, not {np.dtype(dtype).name} in one dimension); {AGAIN}"
        )
    return array


def _check(folder: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    samples, tokens = meta["num_samples"], meta["num_tokens"]
    for name, length in (
        ("tokens", tokens),
        ("response", tokens),
        ("offsets", samples + 1),
        ("response_rows", samples),
    ):
        if len(arrays[name]) != length:
            raise UserError(
                f"{folder / name}.npy: damaged (holds {len(arrays[name])} values, meta.json says {length}); {AGAIN}"
            )
    offsets, rows = arrays["offsets"], arrays["response_rows"]
    if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) <= 0).any():
        raise UserError(f"{folder / 'offsets.npy'}: damaged (offsets do not rise from 0 to {tokens}); {AGAIN}")
    if (rows < 0).any() or (rows >= np.diff(offsets)).any() or rows.sum() != meta["num_response_rows"]:
        raise UserError(f"{folder / 'response_rows.npy'}: damaged (counts do not fit the samples); {AGAIN}")


def _as_tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # The map is read-only on purpose (a writable private map of a pool larger than memory is refused by the
        # kernel).
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
