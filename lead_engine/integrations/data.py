"""A trainer's data set as the selection sees it: read and checked once, then asked for by number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from lead_engine.base.console import warn
from lead_engine.base.errors import UserError
from lead_engine.integrations.head import base_of
from lead_engine.integrations.measure import check_against_pool, check_learnable, complaints, measure, measure_store
from lead_engine.integrations.rows import check_batch, locate
from lead_engine.integrations.selection import Selection
from lead_engine.integrations.tokens import check_tokenizer
from lead_engine.model.vocabulary import check_vocabulary

ID = "_lead_row"
"""Column with a row's number, for the trainer's own preparation may shuffle rows or leave some out."""


class WithRows(Trainer):
    """The part of a trainer with LEAD that knows its rows. Samples have the pool's order, or else the data set's."""

    lead_selection: Selection

    def _lead_read_rows(self) -> None:
        """The trainer's rows as it will train them: measured, and checked against the pool's where there is one."""
        order = None
        if is_arrow(self.train_dataset):
            if ID not in self.train_dataset.column_names:
                raise UserError(
                    "args: the trainer's preparation merges samples, whose losses cannot be told apart; no packing"
                )
            order = torch.tensor(self.train_dataset[ID][:], dtype=torch.int64)
            self.train_dataset = self.train_dataset.remove_columns(ID)
        rows, self._lead_collate = self.train_dataset, self.data_collator
        if is_arrow(rows):
            rows = self._remove_unused_columns(rows, description="training")
        else:
            self._lead_collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        self._lead_rows = rows
        measured = measure(rows, self._lead_collate)
        self._lead_row_of = torch.arange(len(measured.lengths))
        store, tokenizer = self.lead_selection.store, self._lead_tokenizer
        if store is not None:
            if order is not None:
                self._lead_row_of = _places(order, self._lead_given)
                measured = measured.of(self._lead_row_of)
            check_against_pool(measured, measure_store(store))
            check_tokenizer(self.lead_selection.pool, tokenizer, self.model)
        check_learnable(measured.counts)
        rows_of_model = self.model.get_input_embeddings().weight.shape[0]
        size = None if tokenizer is None else len(tokenizer)
        check_vocabulary(int(measured.largest.max()), rows_of_model, model="model", source="train_dataset", tokens=size)
        self._lead_measured = measured
        self._lead_lengths, self._lead_counts = measured.lengths, measured.counts
        ends = {int(measured.lengths.argmin()), int(measured.lengths.argmax())}
        self._lead_batch(sorted(ends))  # a collator that cuts, drops or pads on the left shows it here
        for complaint in complaints(measured, tokenizer, self._lead_stops) if tokenizer is not None else ():
            warn(complaint)

    @property
    def _lead_tokenizer(self) -> Any:
        """The trainer's or, where it was given none, its collator's; None where there is neither."""
        given = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        given = getattr(given, "tokenizer", given)
        return given if callable(given) and hasattr(given, "all_special_ids") else None

    @property
    def _lead_stops(self) -> list[int]:
        """Ids that end a generation by the model's own configurations."""
        model = base_of(self.model)
        owners = (model.config.get_text_config(), getattr(model, "generation_config", None))
        found = [getattr(owner, "eos_token_id", None) for owner in owners]
        return [i for ids in found if ids is not None for i in (ids if isinstance(ids, (list, tuple)) else [ids])]

    def _lead_batch(self, ids: list[int]) -> dict[str, Any]:
        """The collated samples `ids`, and under "lead" where they lie. No ids: a batch with nothing to learn."""
        places = self._lead_row_of[ids or [0]].tolist()
        together = getattr(self._lead_rows, "__getitems__", None)  # as torch's own loader does
        batch = dict(self._lead_collate(together(places) if together else [self._lead_rows[place] for place in places]))
        where = locate(batch, max(1, len(ids)))
        rows, targets, slots = where.rows, where.targets, where.row_slots
        if ids:
            check_batch(where, ids, self._lead_lengths, self._lead_counts)
        else:
            batch["labels"] = torch.full_like(batch["labels"], -100)
            rows, targets, slots = torch.tensor([0]), torch.tensor([-100]), torch.tensor([0])
        batch["lead"] = {"rows": rows, "targets": targets, "row_slots": slots, "flattened": where.flattened}
        return batch


def is_arrow(dataset: Any) -> bool:
    """Whether it is a datasets.Dataset whose rows are what its columns say."""
    return hasattr(dataset, "add_column") and dataset.format["type"] != "custom"


def _places(order: Tensor, count: int) -> Tensor:
    """Where each of `count` rows of the user's came to lie: int64 [count]. UserError naming the first that is gone."""
    places = torch.full((count,), -1)
    places[order] = torch.arange(len(order))
    gone = (places < 0).nonzero()
    if len(gone):
        raise UserError(
            f"train_dataset: row {int(gone[0])} was left out by the trainer ({len(gone):,} such rows), probably "
            "because nothing of its answer is left within max_length; raise max_length, or leave such records out of pool and "
            "data set"
        )
    return places
