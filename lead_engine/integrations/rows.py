"""The user's rows: how long they are, what is to be learned in them, and where their samples lie in a collated batch.

Everything here is on the host, on what the collator gives before it goes to the device.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lead_engine.errors import UserError

Collator = Callable[[list[Any]], Mapping[str, Any]]


class Located(NamedTuple):
    """A collated batch of b samples, R places with something to learn."""

    rows: Tensor  # int64 [R], flat places in the batch
    targets: Tensor  # int64 [R]
    row_slots: Tensor  # int64 [R]
    lengths: Tensor | None  # int64 [b], tokens, where the batch says
    counts: Tensor  # int64 [b], places of each sample
    flattened: bool  # all samples in one row


def locate(batch: Mapping[str, Any], samples: int) -> Located:
    """Where the samples of a batch lie that was collated from `samples` examples, in order: padded rows, or one row with position_ids.

    UserError where they cannot be told apart.
    """
    if "labels" not in batch or "input_ids" not in batch:
        raise UserError(f"data_collator: gives {', '.join(batch)}; batches need input_ids and labels (-100 where nothing is to be learned)")
    labels = batch["labels"]
    learn = labels[:, 1:] != -100
    flattened = "position_ids" in batch and "attention_mask" not in batch and len(labels) == 1
    if flattened:
        slot = (batch["position_ids"] == 0).cumsum(1) - 1
        learn = learn & (slot[:, 1:] == slot[:, :-1])  # a sample's first token is predicted by nothing
        lengths = torch.bincount(slot[0].clamp(0, samples), minlength=samples)[:samples]
    elif len(labels) == samples:
        slot = torch.arange(samples)[:, None].expand_as(labels)
        lengths = batch["attention_mask"].sum(1) if "attention_mask" in batch else None
    else:
        raise UserError(
            f"data_collator: made {len(labels)} rows of {samples} samples, so losses cannot be told apart; give one that pads, or one that "
            "flattens and returns position_ids"
        )
    row, place = learn.nonzero(as_tuple=True)
    row_slots = slot[row, place]
    counts = torch.bincount(row_slots, minlength=samples)
    return Located(row * labels.shape[1] + place, labels[row, place + 1], row_slots, lengths, counts, flattened)


def one_sample(example: Any, collate: Collator) -> tuple[Tensor, Tensor]:
    """An example as the model will see it: (tokens, labels), int64 [n] each, labels -100 where nothing is to be learned."""
    batch = collate([example])
    if "labels" not in batch or "input_ids" not in batch:
        locate(batch, 1)  # raises
    tokens, labels = batch["input_ids"][0], batch["labels"][0].clone()
    if "attention_mask" in batch:
        there = batch["attention_mask"][0].bool()
        tokens, labels = tokens[there], labels[there]
    labels[:1] = -100
    return tokens, labels


def measure(dataset: Any, collate: Collator) -> tuple[Tensor, Tensor]:
    """(tokens, places to learn) of every row: int64 [N] each. By Arrow's offsets where there are labels, else a row at a time."""
    columns = getattr(dataset, "column_names", None) or ()
    if {"input_ids", "labels"} <= set(columns) and dataset.format["type"] != "custom":
        return _measure_arrow(dataset)
    found = [one_sample(dataset[i], collate) for i in range(len(dataset))]
    return torch.tensor([len(tokens) for tokens, _ in found]), torch.tensor([int((labels != -100).sum()) for _, labels in found])


def _measure_arrow(dataset: Any) -> tuple[Tensor, Tensor]:
    lengths, counts = [], []
    for table in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=10_000):
        for chunk in table.column("labels").chunks:
            bounds = chunk.offsets.to_numpy()
            flat = (chunk.values.to_numpy(zero_copy_only=False)[: bounds[-1]] != -100).astype(np.int64)
            flat[bounds[:-1][np.diff(bounds) > 0]] = 0  # a sample's first token is predicted by nothing
            total = np.concatenate([[0], flat.cumsum()])
            counts.append(total[bounds[1:]] - total[bounds[:-1]])
        lengths += [np.diff(chunk.offsets.to_numpy()) for chunk in table.column("input_ids").chunks]
    return tuple(torch.from_numpy(np.concatenate(parts).astype(np.int64)) for parts in (lengths, counts))  # type: ignore[return-value]


def check_rows(lengths: Tensor, counts: Tensor, pool_lengths: Tensor, pool_counts: Tensor, names: Sequence[Any] | None = None) -> None:
    """UserError naming the first row that is another than the pool's sample of that place, or the difference in number."""
    if len(lengths) != len(pool_lengths):
        raise UserError(
            f"train_dataset: {len(lengths):,} rows, but the pool has {len(pool_lengths):,} samples; give the records it was prepared from, "
            "without those that its problems.jsonl names, or selection.dataset(), or no pool at all"
        )
    differs = ((lengths != pool_lengths) | (counts != pool_counts)).nonzero()
    if len(differs):
        i = int(differs[0])
        name = "" if names is None else f" ({names[i]})"
        raise UserError(
            f"train_dataset: row {i}{name} has {int(lengths[i])} tokens, {int(counts[i])} of them to learn; the pool's sample has "
            f"{int(pool_lengths[i])} and {int(pool_counts[i])}; {len(differs):,} rows differ. Prepare the pool with the same template and "
            "--max-length, or train on selection.dataset(), or give no pool: then the trainer's own rows are scored"
        )


def check_learnable(counts: Tensor) -> None:
    """UserError naming the first row in which nothing is to be learned: it would train nothing, in silence."""
    empty = (counts == 0).nonzero()
    if len(empty):
        raise UserError(
            f"train_dataset: row {int(empty[0])} has no token to learn (all labels are -100); {len(empty):,} such rows. Raise max_length, "
            "mend the mask, or leave them out"
        )


def check_batch(located: Located, ids: list[int], lengths: Tensor, counts: Tensor) -> None:
    """UserError unless a batch holds what the selection believes it planned: the samples `ids`, in order, whole."""
    for slot, i in enumerate(ids):
        tokens = None if located.lengths is None else int(located.lengths[slot])
        if int(located.counts[slot]) != int(counts[i]) or tokens not in (None, int(lengths[i])):
            raise UserError(
                f"data_collator: row {i} came out with {tokens} tokens, {int(located.counts[slot])} of them to learn; the selection "
                f"counted on {int(lengths[i])} and {int(counts[i])}. Collators must keep the order of samples and cut nothing"
            )
