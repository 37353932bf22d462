"""What an artefact was made from: written into it, and compared wherever two artefacts meet.

A fingerprint is made of parts (`sources`, `tokenizer`, `model`, `pool`), each a small JSON value of digests and
counts. It is of contents
and never of paths or times: a folder that was moved or copied is the same. Who knows what a part is made of makes it
(`pool/identity.py`, `model/identity.py`); this module digests, compares, and says in words what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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
    """Of a JSON value (or bytes): 32 hexadecimal digits of SHA-256. The order of an object's keys does not matter."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, ensure_ascii=True).encode()
    return hashlib.sha256(data).hexdigest()[:32]


def digest_file(path: Path) -> str:
    """Of a file's contents, by several threads. OSError where it cannot be read."""
    size = path.stat().st_size
    return digest([size, *digest_spans([(path, 0, size)])])


def digest_spans(spans: Iterable[tuple[Path, int, int]]) -> list[str]:
    """Of the bytes [start, stop) of files, in chunks, in order; one string for a span however many chunks it has.

    Every byte is read: fine-tuned weights have the size and header of their base. hashlib lets other threads run
    meanwhile.
    """
    spans = list(spans)
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(path.open("rb", buffering=0)).fileno() for path in {path for path, *_ in spans}
        }
        chunks = [
            (number, files[path], at, min(stop, at + CHUNK))
            for number, (path, start, stop) in enumerate(spans)
            for at in range(start, stop, CHUNK)
        ]
        whole = [hashlib.sha256() for _ in spans]
        threads = stack.enter_context(ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)))
        for (number, *_), found in zip(chunks, threads.map(_digest_chunk, chunks), strict=True):
            whole[number].update(found)
    return [each.hexdigest()[:32] for each in whole]


def _digest_chunk(chunk: tuple[int, int, int, int]) -> bytes:
    _, file, at, stop = chunk
    sha = hashlib.sha256()
    while at < stop and (data := os.pread(file, stop - at, at)):
        sha.update(data)
        at += len(data)
    return sha.digest()


# --- comparing ---


def differences(before: Parts, now: Parts, then: str = "then", today: str = "now") -> list[str]:
    """What differs between two fingerprints, a phrase each; parts and keys that only one of them knows are not
    compared.

    then, today: what the phrases call the two sides.
    """
    return [
        phrase
        for name in before
        if name in now and before[name] != now[name] and before[name] is not None and now[name] is not None
        for phrase in _differences(name, before[name], now[name], then, today)
    ]


def _differences(name: str, before: Any, now: Any, then: str, today: str) -> Iterator[str]:
    if name == "sources":
        yield from _source_differences(before, now, then, today)
        return
    what = WHAT.get(name, name)
    nested = {key for key in before if isinstance(before[key], dict)}
    if nested != {key for key in now if isinstance(now[key], dict)}:
        yield f"{what} is an adapter {then if nested else today} only"
        return
    for key in before:
        if key in nested:
            yield from _differences(key, before[key], now[key], then, today)
        elif key not in COUNTS.values() and key in now and before[key] != now[key]:
            count = COUNTS.get(key)
            sizes = [side.get(count) for side in (before, now)]
            told = (
                f" ({sizes[0]:,} {count} {then}, {sizes[1]:,} {today})"
                if count and None not in sizes and sizes[0] != sizes[1]
                else ""
            )
            yield f"{key} of {what} {'differ' if key.endswith('s') else 'differs'}{told}"


def _source_differences(before: Sequence[Parts], now: Sequence[Parts], then: str, today: str) -> Iterator[str]:
    if len(before) != len(now):
        yield f"{len(before)} sources {then}, {len(now)} {today}"
        return
    same = [a["digest"] == b["digest"] for a, b in zip(before, now, strict=True)]
    if all(same):  # under other names
        return
    if sorted(str(a["digest"]) for a in before) == sorted(str(b["digest"]) for b in now):
        yield f"the sources are in another order ({', '.join(b['name'] for b in now)})"
        return
    for a, b, equal in zip(before, now, same, strict=True):
        if not equal:
            if None in (a["digest"], b["digest"]):
                yield f"{b['name']} cannot be loaded, so whether it has changed cannot be told"
                continue
            sizes = [side.get("bytes") for side in (a, b)]
            told = f"{sizes[0]:,} bytes {then}, {sizes[1]:,} {today}" if None not in sizes else "it is another data set"
            name = b["name"] if a["name"] == b["name"] else f"{b['name']} ({then}: {a['name']})"
            yield f"{name} has other contents ({told})"


# --- in artefacts ---


def write(folder: Path, parts: Parts) -> None:
    """Write FOLDER/fingerprint.json; it appears whole."""
    write_text(folder / FILE, json.dumps(parts, indent=1) + "\n")


def read(folder: Path) -> Parts | None:
    """What FOLDER/fingerprint.json says; None where there is none. UserError if it is damaged."""
    return read_json(folder / FILE) if (folder / FILE).exists() else None


def refuse(what: str, found: Sequence[str], way_out: str) -> None:
    """UserError "WHAT: DIFFERENCES; WAY OUT" if there are any differences."""
    if found:
        raise UserError(f"{what}: {'; '.join(found)}. {way_out}")
