"""The rows that a trainer trains, by sample number: read, measured and checked once, when the trainer is built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lead_engine.base.console import warn
from lead_engine.base.errors import UserError
from lead_engine.integrations.head import base_of, text_config
from lead_engine.integrations.measure import check_against_pool, check_learnable, complaints, measure, measure_store
from lead_engine.integrations.rows import IGNORED, Collator, check_batch, locate, one_sample
from lead_engine.integrations.settings import Settings
from lead_engine.integrations.tokens import check_tokenizer
from lead_engine.model.vocabulary import check_vocabulary

ROW_NUMBER = "_lead_row"
"""A column with each row's number, because a trainer's own preparation may shuffle rows or leave some out."""


class TrainingRows:
    """A data set and its collator. Sample i is the pool's sample i or, without a pool, row i of the data set.

    rows: the data set as the trainer prepared it. collate: makes a batch of its rows. row_of: int64 [N], the row that
    holds each sample; None if sample i is row i. Raises UserError for a row with other counts of tokens and labels.
    """

    def __init__(self, rows: Any, collate: Collator, row_of: Tensor | None = None) -> None:
        self.rows = rows
        self.collate = collate
        measured = measure(rows, collate)
        if row_of is None:
            row_of = torch.arange(len(measured.lengths))
        else:
            measured = measured.of(row_of)
        self._row_of = row_of
        self.measured = measured
        self.lengths = measured.lengths
        """int64 [N], tokens of each sample."""
        self.counts = measured.counts
        """int64 [N], tokens to learn of each sample."""

    def __len__(self) -> int:
        return len(self.rows)

    def check(self, model: nn.Module, tokenizer: Any, settings: Settings) -> None:
        """Raise UserError for rows that are not the pool's, or that this model cannot learn; warn of doubtful ones.

        tokenizer: the trainer's, or None.
        """
        if settings.pool is not None and settings.store is not None:
            check_against_pool(self.measured, measure_store(settings.store))
            check_tokenizer(settings.pool, tokenizer, model)
        check_learnable(self.counts)
        num_embeddings: int = base_of(model).get_input_embeddings().weight.shape[0]
        size = None if tokenizer is None else len(tokenizer)
        largest = int(self.measured.largest.max())
        check_vocabulary(largest, num_embeddings, model="model", source="train_dataset", tokens=size)
        # The shortest and the longest sample: a collator that cuts, drops or pads on the left shows it here.
        self.batch(sorted({int(self.lengths.argmin()), int(self.lengths.argmax())}))
        if tokenizer is not None:
            for complaint in complaints(self.measured, tokenizer, stop_ids(model)):
                warn(complaint)

    def one(self, i: int) -> tuple[Tensor, Tensor]:
        """Sample i alone: (tokens, labels), int64 [n] each."""
        return one_sample(self.rows[i], self.collate)

    def batch(self, ids: list[int]) -> dict[str, Any]:
        """The collated samples `ids`, and under "lead" where they lie. Without ids: a batch with nothing to learn."""
        numbers = self._row_of[ids or [0]].tolist()
        fetch_together = getattr(self.rows, "__getitems__", None)  # torch's own loader prefers it, too
        examples = fetch_together(numbers) if fetch_together else [self.rows[number] for number in numbers]
        batch = dict(self.collate(examples))
        located = locate(batch, max(1, len(ids)))
        positions, targets, slots = located.positions, located.targets, located.slots
        if ids:
            check_batch(located, ids, self.lengths, self.counts)
        else:
            # A rank without samples runs a batch all the same, for the others wait for its gradients.
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
            positions, targets, slots = torch.tensor([0]), torch.tensor([IGNORED]), torch.tensor([0])
        batch["lead"] = {
            "positions": positions,
            "targets": targets,
            "slots": slots,
            "flattened": located.flattened,
        }
        return batch


def is_arrow(dataset: Any) -> bool:
    """Whether it is a datasets.Dataset whose rows are exactly what its columns hold."""
    return hasattr(dataset, "add_column") and dataset.format["type"] != "custom"


def row_numbers(dataset: Any) -> Tensor:
    """int64 [rows], the number that each row of a prepared data set had in the user's."""
    if ROW_NUMBER not in dataset.column_names:
        raise UserError(
            "args: the trainer's preparation merges samples, so their losses cannot be told apart; turn packing off"
        )
    return torch.tensor(dataset[ROW_NUMBER][:], dtype=torch.int64)


def rows_of_samples(numbers: Tensor, count: int) -> Tensor:
    """Which row now holds each of the user's `count` rows: int64 [count]. UserError naming the first that is gone.

    numbers: int64 [rows], the result of `row_numbers`.
    """
    row_of = torch.full((count,), -1)
    row_of[numbers] = torch.arange(len(numbers))
    gone = (row_of < 0).nonzero()
    if len(gone):
        raise UserError(
            f"train_dataset: the trainer left out row {int(gone[0])} ({len(gone):,} such rows), probably because "
            "max_length cuts off its whole answer; raise max_length, or remove such records from pool and data set"
        )
    return row_of


def stop_ids(model: nn.Module) -> list[int]:
    """Token ids that end a generation, by the model's own configurations."""
    base = base_of(model)
    ids: list[int] = []
    for owner in (text_config(base), getattr(base, "generation_config", None)):
        found = getattr(owner, "eos_token_id", None)
        if isinstance(found, (list, tuple)):
            ids += found
        elif found is not None:
            ids.append(found)
    return ids
