"""What the user names as a pool: files, folders, patterns, standard input and hub data sets, and how their bytes come.

A text file may be compressed (.gz, .zst, .bz2); Arrow reads it as it is read. Standard input is copied once into a
temporary file, so that it can be read as often as a file can: for its fingerprint, and for its records.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import glob
import io
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lead_engine.base.console import is_main, warn
from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json

STDIN = "-"
LINES = (".jsonl", ".ndjson", ".csv", ".tsv")
"""Text files whose records are found by their line."""
TEXT = (*LINES, ".json")
SUFFIXES = (*TEXT, ".parquet", ".arrow")
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
SHOWN = 20
KINDS = f"{', '.join(SUFFIXES)}; those of text also as {', '.join(COMPRESSED)}"
_HUB = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.+-]*)(?::(?P<split>.+))?)?")


class HubName(NamedTuple):
    """A hub data set, as its name, its configuration (None: the only one, or its default) and its split."""

    name: str
    config: str | None
    split: str


def expand(sources: Sequence[str], flag: str) -> list[str]:
    """The plain file paths that the sources stand for; hub data sets and "-" (standard input) pass through.

    A folder stands for the files of known kinds in it, a pattern (`*`, `?`, `[...]`, `**`) for those that match it,
    both in the order of their names; a folder that `datasets.save_to_disk` wrote stands for its Arrow files. `flag` is
    what the user named the sources with. Raises UserError for a source that is not there or is of an unknown kind, for
    a folder or pattern with no known file, and for a file that is named twice. Warns, once, of what else a folder or a
    pattern has.
    """
    found: list[str] = []
    unread: list[str] = []
    for source in map(os.fspath, sources):
        paths = _paths_in(source)
        if paths is None:
            found.append(_one(source, flag))
            continue
        known = [path for path in paths if os.path.isfile(path) and kind(path)]
        if not known:
            there = f" (it has {', '.join(map(os.path.basename, paths[:5]))})" if paths else ""
            raise UserError(f"{flag} {source}: no file of a known kind there{there}; known are {KINDS}")
        found += known
        unread += [path for path in paths if path not in set(known)]
    if not found:
        raise UserError(f"{flag}: name at least one file, folder or hub data set")
    for path, count in Counter(s if s == STDIN else os.path.realpath(s) for s in found).items():
        if count > 1:
            raise UserError(f"{flag} {path}: given {count} times; name every file once")
    if unread:
        _warn_unread(flag, tuple(unread))
    return found


def _paths_in(source: str) -> list[str] | None:
    """What a folder holds or a pattern matches, by name; None for a source that is neither."""
    if os.path.isdir(source):
        return saved_data_set(source) or sorted(glob.glob(os.path.join(glob.escape(source), "*")))
    # A file may have a name with brackets, and a hub name may hold one of a pattern's characters.
    if not os.path.exists(source) and glob.has_magic(source) and hub_name(source) is None:
        return sorted(glob.glob(source, recursive=True))
    return None


@functools.cache  # sources are expanded for their fingerprint, and to be read
def _warn_unread(flag: str, paths: tuple[str, ...]) -> None:
    warn(f"{flag}: not read, being of no known kind: {some(paths)}")


def some(names: Sequence[str]) -> str:
    """The names, as a warning lists them: 20 at most."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _one(source: str, flag: str) -> str:
    """A source that is neither a folder nor a pattern. Raises UserError if it cannot be read."""
    if source == STDIN or (not os.path.exists(source) and hub_name(source)):
        return source
    if not os.path.exists(source):
        raise UserError(f"{flag} {source}: no such file")
    if not kind(source):
        raise UserError(f"{flag} {source}: unknown kind of file; known are {KINDS}")
    return source


def kind(path: str) -> str | None:
    """The file's kind by its name, without compression: ".jsonl" of "a.jsonl.gz"; None if it is unknown."""
    name, last = os.path.splitext(path.lower())
    if last in COMPRESSED:
        last = os.path.splitext(name)[1]
        return last if last in TEXT else None
    return last if last in SUFFIXES else None


def has_lines(source: str) -> bool:
    """Whether the source's records are found by their line; else by their number."""
    return source == STDIN or kind(source) in LINES


def hub_name(source: str) -> HubName | None:
    """The hub data set that `NAME[:CONFIG[:SPLIT]]` means; None if the source cannot be one.

    An empty CONFIG is the default. SPLIT is `train` unless given, and may be a slice (`train[:1000]`).
    """
    match = _HUB.fullmatch(source)
    if match is None or kind(match["name"]):
        return None
    return HubName(match["name"], match["config"] or None, match["split"] or "train")


def saved_data_set(folder: str) -> list[str]:
    """The Arrow files, in order, of a data set that `datasets.save_to_disk` wrote; none for any other folder.

    Raises UserError for a folder of several, which it writes for one with splits.
    """
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        splits = ", ".join(sorted(str(path.parent) for path in Path(folder).glob("*/state.json")))
        raise UserError(f"{folder}: holds several data sets; name those to read: {splits}")
    state = Path(folder, "state.json")
    if not state.exists() or not Path(folder, "dataset_info.json").exists():
        return []
    try:
        return [os.path.join(folder, file["filename"]) for file in read_json(state)["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"{state}: not as `datasets` writes it; save the data set again") from None


def content_path(source: str) -> str:
    """The file that holds the source's bytes: the source itself, or the copy of standard input."""
    return _standard_input() if source == STDIN else source


@functools.cache
def _standard_input() -> str:
    """Path of a temporary copy of standard input, which can be read only once; deleted when this process ends."""
    if not is_main():
        raise UserError("-: ranks share one standard input, and here each has to read the records; name a file")
    stream = sys.stdin
    if stream is None or stream.isatty():
        raise UserError("-: standard input is not a file or a pipe; pipe the records into this command, or name a file")
    with tempfile.NamedTemporaryFile(prefix="lead-stdin-", suffix=".jsonl", delete=False) as copy:
        atexit.register(_delete, Path(copy.name), os.getpid())
        shutil.copyfileobj(stream.buffer, copy)
    return copy.name


def _delete(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child ends earlier
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def open_bytes(source: str) -> Iterator[BinaryIO]:
    """The source's bytes, decompressed; can be iterated by line.

    Reading raises OSError for a compressed file that is cut or damaged.
    """
    path = content_path(source)
    codec = COMPRESSED.get(os.path.splitext(path.lower())[1])
    if codec is None:
        with open(path, "rb") as file:
            yield file
        return
    import pyarrow

    with pyarrow.OSFile(path) as file, pyarrow.CompressedInputStream(file, codec) as stream:
        yield io.BufferedReader(stream, 1 << 18)
