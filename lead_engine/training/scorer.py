"""Losses of the pool under the model in training, for methods that measure them again: forward passes only, on all ranks."""
from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lead_engine.config import BatchConfig
from lead_engine.console import progress
from lead_engine.model.packed import PackedLM
from lead_engine.model.scoring import num_rows, pack_by_length
from lead_engine.pool.store import TokenStore
from lead_engine.training.watchdog import at, here


class PoolScorer:
    """Mean NLL of any of the pool's samples under the model as it is, given their instructions or without them.

    Micro-batches are dealt to the ranks in turn. Under FSDP a forward pass gathers parameters, so all ranks do equally many; the last may
    be empty. `seconds` counts the time spent. Results are the same on every rank, and whatever their number but for rounding.
    """

    def __init__(
        self, model: PackedLM, store: TokenStore, answers: Callable[[], TokenStore], batch: BatchConfig, rank: int = 0, world: int = 1
    ) -> None:
        self.model, self.store, self.batch, self.rank, self.world = model, store, batch, rank, world
        self._open_answers, self._answers = answers, None
        self.seconds = 0.0

    def given(self, ids: Tensor) -> Tensor:
        """Mean NLL of the answers given their instructions: fp32 [n], on the training device, for ids int64 [n] on the host."""
        return self._score(self.store, ids, "scoring the pool again")

    def alone(self, ids: Tensor) -> Tensor:
        """Mean NLL of the answers without their instructions, likewise."""
        self._answers = self._answers or self._open_answers()
        return self._score(self._answers, ids, "scoring the answers alone")

    @torch.no_grad()
    def _score(self, store: TokenStore, ids: Tensor, description: str) -> Tensor:
        started = time.perf_counter()
        lengths, rows = store.lengths.numpy()[ids.numpy()], store.response_rows.numpy()[ids.numpy()]
        groups = pack_by_length(lengths, self.batch.capacity, self.batch.num_slots)
        groups += [np.empty(0, dtype=np.int64)] * (-len(groups) % self.world)
        mine = groups[self.rank :: self.world]
        slots = torch.full((len(mine), self.batch.num_slots), store.num_samples, dtype=torch.int64)
        for place, group in enumerate(mine):
            slots[place, : len(group)] = ids[torch.from_numpy(group)]
        if store.wants_prefetch:
            store.prefetch(slots)
        on_device, losses = slots.to(store.device), []
        with progress(sum(int(lengths[group].sum()) for group in mine), description) as bar:
            for place, group in enumerate(mine):
                at(description, here().round)
                packed = store.batch(on_device[place], capacity=self.batch.capacity, num_rows=num_rows(rows[group]))
                losses.append(self.model(packed).sample_nll.float())
                bar.advance(int(lengths[group].sum()))
        nll = self._everyone(torch.stack(losses))
        found = torch.zeros(len(ids), device=nll.device)
        places = [np.stack([group, np.full(len(group), g), np.arange(len(group))]) for g, group in enumerate(groups)]
        sample, group, slot = torch.from_numpy(np.concatenate(places, axis=1)).to(nll.device)
        found[sample] = nll[group, slot]
        self.seconds += time.perf_counter() - started
        return found

    def _everyone(self, mine: Tensor) -> Tensor:
        """Every rank's [n, B] as [n x world, B], in the order in which groups were dealt."""
        if self.world == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)
