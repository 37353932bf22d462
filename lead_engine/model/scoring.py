"""Losses of a store's samples under a model: forward passes over packed micro-batches.

On one rank, or dealt to many.

`prepare`, `eval`, the methods that score the pool again, and the held-out losses of a run in training all go through
here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lead_engine.base.console import Bar, progress
from lead_engine.config import BatchConfig
from lead_engine.model.attention import Held
from lead_engine.model.packed import PackedLM, mean_hidden
from lead_engine.model.vocabulary import check_vocabulary, rows_of
from lead_engine.pool.store import TokenStore
from lead_kernels import PackedBatch

ROW_QUANTUM = 128


def score_store(
    model: PackedLM, store: TokenStore, ids: Tensor | None = None, *, batch: BatchConfig, description: str | None = None
) -> tuple[Tensor, Tensor]:
    """Mean NLL of samples under a model that this process has whole.

    ids: int64 [n]; default: all. Returns (mean NLL per response token fp32 [n], response tokens int64 [n]), on the CPU.

    For a model that this process has whole; `score_together` is for one that ranks share.
    description: text of a progress bar over tokens; None shows none.
    """
    ids = torch.arange(store.num_samples) if ids is None else ids
    nll = score_together(model, store, ids, batch=batch, description=description)
    return nll.cpu(), store.response_rows[ids]


def score_together(
    model: PackedLM,
    store: TokenStore,
    ids: Tensor,
    *,
    batch: BatchConfig,
    rank: int = 0,
    world: int = 1,
    description: str | None = None,
    before_each: Callable[[], None] = lambda: None,
) -> Tensor:
    """Mean NLL per response token of samples, under a model that ranks share.

    ids: int64 [n], on the host. Returns fp32 [n] on the store's device, alike on all ranks.

    Micro-batches are dealt to the ranks in turn. Under FSDP a forward pass gathers parameters, so all ranks do equally
    many; the last may be empty. Every micro-batch is the same whatever the number of ranks, and so are the results but
    for rounding. before_each: called before every micro-batch.
    """
    _check_vocabulary(model, store)
    groups = _groups(store, ids, batch)
    if not groups:
        return torch.zeros(0, device=store.device)
    groups += [np.empty(0, dtype=np.int64)] * (-len(groups) % world)
    mine, losses = groups[rank::world], []
    with forward_only(model, int(store.lengths[ids].max())):
        for packed, held in _batches(store, ids, mine, batch, description):
            before_each()
            losses.append(model(packed, held=held).sample_nll.float())
    nll = _everyone(torch.stack(losses), world)
    found = torch.zeros(len(ids), device=nll.device)
    places = [np.stack([group, np.full(len(group), g), np.arange(len(group))]) for g, group in enumerate(groups)]
    sample, group, slot = torch.from_numpy(np.concatenate(places, axis=1)).to(nll.device)
    found[sample] = nll[group, slot]
    return found


def summarise_loss(nll: NDArray[np.float64], tokens: NDArray[np.int64], tasks: Sequence[str]) -> dict[str, Any]:
    """Token-weighted mean loss overall and per task, and the tasks' plain mean ("macro").

    nll [n]: mean loss of each sample; tokens [n]: the response tokens it is the mean of, each at least 1.
    """
    names = np.asarray(tasks)
    by_task = {}
    for name in sorted(set(tasks)):
        here = names == name
        loss = float(np.average(nll[here], weights=tokens[here]))
        by_task[name] = {"loss": loss, "samples": int(here.sum()), "tokens": int(tokens[here].sum())}
    return {
        "overall": float(np.average(nll, weights=tokens)),
        "macro": float(np.mean([task["loss"] for task in by_task.values()])),
        "tasks": by_task,
    }


def embed_store(model: PackedLM, store: TokenStore, *, batch: BatchConfig, description: str | None = None) -> Tensor:
    """Mean hidden state (last block's output) of every sample: fp32 [N, H], on the CPU."""
    _check_vocabulary(model, store)
    ids = torch.arange(store.num_samples)
    out, groups = torch.zeros(len(ids), model.hidden_size), _groups(store, ids, batch)
    with forward_only(model, int(store.lengths.max())):
        batches = _batches(store, ids, groups, batch, description)
        for group, (packed, held) in zip(groups, batches, strict=True):
            out[group] = mean_hidden(model, packed, held)[: len(group)].cpu()
    return out


def _check_vocabulary(model: PackedLM, store: TokenStore) -> None:
    """For callers that have not asked already, with a better name for the two."""
    check_vocabulary(store.max_token_id, rows_of(model.config), model="the model", source="what it is to score")


@contextmanager
def forward_only(model: PackedLM, longest: int) -> Iterator[None]:
    """Forward passes that leave nothing behind: no gradients, no dropout; samples may have `longest` tokens.

    Afterwards every module is in the mode it was in, and FSDP's units are sharded again: one that keeps its parameters
    gathered until a backward pass (the head) would otherwise show the gathered copy, in the compute dtype, to whoever
    looks at the model next.
    """
    training, bound = [module for module in model.modules() if module.training], model.max_length
    model.eval()
    model.max_length = max(bound, longest)
    try:
        with torch.no_grad():
            yield
    finally:
        model.max_length = bound
        for module in training:
            module.training = True
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _batches(
    store: TokenStore, ids: Tensor, groups: list[np.ndarray], batch: BatchConfig, description: str | None
) -> Iterator[tuple[PackedBatch, Held]]:
    """A packed micro-batch of each group of places in `ids`, and what it holds."""
    lengths, rows = store.lengths.numpy()[ids.numpy()], store.response_rows.numpy()[ids.numpy()]
    slots = torch.full((len(groups), batch.num_slots), store.num_samples, dtype=torch.int64)
    for place, group in enumerate(groups):
        slots[place, : len(group)] = ids[torch.from_numpy(group)]
    if store.wants_prefetch:
        store.prefetch(slots)
    on_device = slots.to(store.device)
    with _bar(description, sum(int(lengths[group].sum()) for group in groups)) as bar:
        for place, group in enumerate(groups):
            held = Held(len(group), int(lengths[group].sum()), int(lengths[group].max(initial=0)))
            yield store.batch(on_device[place], capacity=batch.capacity, num_rows=num_rows(rows[group])), held
            bar.advance(held.tokens)


def _everyone(mine: Tensor, world: int) -> Tensor:
    """Every rank's [n, B] as [n x world, B], in the order in which groups were dealt."""
    if world == 1:
        return mine
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def _groups(store: TokenStore, ids: Tensor, batch: BatchConfig) -> list[np.ndarray]:
    return pack_by_length(store.lengths.numpy()[ids.numpy()], batch.capacity, batch.num_slots)


def num_rows(rows: np.ndarray) -> int:
    """Rows of a micro-batch whose samples have `rows` response tokens.

    They are rounded up, so that the head sees few different shapes.
    """
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
