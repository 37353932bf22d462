"""Where a model's tensors lie in its checkpoint: transformers renames some, and holds some fused that are stored apart.

A mixture's experts, for one, are a parameter [experts, 2 I, H] in the module and 2 x experts matrices [I, H] in the
file. What transformers says of that (its conversion mapping) is worked out here on names and shapes alone: every
parameter becomes a list of places, each filled by one stored tensor. Reading and writing both follow that list, so a
rank reads only what its slices need, and what is saved has the names, shapes and dtypes of what was loaded.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from lead_engine.base.errors import UserError

Index = tuple[int | slice, ...]
Shapes = dict[str, tuple[int, ...]]
"""Of parameters and persistent buffers, by transformers' names."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Piece:
    """The part `tensor[index]` of a parameter or buffer is stored as `name`."""

    name: str
    index: Index


class Checkpoint:
    """The safetensors files of one folder: one file, or shards with an index. Opening reads headers only."""

    def __init__(self, folder: Path, single: str):
        self.folder = folder
        self._open: dict[str, Any] = {}
        index = folder / f"{single}.index.json"
        if index.exists():
            self.file_of: dict[str, str] = _weight_map(index)
        elif (folder / single).exists():
            self.file_of = dict.fromkeys(self._file(single).keys(), single)
        else:
            raise UserError(
                f"{folder}: no {single} (only safetensors weights are read; convert .bin files with transformers first)"
            )

    def path(self, name: str) -> Path:
        return self.folder / self.file_of[name]

    def tensor(self, name: str) -> Any:
        """A tensor to be sliced; nothing of it is read yet."""
        try:
            return self._file(self.file_of[name]).get_slice(name)
        except SafetensorError:
            raise UserError(
                f"{self.path(name)}: no tensor {name}, though the index says so; copy or download the file again"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises UserError for what is not a plain floating-point tensor."""
        stored = self.tensor(name).get_dtype()
        if stored not in DTYPES:
            raise UserError(
                f"{self.path(name)}: {name} is stored as {stored}; give the checkpoint that is not quantised"
            )
        return DTYPES[stored]

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{self.folder / name}: not a readable safetensors file ({error}); copy or download it again"
                ) from None
        return self._open[name]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not a safetensors index ({error!r}); copy or download it again") from None


@dataclass
class Layout:
    """A checkpoint's layout, kept with the model so that saving does not depend on what became of the folder since."""

    pieces: dict[str, list[Piece]]
    """Transformers' name of a parameter or persistent buffer -> the stored tensors that make it up."""
    dtype_of: dict[str, torch.dtype]
    """Of every stored tensor that is used."""
    file_of: dict[str, str]
    """Of every stored tensor, used or not."""
    folder: Path


def find_layout(checkpoint: Checkpoint, shapes: Shapes, transforms: list[Any], prefix: str) -> Layout:
    """Match stored tensors with the model's.

    transforms: transformers' conversion mapping
    of the model. prefix: that a checkpoint of the bare decoder lacks. Names that the checkpoint lacks are missing in
    the result. Raises UserError for a tensor whose stored shape is not the model's, or whose conversion is of a kind
    not known here.
    """
    found: dict[str, _Array] = {}
    parts: dict[str, tuple[WeightConverter, dict[str, list[_Array]]]] = {}
    for stored in sorted(checkpoint.file_of, key=_natural):
        name, converter, pattern = _rename(stored, shapes, transforms, prefix)
        if name is None:
            continue
        array = _Array(checkpoint.shape(stored), [Piece(stored, tuple(slice(0, n) for n in checkpoint.shape(stored)))])
        if converter is None or pattern is None:
            found[name] = array
        else:
            parts.setdefault(name, (converter, defaultdict(list)))[1][pattern].append(array)
    for name, (converter, arrays) in parts.items():
        found[name] = _convert(converter, arrays, name, checkpoint)
    for name, array in found.items():
        if array.shape != shapes[name]:
            first = array.pieces[0].name
            what = name if first == name else f"{name} (from {first} and {len(array.pieces) - 1} more)"
            raise UserError(
                f"{checkpoint.path(first)}: {what} has shape {list(array.shape)}, the model wants {list(shapes[name])}"
            )
    pieces = {name: array.pieces for name, array in found.items()}
    dtypes = {piece.name: checkpoint.dtype(piece.name) for some in pieces.values() for piece in some}
    return Layout(pieces, dtypes, dict(checkpoint.file_of), checkpoint.folder)


def read(checkpoint: Checkpoint, pieces: list[Piece], local: Tensor, place: tuple[slice, ...]) -> None:
    """Fill `local`, which is the part `place` of a whole tensor; reads no stored element that does not lie there."""
    for piece in pieces:
        if not piece.index:  # a scalar
            local.copy_(checkpoint.tensor(piece.name)[...])
        elif (both := _overlap(piece.index, place)) is not None:
            here, there = both
            local[here] = checkpoint.tensor(piece.name)[there].to(local.dtype)


def _overlap(index: Index, place: tuple[slice, ...]) -> tuple[Index, tuple[slice, ...]] | None:
    """The overlap of a stored tensor at `index` of a whole with the part `place`.

    Returns (where in the part, where in the stored tensor); None if there is none.
    """
    here, there = [], []
    for entry, span in zip(index, place, strict=True):
        if isinstance(entry, int):
            if not span.start <= entry < span.stop:
                return None
            here.append(entry - span.start)
            continue
        low, high = max(entry.start, span.start), min(entry.stop, span.stop)
        if low >= high:
            return None
        here.append(slice(low - span.start, high - span.start))
        there.append(slice(low - entry.start, high - entry.start))
    return tuple(here), tuple(there)


@dataclass
class _Array:
    """A tensor put together from stored ones, by shape alone."""

    shape: tuple[int, ...]
    pieces: list[Piece]


def _rename(
    stored: str, shapes: Shapes, transforms: list[Any], prefix: str
) -> tuple[str | None, WeightConverter | None, str | None]:
    """Find transformers' name for a stored tensor.

    Returns (name, the converter it goes through, the pattern it matched); (None, ...) if there is no name.
    """
    name = stored
    for transform in transforms:
        if not isinstance(transform, WeightConverter):
            name, _ = transform.rename_source_key(name)
    for transform in transforms:
        if isinstance(transform, WeightConverter):
            converted, pattern = transform.rename_source_key(name)
            if pattern is not None and (known := _known(converted, shapes, prefix)):
                return known, transform, pattern
    return _known(name, shapes, prefix) or _known(stored, shapes, prefix), None, None


def _known(name: str, shapes: Shapes, prefix: str) -> str | None:
    return next((n for n in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if n in shapes), None)


def _convert(converter: WeightConverter, arrays: dict[str, list[_Array]], name: str, checkpoint: Checkpoint) -> _Array:
    """What transformers' converter does to tensors, done to their places."""
    try:
        for operation in converter.operations:
            if type(operation) is MergeModulelist:
                arrays = {pattern: [_stack(some, operation.dim)] for pattern, some in arrays.items()}
            elif type(operation) is Concatenate:
                # In the order of the patterns, not of the names: gate before up.
                arrays = {
                    name: [
                        _concatenate([x for p in converter.source_patterns for x in arrays.get(p, [])], operation.dim)
                    ]
                }
            else:
                raise UserError(
                    f"{checkpoint.folder}: {name} is stored in a form ({operation!r}) that is not read a slice at a "
                    "time"
                )
    except ValueError:
        names = ", ".join(converter.source_patterns)
        raise UserError(
            f"{checkpoint.folder}: not all of {names} are there, or their shapes differ (for {name})"
        ) from None
    (array,) = (x for some in arrays.values() for x in some)
    return array


def _stack(arrays: list[_Array], dim: int) -> _Array:
    (shape,) = {array.shape for array in arrays}
    pieces = [
        Piece(p.name, (*p.index[:dim], i, *p.index[dim:])) for i, array in enumerate(arrays) for p in array.pieces
    ]
    return _Array((*shape[:dim], len(arrays), *shape[dim:]), pieces)


def _concatenate(arrays: list[_Array], dim: int) -> _Array:
    (_,) = {(*array.shape[:dim], *array.shape[dim + 1 :]) for array in arrays}
    offset, pieces = 0, []
    for array in arrays:
        for p in array.pieces:
            entry = p.index[dim]
            moved = entry + offset if isinstance(entry, int) else slice(entry.start + offset, entry.stop + offset)
            pieces.append(Piece(p.name, (*p.index[:dim], moved, *p.index[dim + 1 :])))
        offset += array.shape[dim]
    shape = arrays[0].shape
    return _Array((*shape[:dim], offset, *shape[dim + 1 :]), pieces)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key: expert 10 after expert 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"\.", name)]
