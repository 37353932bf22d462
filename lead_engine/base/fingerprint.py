"""What an artefact was made from: written into it, and compared wherever two artefacts meet.

A fingerprint is made of parts (`sources`, `tokenizer`, `model`, `pool`), each a small JSON value of digests and counts.
It is of contents, never of paths or times: a folder that was moved or copied is the same. Each part is made by the
module that knows what it consists of (`pool/identity.py`, `model/identity.py`); this module digests, compares, and
says in words what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json, write_text

Parts = dict[str, Any]

FILE = "fingerprint.json"
"""In a run folder and in an adapter folder. Other artefacts have a file of their own in which it stands."""
KEY = "fingerprint"
"""Where it stands in such a file."""
CHUNK = 1 << 24
"""Bytes that one thread reads and digests at a time."""
THREADS = 8
WHAT = {
    "tokenizer": "the tokenizer",
    "model": "the model",
    "base": "the base model",
    "adapter": "the adapter",
    "pool": "the pool",
    "match": "the run that is imitated",
}
"""Parts, as a message calls them."""
COUNTS = {"vocabulary": "tokens", "weights": "tensors", "contents": "samples"}
"""Digests whose message tells a count as well: the key beside it."""


# --- digests ---


def digest(value: Any) -> str:
    """32 hexadecimal digits of the SHA-256 of a JSON value or bytes; the order of an object's keys does not matter."""
    if isinstance(value, bytes):
        data = value
    else:
        data = json.dumps(value, sort_keys=True, ensure_ascii=True).encode()
    return hashlib.sha256(data).hexdigest()[:32]


def digest_file(path: Path) -> str:
    """The digest of a file's contents, by several threads. OSError where the file cannot be read."""
    size = path.stat().st_size
    return digest([size, *digest_spans([(path, 0, size)])])


class _Chunk(NamedTuple):
    """Bytes [start, stop) of an open file, which belong to span number `span`."""

    span: int
    file: int
    start: int
    stop: int


def digest_spans(spans: Iterable[tuple[Path, int, int]]) -> list[str]:
    """The digest of each span: bytes [start, stop) of a file.

    Every byte is read: fine-tuned weights have the size and header of their base. Spans are digested in chunks of
    CHUNK bytes by several threads (hashlib lets other threads run meanwhile), and a span's digest is that of its
    chunks' digests.
    """
    spans = list(spans)
    with ExitStack() as stack:
        files = {}
        for path in {path for path, _, _ in spans}:
            files[path] = stack.enter_context(path.open("rb", buffering=0)).fileno()
        chunks = [
            _Chunk(number, files[path], begin, min(stop, begin + CHUNK))
            for number, (path, start, stop) in enumerate(spans)
            for begin in range(start, stop, CHUNK)
        ]
        whole = [hashlib.sha256() for _ in spans]
        threads = stack.enter_context(ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)))
        for chunk, found in zip(chunks, threads.map(_digest_chunk, chunks), strict=True):
            whole[chunk.span].update(found)
    return [each.hexdigest()[:32] for each in whole]


def _digest_chunk(chunk: _Chunk) -> bytes:
    sha = hashlib.sha256()
    place = chunk.start
    while place < chunk.stop:
        data = os.pread(chunk.file, chunk.stop - place, place)
        if not data:  # the file has become shorter since
            break
        sha.update(data)
        place += len(data)
    return sha.digest()


# --- comparing ---


def differences(before: Parts, now: Parts, then: str = "then", today: str = "now") -> list[str]:
    """What differs between two fingerprints, one phrase for each difference.

    Parts and keys that only one of them has are not compared. then, today: what the phrases call the two sides.
    """
    found: list[str] = []
    for name, part in before.items():
        other = now.get(name)
        if part is None or other is None or part == other:
            continue
        if name == "sources":
            found += _source_differences(part, other, then, today)
        else:
            found += _part_differences(name, part, other, then, today)
    return found


def _part_differences(name: str, before: Parts, now: Parts, then: str, today: str) -> Iterator[str]:
    what = WHAT.get(name, name)
    nested = {key for key in before if isinstance(before[key], dict)}
    if nested != {key for key in now if isinstance(now[key], dict)}:
        yield f"{what} is an adapter {then if nested else today} only"
        return
    for key in before:
        if key in nested:
            yield from _part_differences(key, before[key], now[key], then, today)
        elif key not in COUNTS.values() and key in now and before[key] != now[key]:
            verb = "differ" if key.endswith("s") else "differs"
            yield f"{key} of {what} {verb}{_counts(key, before, now, then, today)}"


def _counts(key: str, before: Parts, now: Parts, then: str, today: str) -> str:
    """The counts beside a digest, " (3 tokens then, 4 now)"; nothing where both have the same, or one has none."""
    unit = COUNTS.get(key)
    if unit is None:
        return ""
    first, second = before.get(unit), now.get(unit)
    if first is None or second is None or first == second:
        return ""
    return f" ({first:,} {unit} {then}, {second:,} {today})"


def _source_differences(before: Sequence[Parts], now: Sequence[Parts], then: str, today: str) -> Iterator[str]:
    if len(before) != len(now):
        yield f"{len(before)} sources {then}, {len(now)} {today}"
        return
    digests, digests_now = [str(a["digest"]) for a in before], [str(b["digest"]) for b in now]
    if digests == digests_now:  # perhaps under other names, which do not count
        return
    if sorted(digests) == sorted(digests_now):
        yield f"the sources are in another order ({', '.join(b['name'] for b in now)})"
        return
    for a, b in zip(before, now, strict=True):
        if a["digest"] == b["digest"]:
            continue
        if a["digest"] is None or b["digest"] is None:
            yield f"{b['name']} cannot be loaded, so whether it has changed cannot be told"
            continue
        name = b["name"] if a["name"] == b["name"] else f"{b['name']} ({then}: {a['name']})"
        yield f"{name} has other contents ({_sizes(a, b, then, today)})"


def _sizes(before: Parts, now: Parts, then: str, today: str) -> str:
    first, second = before.get("bytes"), now.get("bytes")
    if first is None or second is None:  # of the hub
        return "it is another data set"
    return f"{first:,} bytes {then}, {second:,} {today}"


# --- in artefacts ---


def write(folder: Path, parts: Parts) -> None:
    """Write FOLDER/fingerprint.json; it appears whole."""
    write_text(folder / FILE, json.dumps(parts, indent=1) + "\n")


def read(folder: Path) -> Parts | None:
    """What FOLDER/fingerprint.json says; None where there is none. UserError if it is damaged."""
    path = folder / FILE
    return read_json(path) if path.exists() else None


def refuse(what: str, found: Sequence[str], way_out: str) -> None:
    """UserError "WHAT: DIFFERENCES; WAY OUT" if there are any differences."""
    if found:
        raise UserError(f"{what}: {'; '.join(found)}. {way_out}")
