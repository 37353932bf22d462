"""The files of a token store: written array by array, mapped and checked when opened.

A store is a folder: tokens.npy int32 [total], response.npy bool [total] (the tokens to learn), offsets.npy int64 [N +
1] (sample i is tokens[offsets[i] : offsets[i + 1]]), response_rows.npy int64 [N] (tokens with a loss) and meta.json. It
is written beside its final place and renamed when complete, so a folder of that name is always whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lead_engine.base.errors import UserError
from lead_engine.base.files import publish

VERSION = 1
ARRAYS: dict[str, DTypeLike] = {
    "tokens": np.int32,
    "response": np.bool_,
    "offsets": np.int64,
    "response_rows": np.int64,
}
COUNTS = ("num_samples", "num_tokens", "num_response_rows", "max_token_id")
"""What meta.json counts."""
AGAIN = "prepare the pool again (lead-engine prepare)"

Arrays = dict[str, NDArray[Any]]


# --- writing ---


def write_store(folder: Path, samples: Iterable[Sequence[Any]]) -> None:
    """Write a store from (token ids, response mask, ...) of each sample, one sample at a time; replaces an older one.

    Raises UserError where there is no sample, ValueError for an empty sample or a mask of another length.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    meta = _write_arrays(partial, samples)
    if meta["num_samples"] == 0:
        shutil.rmtree(partial)
        raise UserError(f"{folder}: no sample is left to train on")
    (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    publish(partial, folder)


class _ArrayFile:
    """A one-dimensional .npy file that grows.

    NumPy pads the header, so that the final length can be written over the first.
    """

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.dtype, self.length, self.sha = np.dtype(dtype), 0, hashlib.sha256()
        self.file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by `close`)
        self._header()
        self.start = self.file.tell()

    def _header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, values: NDArray[Any]) -> None:
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
    """Write the arrays; returns what goes into meta.json."""
    files = {name: _ArrayFile(folder / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
    num_tokens, max_token_id, num_response_rows = 0, 0, 0
    files["offsets"].append(np.zeros(1, dtype=np.int64))
    for number, sample in enumerate(samples):
        ids, response = np.asarray(sample[0], dtype=np.int64), np.asarray(sample[1], dtype=bool)
        _check_sample(number, ids, response)
        rows = int(response[1:].sum())  # nothing predicts a sample's first token
        num_tokens += len(ids)
        num_response_rows += rows
        max_token_id = max(max_token_id, int(ids.max()))
        files["tokens"].append(ids)
        files["response"].append(response)
        files["offsets"].append(np.array([num_tokens]))
        files["response_rows"].append(np.array([rows]))
    for file in files.values():
        file.close()
    return {
        "version": VERSION,
        "num_samples": files["response_rows"].length,
        "num_tokens": num_tokens,
        "num_response_rows": num_response_rows,
        "max_token_id": max_token_id,
        "dtypes": {name: np.dtype(dtype).name for name, dtype in ARRAYS.items()},
        "digests": {name: file.sha.hexdigest() for name, file in files.items()},
    }


def _check_sample(number: int, ids: NDArray[np.int64], response: NDArray[np.bool_]) -> None:
    largest = np.iinfo(np.int32).max
    if not len(ids) or ids.shape != response.shape or ids.min() < 0 or ids.max() > largest:
        shapes = f"has shapes {ids.shape} and {response.shape}"
        raise ValueError(f"sample {number}: needs token ids in int32 and a mask of the same length, {shapes}")


# --- opening ---


def open_store(folder: Path) -> tuple[Arrays, dict[str, Any]]:
    """The arrays of a written store, mapped from disk and checked, and meta.json.

    Raises UserError naming the file that is missing or damaged.
    """
    meta = _read_meta(folder)
    arrays = _map_arrays(folder)
    _check(folder, arrays, meta)
    return arrays, meta


def store_digest(folder: Path) -> tuple[int, str]:
    """(samples, digest of tokens, masks and bounds) of a written store. UserError as `open_store` raises.

    The digests were noted when the store was written; arrays of an older version are read for them.
    """
    meta = _read_meta(folder)
    digests = meta.get("digests")
    if digests is None:
        digests = {name: hashlib.sha256(array.data).hexdigest() for name, array in _map_arrays(folder).items()}
    text = "".join(digests[name] for name in ARRAYS)
    return meta["num_samples"], hashlib.sha256(text.encode()).hexdigest()[:32]


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    if not path.is_file():
        interrupted = folder.with_name(folder.name + ".partial").exists()
        reason = "preparing was interrupted" if interrupted else "this is no token store"
        raise UserError(f"{path}: no such file; {reason}, {AGAIN}")
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = meta["version"]
        for name in COUNTS:
            int(meta[name])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); {AGAIN}") from None
    if version != VERSION:
        raise UserError(f"{path}: version {version}, this program reads {VERSION}; {AGAIN}")
    return meta


def _map_arrays(folder: Path) -> Arrays:
    return {name: _map(folder / f"{name}.npy", np.dtype(dtype)) for name, dtype in ARRAYS.items()}


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {AGAIN}") from None
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); {AGAIN}") from None
    if array.dtype != dtype or array.ndim != 1:
        holds = f"holds {array.dtype} {array.shape}, not {dtype.name} in one dimension"
        raise UserError(f"{path}: damaged ({holds}); {AGAIN}")
    return array


def _check(folder: Path, arrays: Arrays, meta: dict[str, Any]) -> None:
    samples, tokens = meta["num_samples"], meta["num_tokens"]
    lengths = {"tokens": tokens, "response": tokens, "offsets": samples + 1, "response_rows": samples}
    for name, length in lengths.items():
        found = len(arrays[name])
        if found != length:
            raise UserError(f"{folder / name}.npy: damaged (holds {found} values, meta.json says {length}); {AGAIN}")
    offsets, rows = arrays["offsets"], arrays["response_rows"]
    if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) <= 0).any():
        raise UserError(f"{folder / 'offsets.npy'}: damaged (offsets do not rise from 0 to {tokens}); {AGAIN}")
    if (rows < 0).any() or (rows >= np.diff(offsets)).any() or rows.sum() != meta["num_response_rows"]:
        raise UserError(f"{folder / 'response_rows.npy'}: damaged (counts do not fit the samples); {AGAIN}")
