"""Where the user's samples lie in a collated batch, and which of its tokens are learned.

Everything here happens on the host, on what the collator returns before it goes to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lead_engine.base.errors import UserError

Collator = Callable[[list[Any]], Mapping[str, Any]]
IGNORED = -100
"""The label of a token that is not learned."""


class Located(NamedTuple):
    """A collated batch of b samples, in which R positions predict a token to learn."""

    positions: Tensor
    """int64 [R], in the batch flattened to one row: position p predicts the token at p + 1."""
    targets: Tensor
    """int64 [R], the token that each position predicts."""
    slots: Tensor
    """int64 [R], the sample that each position belongs to, 0 to b - 1, non-decreasing."""
    lengths: Tensor | None
    """int64 [b], tokens of each sample; None if the batch does not tell (no attention mask)."""
    counts: Tensor
    """int64 [b], positions of each sample."""
    flattened: bool
    """Whether all samples stand in one row, told apart by position_ids alone."""


def locate(batch: Mapping[str, Any], samples: int) -> Located:
    """Find the samples in a batch that was collated from `samples` examples, in order.

    A batch holds either one padded row a sample or one row for all of them, with position_ids that start again at 0.
    Raises UserError if its samples cannot be told apart.
    """
    if "labels" not in batch or "input_ids" not in batch:
        raise UserError(
            f"data_collator: returns {', '.join(batch)}; a batch needs input_ids and labels (-100 marks tokens that "
            "are not learned)"
        )
    labels = batch["labels"]
    learned = labels[:, 1:] != IGNORED
    lengths: Tensor | None
    flattened = "position_ids" in batch and "attention_mask" not in batch and len(labels) == 1
    if flattened:
        sample = (batch["position_ids"] == 0).cumsum(1) - 1
        learned = learned & (sample[:, 1:] == sample[:, :-1])  # nothing predicts a sample's first token
        lengths = torch.bincount(sample[0].clamp(0, samples), minlength=samples)[:samples]
    elif len(labels) == samples:
        sample = torch.arange(samples)[:, None].expand_as(labels)
        lengths = _padded_lengths(batch)
    else:
        raise UserError(
            f"data_collator: made {len(labels)} rows of {samples} samples, so their losses cannot be told apart; use "
            "a collator that pads, or one that flattens and returns position_ids"
        )
    row, column = learned.nonzero(as_tuple=True)
    slots = sample[row, column]
    counts = torch.bincount(slots, minlength=samples)
    positions = row * labels.shape[1] + column
    return Located(positions, labels[row, column + 1], slots, lengths, counts, flattened)


def _padded_lengths(batch: Mapping[str, Any]) -> Tensor | None:
    if "attention_mask" not in batch:
        return None
    mask: Tensor = batch["attention_mask"]
    if bool((mask[:, 0] == 0).any()):
        # Without position_ids a model numbers positions from the row's start, padding included.
        raise UserError(
            "data_collator: pads on the left, which shifts the positions of a sample's tokens; set "
            "tokenizer.padding_side = 'right' before the collator is used (generation wants 'left': set it back after "
            "training)"
        )
    return mask.sum(1)


def one_sample(example: Any, collate: Collator) -> tuple[Tensor, Tensor]:
    """An example as the model will see it: (tokens, labels), int64 [n] each; the label is -100 for the rest."""
    batch = collate([example])
    if "labels" not in batch or "input_ids" not in batch:
        locate(batch, 1)  # raises the error for such batches
    tokens, labels = batch["input_ids"][0], batch["labels"][0].clone()
    if "attention_mask" in batch:
        kept = batch["attention_mask"][0].bool()  # a collator may pad a single sample too, to a multiple of 8
        tokens, labels = tokens[kept], labels[kept]
    labels[:1] = IGNORED
    return tokens, labels


def check_batch(located: Located, ids: list[int], lengths: Tensor, counts: Tensor) -> None:
    """Raise UserError unless the batch holds the samples `ids`, in that order and uncut.

    lengths, counts: int64 [N], tokens and tokens to learn of every sample, as measured before.
    """
    for slot, i in enumerate(ids):
        tokens = None if located.lengths is None else int(located.lengths[slot])
        learned = int(located.counts[slot])
        same_length = tokens is None or tokens == int(lengths[i])
        if learned != int(counts[i]) or not same_length:
            raise UserError(
                f"data_collator: row {i} came out with {tokens} tokens, {learned} of them to learn; it was read with "
                f"{int(lengths[i])} and {int(counts[i])}. A collator must keep the order of the samples and cut nothing"
            )
