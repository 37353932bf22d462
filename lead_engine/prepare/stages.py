"""Stages that are done once: each leaves a file, and a second run goes on where the first was stopped."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lead_engine.base.console import progress
from lead_engine.base.files import publish
from lead_engine.config import BatchConfig
from lead_engine.model.packed import PackedLM
from lead_engine.model.scoring import score_store
from lead_engine.pool.store import TokenStore
from lead_engine.training.distributed import Ranks

SHARD_TOKENS = 1 << 18
"""Tokens scored between two files: what an interruption can lose."""


def score(
    model: PackedLM, store: TokenStore, folder: Path, ranks: Ranks, batch: BatchConfig, description: str
) -> Tensor:
    """Mean NLL of every sample, fp32 [N]; every rank returns the whole vector.

    The ranks take shards in turn. A shard that is on disk already, from a run that was stopped, is not scored again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(store)
    open_shards = [i for i in range(len(shards)) if not _path(folder, i).exists()]
    mine = open_shards[ranks.rank :: ranks.size]
    ranks.barrier()  # every rank has looked before the first writes
    with progress(sum(int(store.lengths[shards[i]].sum()) for i in mine), description) as bar:
        for i in mine:
            nll, _ = score_store(model, store, shards[i], batch=batch)
            building = _path(folder, i).with_suffix(".writing")
            save_file({"nll": nll}, building)
            publish(building, _path(folder, i))
            bar.advance(int(store.lengths[shards[i]].sum()))
    ranks.barrier()
    return torch.cat([load_file(_path(folder, i))["nll"] for i in range(len(shards))])


def _shards(store: TokenStore) -> list[Tensor]:
    """Consecutive sample ids of about SHARD_TOKENS tokens each."""
    ends = store.lengths.cpu().cumsum(0)
    shard = (ends - 1) // SHARD_TOKENS  # rises along the pool; a sample longer than a shard leaves numbers out
    ids = torch.arange(store.num_samples)
    _, counts = torch.unique_consecutive(shard, return_counts=True)
    return list(torch.split(ids, counts.tolist()))


def _path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:06d}.safetensors"
