"""Where the user's rows lie in a collated batch, and what is to be learned in them.

Everything here is on the host, on what the collator gives before it goes to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lead_engine.base.errors import UserError

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
        raise UserError(
            f"data_collator: gives {', '.join(batch)}; batches need input_ids and labels (-100 where nothing is to be learned)"
        )
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
        if lengths is not None and bool((batch["attention_mask"][:, 0] == 0).any()):
            raise UserError(
                "data_collator: pads on the left, so that places are no longer a sample's own; set "
                "tokenizer.padding_side = 'right' before the collator is used (generation wants 'left': set it back "
                "when training is over)"
            )
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


def check_batch(located: Located, ids: list[int], lengths: Tensor, counts: Tensor) -> None:
    """UserError unless a batch holds what the selection believes it planned: the samples `ids`, in order, whole."""
    for slot, i in enumerate(ids):
        tokens = None if located.lengths is None else int(located.lengths[slot])
        if int(located.counts[slot]) != int(counts[i]) or tokens not in (None, int(lengths[i])):
            raise UserError(
                f"data_collator: row {i} came out with {tokens} tokens, {int(located.counts[slot])} of them to learn; the selection "
                f"counted on {int(lengths[i])} and {int(counts[i])}. Collators must keep the order of samples and cut nothing"
            )
