"""Held-out records as tokens, kept in a folder: what a run measures itself on while it trains.

The folder holds store/ (tokens), records.parquet (id, dataset, file, line), problems.jsonl, and heldout.json, which is
written last and says from which contents and options it was made. A run that goes on reads it, and never files that may
have changed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from lead_engine.base.errors import UserError
from lead_engine.base.files import write_text
from lead_engine.config import Placement
from lead_engine.pool.problems import Problems
from lead_engine.pool.records import Record, read_records
from lead_engine.pool.store import TokenStore
from lead_engine.pool.template import Sample, encode

MARKER = "heldout.json"
UNNAMED_TASK = "unnamed"
"""Task of records without `dataset`."""


def task_of(record: Record) -> str:
    """The name under which a record's results are counted: its data set."""
    return record.dataset or UNNAMED_TASK


def encode_records(
    records: list[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    problems: Problems,
    *,
    skip_bad: bool,
    source: str,
) -> list[Sample]:
    """The samples of held-out records, in order. UserError where no answer begins within `max_length` tokens.

    source: what the message calls the records.
    """
    samples = list(encode(records, tokenizer, max_length, problems, skip_bad=skip_bad))
    if not samples:
        raise UserError(f"--max-length {max_length}: no answer in {source} begins within so few tokens; raise it")
    return samples


@dataclass(frozen=True)
class HeldOutData:
    """Held-out records, opened."""

    store: TokenStore
    tasks: list[str]
    """[n] names, in the order of the store."""

    @staticmethod
    def open(folder: Path, placement: Placement, device: torch.device | str) -> HeldOutData:
        """What `write_heldout` wrote. UserError if it is damaged."""
        try:
            tasks = pq.read_table(folder / "records.parquet", columns=["dataset"]).column("dataset").to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{folder / 'records.parquet'}: cannot be read ({str(error).splitlines()[0]})") from None
        return HeldOutData(TokenStore.open(folder / "store", placement, device), tasks)


def write_heldout(
    folder: Path,
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    skip_bad: bool,
    flag: str = "--eval-data",
    pool: Path | None = None,
    made_from: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Read and tokenise held-out records into `folder`, which is made once all of them are accepted.

    flag: what the user named the sources with. pool: the prepared pool in which to look for the same samples.
    made_from: kept in heldout.json.
    Returns heldout.json: {"made_from", "samples", "tokens", "problems": counts by kind, "in_pool"}. Raises UserError
    for sources that cannot be read and, without `skip_bad`, for records that cannot be used.
    """
    records, problems = read_records(sources, skip_bad=skip_bad, flag=flag)
    samples = encode_records(records, tokenizer, max_length, problems, skip_bad=skip_bad, source=" ".join(sources))
    folder.mkdir(parents=True, exist_ok=True)
    TokenStore.write(folder / "store", samples)
    kept = [sample.record for sample in samples]
    rows = [{"id": r.id, "dataset": task_of(r), "file": r.file, "line": r.line} for r in kept]
    pq.write_table(pa.Table.from_pylist(rows), folder / "records.parquet")
    problems.write(folder / "problems.jsonl")
    in_pool = 0 if pool is None else count_in_pool(samples, pool / "store")
    tokens = sum(len(sample.ids) for sample in samples)
    marker = {
        "made_from": made_from or {},
        "samples": len(samples),
        "tokens": tokens,
        "problems": problems.counts(),
        "in_pool": in_pool,
    }
    write_text(folder / MARKER, json.dumps(marker, indent=1) + "\n")
    return marker


def count_in_pool(samples: Sequence[Sample], store: Path) -> int:
    """How many of the samples are in a token store as well, token for token.

    Of the store, only what has the length and the number of response tokens of one of them is read.
    """
    counts = Counter(np.asarray(sample.ids, np.int32).tobytes() for sample in samples)
    keys = {_key(len(sample.ids), sum(sample.response[1:])) for sample in samples}
    found = set()
    with TokenStore.open(store, "mmap") as pool:
        tokens, offsets = pool.tokens.numpy(), pool.offsets.numpy()
        alike = np.isin(_key(pool.lengths.numpy(), pool.response_rows.numpy()), np.fromiter(keys, np.int64))
        for place in np.flatnonzero(alike):
            content = tokens[offsets[place] : offsets[place + 1]].tobytes()
            if content in counts:
                found.add(content)
    return sum(counts[content] for content in found)


def _key(length: Any, rows: Any) -> Any:
    """Length and number of response tokens as one number, of two integers or two arrays of them."""
    return length * (1 << 32) + rows
