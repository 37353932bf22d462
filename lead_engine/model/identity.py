"""What a model folder is, by contents: every weight, config.json, and of an adapter its base."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lead_engine.base import fingerprint
from lead_engine.base.console import say
from lead_engine.base.errors import UserError
from lead_engine.base.fingerprint import Parts
from lead_engine.model import adapter
from lead_engine.model.load import weights_folder
from lead_engine.model.stored import Checkpoint
from lead_engine.model.weights import SINGLE

VOLATILE = {
    "transformers_version",
    "_name_or_path",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
}
"""Keys of config files that say where something lies or who wrote it."""
SETTLED = 2.0
"""Seconds that a file must have been left alone before its times can be trusted to change with its contents."""
_known: dict[tuple[Any, ...], Parts] = {}
"""Within this process: the weights of files, by their names, sizes, times and places on the disk."""


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int


def model_parts(folder: Path) -> Parts:
    """What a model folder is, by contents.

    Of a model: {"tensors", "weights", "shapes", "config"}; of an adapter: {"adapter": the same, "base": the same}.

    Tensors are taken by name, in whatever files they lie. Raises UserError for files that cannot be read, and where
    an adapter's base
    is not the one that it was trained on (`adapter_base`).
    """
    base = weights_folder(folder)
    if base == folder:
        return _parts(folder, sorted(set(Checkpoint(folder, SINGLE).file_of.values())), "config.json")
    found = {"adapter": _parts(folder, [adapter.WEIGHTS], adapter.CONFIG), "base": model_parts(base)}
    _check_base(folder, base, found["base"])
    return found


def check_base(folder: Path) -> None:
    """UserError where an adapter's base is not the one that it was trained on; nothing for whole models."""
    if weights_folder(folder) != folder:
        model_parts(folder)


def _check_base(folder: Path, base: Path, now: Parts) -> None:
    before = fingerprint.read(folder)
    if before is None:
        say(f"{folder}: does not say what its base was; {base} is taken for it")
        return
    found = fingerprint.differences({"base": before["base"]}, {"base": now}, "when the adapter was trained")
    way_out = (
        "Bring back the base that it was trained on, or name its folder as base_model_name_or_path in "
        f"{folder / adapter.CONFIG}"
    )
    fingerprint.refuse(f"{folder}: {base} is not the base that the adapter was trained on", found, way_out)


def _parts(folder: Path, files: Iterable[str], config: str) -> Parts:
    paths = [folder / name for name in files]
    stats = [(str(path.resolve()), path.stat()) for path in paths if path.exists()]
    key = tuple((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats)
    settled = all(max(s.st_mtime, s.st_ctime) < time.time() - SETTLED for _, s in stats)
    weights = _known.get(key) or _weights(paths)
    if settled:
        _known[key] = weights
    return {**weights, "config": _config(folder / config)}


def _weights(paths: Iterable[Path]) -> Parts:
    tensors = sorted(tensor for path in paths for tensor in _tensors(path))
    contents = fingerprint.digest_spans([(tensor.path, tensor.start, tensor.stop) for tensor in tensors])
    shapes = [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in tensors]
    return {"tensors": len(tensors), "shapes": fingerprint.digest(shapes), "weights": fingerprint.digest(contents)}


def _tensors(path: Path) -> list[Stored]:
    """By the file's header: eight bytes of its length, JSON, then the tensors' bytes."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length)) if 0 < length <= path.stat().st_size else {}
        header.pop("__metadata__", None)
        return [
            Stored(name, each["dtype"], tuple(each["shape"]), path, *(8 + length + at for at in each["data_offsets"]))
            for name, each in header.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from None


def _config(path: Path) -> str:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return fingerprint.digest({key: value for key, value in values.items() if key not in VOLATILE})
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a transformers model config ({error})") from None
