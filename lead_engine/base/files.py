"""Files that appear whole or not at all, and reading back what the engine wrote."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lead_engine.base.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a whole text file: beside its place, then renamed."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file: beside its place, then renamed."""
    building = path.with_name(path.name + ".writing")
    building.write_bytes(data)
    os.replace(building, path)


def publish(building: Path, place: Path) -> None:
    """Rename a finished file or folder to its place, over whatever stood there before.

    Every file gets the mode that a plain `open` gives, 0666 without the umask's bits (and a folder's default ACL
    counts): safetensors makes its files readable by their owner alone. `building` lies on the same file system as
    `place`.
    """
    _set_plain_modes(building)
    if not place.is_dir():
        os.replace(building, place)
        return
    # A folder cannot be renamed onto another. Killed between the renames, PLACE.old and `building` both are there.
    old = place.with_name(f"{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(place, old)
    os.replace(building, place)
    shutil.rmtree(old)


def _set_plain_modes(building: Path) -> None:
    # The mode is read off a new file: asking for the umask would set it, for all threads.
    is_folder = building.is_dir()
    probe = (building if is_folder else building.parent) / f"{building.name}.mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    files = building.rglob("*") if is_folder else [building]
    for file in files:
        if file.is_file() and not file.is_symlink() and file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. UserError naming the file if it cannot be read or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # also UnicodeDecodeError
        raise UserError(f"{path}: damaged ({error}); delete it and make it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged (it holds no object); delete it and make it again")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSON Lines file. A last line that was cut off while it was written is left out.

    UserError naming file and line for any other line that is no object.
    """
    lines = path.read_bytes().split(b"\n")
    objects = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no line break after it
                break
            raise UserError(f"{path}:{number}: damaged ({error})") from None
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number}: expected an object, found {type(value).__name__}")
        objects.append(value)
    return objects
