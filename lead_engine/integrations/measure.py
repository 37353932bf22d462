"""Measures of every row: length, tokens to learn, first and last tokens, and a hash of tokens and mask.

The hash tells rows that are not the pool's, or not those of a checkpoint's run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lead_engine.base.errors import UserError
from lead_engine.integrations.rows import Collator, one_sample
from lead_engine.pool.store import TokenStore

ROWS = 10_000
"""Rows read at a time."""
Flat = tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.int64]]
"""Rows one behind the other: tokens [T], which of them are learned bool [T], and bounds int64 [n + 1] of the n rows."""


class Measured(NamedTuple):
    """Measures of N rows, on the host."""

    lengths: Tensor
    """int64 [N], tokens."""
    counts: Tensor
    """int64 [N], tokens to learn; never a row's first token, which nothing predicts."""
    hashes: Tensor
    """int64 [N], of tokens and mask."""
    first: Tensor
    """int64 [N, 2], the first two tokens; -1 where there are fewer."""
    last: Tensor
    """int64 [N, 2], the last two tokens to learn; -1 where there are fewer."""
    largest: Tensor
    """int64 [N], the largest token id; -1 in an empty row."""

    def of(self, rows: Tensor) -> Measured:
        """The measures of some rows, in the order given. rows: int64 row numbers."""
        return Measured(*(values[rows] for values in self))

    @property
    def digest(self) -> str:
        """A hash of all rows in their order."""
        return hashlib.blake2b(self.hashes.numpy().tobytes(), digest_size=8).hexdigest()


def measure(dataset: Any, collate: Collator) -> Measured:
    """Measure every row: from Arrow's buffers where they hold labels, else one at a time through the collator.

    Raises UserError if there are no rows, or naming a row with other counts of tokens and labels.
    """
    columns = getattr(dataset, "column_names", None) or ()
    if {"input_ids", "labels"} <= set(columns) and dataset.format["type"] != "custom":
        parts = _arrow(dataset)
    else:
        parts = _collated(dataset, collate)
    measured = [_measure(*part) for part in parts]
    if not measured:
        raise UserError("train_dataset: has no rows")
    return Measured(*(torch.cat(values) for values in zip(*measured, strict=True)))


def measure_store(store: TokenStore) -> Measured:
    """Measure every sample of a pool."""
    parts = []
    for start in range(0, store.num_samples, ROWS):
        bounds = store.offsets[start : start + ROWS + 1].numpy()
        part = slice(int(bounds[0]), int(bounds[-1]))
        parts.append(_measure(store.tokens[part].numpy(), store.response[part].numpy(), bounds - bounds[0]))
    return Measured(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _arrow(dataset: Any) -> Iterator[Flat]:
    import pyarrow as pa
    import pyarrow.compute as pc

    start = 0
    for table in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=ROWS):
        tokens, labels = (pa.concat_arrays(table.column(name).chunks) for name in ("input_ids", "labels"))
        lengths, others = (np.asarray(pc.fill_null(pc.list_value_length(column), -1)) for column in (tokens, labels))
        wrong = np.flatnonzero((lengths != others) | (lengths < 0))
        if len(wrong):
            i = int(wrong[0])
            counts = f"{lengths[i]} input_ids and {others[i]} labels"
            raise UserError(f"train_dataset: row {start + i} has {counts}; give as many of both")
        flat, learn = (column.flatten().to_numpy(zero_copy_only=False) for column in (tokens, labels))
        yield flat, learn != -100, np.concatenate([[0], lengths.astype(np.int64).cumsum()])
        start += len(lengths)


def _collated(dataset: Any, collate: Collator) -> Iterator[Flat]:
    for start in range(0, len(dataset), ROWS):
        found = [one_sample(dataset[i], collate) for i in range(start, min(start + ROWS, len(dataset)))]
        tokens, labels = (torch.cat(values).numpy() for values in zip(*found, strict=True))
        yield tokens, labels != -100, np.cumsum([0, *(len(row) for row, _ in found)])


def _measure(tokens: NDArray[Any], learned: NDArray[np.bool_], bounds: NDArray[np.int64]) -> Measured:
    """Measure rows that lie one behind the other; see `Flat`."""
    tokens, lengths = tokens.astype(np.int64), np.diff(bounds)
    place_in_row = np.arange(len(tokens)) - np.repeat(bounds[:-1], lengths)
    learned = learned & (place_in_row > 0)
    # Each token is hashed with its mask and its place, so that a row's sum of hashes depends on their order.
    hashed = _mix((tokens * 2 + learned).astype(np.uint64) ^ _mix(place_in_row.astype(np.uint64) + np.uint64(1)))
    hashes = _sums(hashed, bounds).view(np.int64)
    counts = _sums(learned.astype(np.int64), bounds)
    first = [np.where(lengths > k, _take(tokens, bounds[:-1] + k), -1) for k in (0, 1)]
    learned_at, ends = np.flatnonzero(learned), counts.cumsum()
    last = [np.where(counts > k, _take(tokens, _take(learned_at, ends - 1 - k)), -1) for k in (1, 0)]
    largest = np.full(len(lengths), -1)
    filled = lengths > 0
    if filled.any():  # reduceat takes no empty segments
        largest[filled] = np.maximum.reduceat(tokens, bounds[:-1][filled])
    found = (lengths, counts, hashes, np.stack(first, 1), np.stack(last, 1), largest)
    return Measured(*(torch.from_numpy(np.ascontiguousarray(values)) for values in found))


def _take(values: NDArray[Any], places: NDArray[Any]) -> NDArray[Any]:
    """values[places], and any value where a place lies outside: the caller masks those."""
    if not len(values):
        return np.zeros(len(places), values.dtype)
    taken: NDArray[Any] = values[places.clip(0, len(values) - 1)]
    return taken


def _sums(values: NDArray[Any], bounds: NDArray[np.int64]) -> NDArray[Any]:
    """The sum of each row's values, modulo 2^64."""
    total = np.concatenate([np.zeros(1, values.dtype), values.cumsum(dtype=values.dtype)])
    sums: NDArray[Any] = total[bounds[1:]] - total[bounds[:-1]]
    return sums


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash uint64 to uint64, one to one; every bit depends on every bit (the last step of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def check_against_pool(rows: Measured, pool: Measured) -> None:
    """Raise UserError if the numbers of rows differ, or naming the first row that is not the pool's sample."""
    if len(rows.lengths) != len(pool.lengths):
        raise UserError(
            f"train_dataset: {len(rows.lengths):,} rows, but the pool has {len(pool.lengths):,} samples; give the "
            "records it was prepared from, without those that its problems.jsonl names, or selection.dataset(), or no "
            "pool at all"
        )
    differs = (rows.hashes != pool.hashes).nonzero()
    if not len(differs):
        return
    i = int(differs[0])
    length, count = int(rows.lengths[i]), int(rows.counts[i])
    pool_length, pool_count = int(pool.lengths[i]), int(pool.counts[i])
    if (length, count) == (pool_length, pool_count):
        both = f"({length} tokens, {count} to learn, in both)"
        what = f"other tokens, or others of them to learn, than the pool's sample {both}"
    else:
        what = f"{length} tokens, {count} of them to learn; the pool's sample has {pool_length} and {pool_count}"
    raise UserError(
        f"train_dataset: row {i} has {what}; {len(differs):,} rows differ. Prepare the pool with the same tokenizer, "
        "template and --max-length, or train on selection.dataset(), or give no pool, to have the trainer's own rows "
        "scored"
    )


def check_learnable(counts: Tensor) -> None:
    """Raise UserError naming the first row without a token to learn, which would train nothing and say nothing."""
    empty = (counts == 0).nonzero()
    if len(empty):
        raise UserError(
            f"train_dataset: row {int(empty[0])} has no token to learn (all labels are -100); {len(empty):,} such "
            "rows. Raise max_length, correct the mask, or leave them out"
        )


def complaints(rows: Measured, tokenizer: Any, stops: Sequence[int]) -> list[str]:
    """Warnings about how rows start and end, which may be intended. stops: token ids that end a generation."""
    said, total = [], len(rows.lengths)
    special = torch.tensor(sorted({*stops, *getattr(tokenizer, "all_special_ids", ())}), dtype=torch.int64)
    endless = ~torch.isin(rows.last, special).any(1)
    if len(special) and endless.any():
        said.append(
            f"train_dataset: {int(endless.sum()):,} of {total:,} rows (the first: {int(endless.nonzero()[0])}) end in "
            "no special token that is learned, so they do not teach the model to stop: they have no end of turn or eos "
            "token, a mask or max_length cuts it off, or pad_token is the eos token"
        )
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return said  # this tokenizer puts no start token before a text
    starts = {"do not start with": rows.first[:, 0] != bos, "start twice with": (rows.first == bos).all(1)}
    for what, wrong in starts.items():
        if wrong.any():
            said.append(
                f"train_dataset: {int(wrong.sum()):,} of {total:,} rows (the first: {int(wrong.nonzero()[0])}) {what} "
                f"{tokenizer.bos_token!r}, which this tokenizer puts before a text once"
            )
    return said
