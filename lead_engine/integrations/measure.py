"""What the user's rows are, row for row: how long, what is learned, how they start and end, and a hash of it all.

The hash stands for a row's tokens and mask: it tells rows that are not the pool's, or not a checkpoint's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lead_engine.base.errors import UserError
from lead_engine.integrations.rows import Collator, one_sample
from lead_engine.pool.store import TokenStore

ROWS = 10_000
"""Rows read at a time."""


class Measured(NamedTuple):
    """N rows; everything on the host."""

    lengths: Tensor
    """int64 [N], tokens."""
    counts: Tensor
    """int64 [N], tokens to learn; a row's first token is predicted by nothing."""
    hashes: Tensor
    """int64 [N], of tokens and mask."""
    first: Tensor
    """int64 [N, 2], the first two tokens; -1 where there are fewer."""
    last: Tensor
    """int64 [N, 2], the last two tokens to learn; -1 where there are fewer."""
    largest: Tensor
    """int64 [N], the largest token id; -1 in an empty row."""

    def of(self, places: Tensor) -> Measured:
        """The rows at `places`, in that order."""
        return Measured(*(values[places] for values in self))

    @property
    def digest(self) -> str:
        """A hash of all rows in their order."""
        return hashlib.blake2b(self.hashes.numpy().tobytes(), digest_size=8).hexdigest()


def measure(dataset: Any, collate: Collator) -> Measured:
    """Every row, by Arrow's buffers where there are labels, else one at a time through the collator.

    UserError where there is none, or naming one whose labels are not as many as its tokens.
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
    """Every sample of a pool."""
    parts = []
    for start in range(0, store.num_samples, ROWS):
        bounds = store.offsets[start : start + ROWS + 1].numpy()
        place = slice(int(bounds[0]), int(bounds[-1]))
        parts.append(_measure(store.tokens[place].numpy(), store.response[place].numpy(), bounds - bounds[0]))
    return Measured(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _arrow(dataset: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
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


def _collated(dataset: Any, collate: Collator) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for start in range(0, len(dataset), ROWS):
        found = [one_sample(dataset[i], collate) for i in range(start, min(start + ROWS, len(dataset)))]
        tokens, labels = (torch.cat(values).numpy() for values in zip(*found, strict=True))
        yield tokens, labels != -100, np.cumsum([0, *(len(row) for row, _ in found)])


def _measure(tokens: np.ndarray, learn: np.ndarray, bounds: np.ndarray) -> Measured:
    """tokens [T], learn bool [T] of rows that lie one behind the other; bounds int64 [n + 1]."""
    tokens, lengths = tokens.astype(np.int64), np.diff(bounds)
    place = np.arange(len(tokens)) - np.repeat(bounds[:-1], lengths)
    learn = learn & (place > 0)
    mixed = _mix((tokens * 2 + learn).astype(np.uint64) ^ _mix(place.astype(np.uint64) + np.uint64(1)))
    hashes, counts = (_sums(values, bounds) for values in (mixed, learn.astype(np.int64)))
    learned = np.flatnonzero(learn)
    ends = counts.cumsum()
    first = [np.where(lengths > k, _at(tokens, bounds[:-1] + k), -1) for k in (0, 1)]
    last = [np.where(counts > k, _at(tokens, _at(learned, ends - 1 - k)), -1) for k in (1, 0)]
    largest = np.full(len(lengths), -1)
    some = lengths > 0
    if some.any():
        largest[some] = np.maximum.reduceat(tokens, bounds[:-1][some])
    found = (lengths, counts, hashes.view(np.int64), np.stack(first, 1), np.stack(last, 1), largest)
    return Measured(*(torch.from_numpy(np.ascontiguousarray(values)) for values in found))


def _at(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """values at places; anything where a place is none."""
    return values[places.clip(0, len(values) - 1)] if len(values) else np.zeros(len(places), values.dtype)


def _sums(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    total = np.concatenate([np.zeros(1, values.dtype), values.cumsum(dtype=values.dtype)])
    return total[bounds[1:]] - total[bounds[:-1]]


def _mix(x: np.ndarray) -> np.ndarray:
    """uint64 to uint64, one to one, every bit on every bit (splitmix64's last step)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def check_against_pool(rows: Measured, pool: Measured) -> None:
    """UserError naming the first row that is not the pool's sample of that place, or the difference in number."""
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
    mine, theirs = ((int(of.lengths[i]), int(of.counts[i])) for of in (rows, pool))
    what = f"{mine[0]} tokens, {mine[1]} of them to learn; the pool's sample has {theirs[0]} and {theirs[1]}"
    if mine == theirs:
        both = f"({mine[0]} tokens, {mine[1]} to learn, in both)"
        what = f"other tokens, or others of them to learn, than the pool's sample {both}"
    raise UserError(
        f"train_dataset: row {i} has {what}; {len(differs):,} rows differ. Prepare the pool with the same tokenizer, "
        "template and --max-length, or train on selection.dataset(), or give no pool: then the trainer's own rows are "
        "scored"
    )


def check_learnable(counts: Tensor) -> None:
    """UserError naming the first row in which nothing is to be learned: it would train nothing, in silence."""
    empty = (counts == 0).nonzero()
    if len(empty):
        raise UserError(
            f"train_dataset: row {int(empty[0])} has no token to learn (all labels are -100); {len(empty):,} such "
            "rows. Raise max_length, mend the mask, or leave them out"
        )


def complaints(rows: Measured, tokenizer: Any, stops: Sequence[int]) -> list[str]:
    """What a user should hear of how rows start and end; it may be meant so. stops: ids that end a generation."""
    said, total = [], len(rows.lengths)
    special = torch.tensor(sorted({*stops, *getattr(tokenizer, "all_special_ids", ())}), dtype=torch.int64)
    endless = ~torch.isin(rows.last, special).any(1)
    if len(special) and endless.any():
        said.append(
            f"train_dataset: {int(endless.sum()):,} of {total:,} rows (the first: {int(endless.nonzero()[0])}) end in "
            "no special token that is learned, so they do not teach the model to stop: there is no end of turn or eos, "
            "a mask or max_length cuts it off, or pad_token is the eos token"
        )
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return said
    found = {"do not start with": rows.first[:, 0] != bos, "start twice with": (rows.first == bos).all(1)}
    for what, wrong in found.items():
        if wrong.any():
            said.append(
                f"train_dataset: {int(wrong.sum()):,} of {total:,} rows (the first: {int(wrong.nonzero()[0])}) {what} "
                f"{tokenizer.bos_token!r}, which this tokenizer puts before a text once"
            )
    return said
