"""Mean loss of every sample of a store under a model: forward passes only, over packed micro-batches."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from lead_engine.config import BatchConfig
from lead_engine.console import Bar, progress
from lead_engine.model.packed import PackedLM, mean_hidden
from lead_engine.model.vocabulary import check_vocabulary, rows_of
from lead_engine.pool.store import TokenStore
from lead_kernels import PackedBatch

ROW_QUANTUM = 128


def score_store(
    model: PackedLM, store: TokenStore, ids: Tensor | None = None, *, batch: BatchConfig, description: str | None = None
) -> tuple[Tensor, Tensor]:
    """(mean NLL per response token fp32 [n], response tokens int64 [n]) of the samples `ids` (int64 [n]; default: all), on the CPU.

    description: text of a progress bar over tokens; None shows none.
    """
    _check_vocabulary(model, store)
    ids = torch.arange(store.num_samples) if ids is None else ids
    nll = torch.zeros(len(ids))
    for places, head in _forward(ids, store, batch, description, lambda packed: model(packed).sample_nll):
        nll[places] = head[: len(places)].cpu()
    return nll, store.response_rows.cpu()[ids]


def embed_store(model: PackedLM, store: TokenStore, *, batch: BatchConfig, description: str | None = None) -> Tensor:
    """Mean hidden state (last block's output) of every sample: fp32 [N, H], on the CPU."""
    _check_vocabulary(model, store)
    ids = torch.arange(store.num_samples)
    out = torch.zeros(len(ids), model.hidden_size)
    for places, means in _forward(ids, store, batch, description, lambda packed: mean_hidden(model, packed)):
        out[places] = means[: len(places)].cpu()
    return out


def _check_vocabulary(model: PackedLM, store: TokenStore) -> None:
    """For callers that have not asked already, with a better name for the two."""
    check_vocabulary(store.max_token_id, rows_of(model.config), model="the model", source="what it is to score")


@torch.no_grad()
def _forward(
    ids: Tensor, store: TokenStore, batch: BatchConfig, description: str | None, compute: Callable[[PackedBatch], Tensor]
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(places in `ids`, compute(packed)) for packed micro-batches that hold every sample once."""
    lengths = store.lengths.cpu().numpy()[ids.numpy()]
    rows = store.response_rows.cpu().numpy()[ids.numpy()]
    groups = pack_by_length(lengths, batch.capacity, batch.num_slots)
    slots = torch.full((len(groups), batch.num_slots), store.num_samples, dtype=torch.int64)
    for place, group in enumerate(groups):
        slots[place, : len(group)] = ids[torch.from_numpy(group)]
    if store.wants_prefetch:
        store.prefetch(slots)
    on_device = slots.to(store.device)
    with _bar(description, int(lengths.sum())) as bar:
        for place, group in enumerate(groups):
            packed: PackedBatch = store.batch(on_device[place], capacity=batch.capacity, num_rows=num_rows(rows[group]))
            yield group, compute(packed)
            bar.advance(int(lengths[group].sum()))


def num_rows(rows: np.ndarray) -> int:
    """Rows of a micro-batch whose samples have `rows` response tokens, rounded up so that the head sees few different shapes."""
    return -(-max(1, int(rows.sum())) // ROW_QUANTUM) * ROW_QUANTUM


def pack_by_length(lengths: np.ndarray, capacity: int, slots: int) -> list[np.ndarray]:
    """Groups of places, each of at most `capacity` tokens and `slots` samples, samples of like length together.

    Like lengths waste least when every group is filled in turn: next-fit over sorted lengths.
    """
    order = np.argsort(-lengths, kind="stable")
    groups, start, total = [], 0, 0
    for end, place in enumerate(order):
        if total + lengths[place] > capacity or end - start == slots:
            groups.append(order[start:end])
            start, total = end, 0
        total += int(lengths[place])
    return [*groups, order[start:]] if len(order) else []


def _bar(description: str | None, total: int) -> AbstractContextManager[Bar]:
    return progress(total, description) if description else nullcontext(Bar())
