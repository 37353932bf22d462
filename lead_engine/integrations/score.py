"""The state of a pool that is nobody's folder: the trainer's own rows, scored by its own model before the first step.

Two forward passes over the rows: the answer given its instruction (initial utility), and the answer alone; their ratio is the difficulty
(arXiv 2505.07437). Where `lead-engine prepare` warms a copy of the model up before the second, this does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lead_engine.base.errors import UserError
from lead_engine.integrations.head import HeadCall
from lead_engine.integrations.rows import locate
from lead_engine.pool.state import PoolState
from lead_engine.prepare.difficulty import cluster_by_difficulty, difficulty, tasks_by_name

CLUSTERS = 7
"""At most; fewer where the rows have fewer different difficulties, or are few."""
Sample = tuple[Tensor, Tensor]
"""Tokens and labels, int64 [n] each."""


def score_rows(
    model: torch.nn.Module,
    sample: Callable[[int], Sample],
    lengths: Tensor,
    prompt: list[int],
    tasks: list[str | None] | None,
    *,
    batch: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
) -> PoolState:
    """The state of rows 0 to N - 1. sample(i): a row; prompt: tokens that ask for an answer without an instruction; tasks: names [N]."""

    def alone(i: int) -> Sample:
        tokens, labels = sample(i)
        answer = tokens[labels != -100]
        return torch.cat([torch.tensor(prompt), answer]), torch.cat([torch.full((len(prompt),), -100), answer])

    order = lengths.argsort().tolist()  # like lengths together
    groups = [order[start : start + batch] for start in range(0, len(order), batch)][rank::world]
    training = model.training
    model.eval()
    try:
        given, without = (_losses(model, make, groups, len(lengths), device, world) for make in (sample, alone))
    finally:
        model.train(training)
    bad = (~given.isfinite() | ~without.isfinite()).nonzero()
    if len(bad):
        raise UserError(
            f"train_dataset: the model's loss on row {int(bad[0])} is not a finite number; {len(bad):,} such rows"
        )
    ratio = difficulty(given, without)
    dropped = ratio >= 1
    different = len(ratio[~dropped].unique())
    if different:
        clusters = min(CLUSTERS, different, max(1, len(ratio) // 100))
        cluster, _ = cluster_by_difficulty(ratio, dropped, clusters, seed)
    else:
        clusters, cluster = 1, torch.zeros(len(ratio), dtype=torch.int64)
    task, names = tasks_by_name(tasks) if tasks else (torch.zeros(len(ratio), dtype=torch.int64), ["all"])
    return PoolState(given, ratio, without, cluster, task, dropped, names, clusters)


@torch.no_grad()
def _losses(
    model: torch.nn.Module,
    make: Callable[[int], Sample],
    groups: list[list[int]],
    count: int,
    device: torch.device,
    world: int,
) -> Tensor:
    """Mean loss of every row: fp32 [N] on the host, the same on every rank."""
    found = torch.zeros(count, device=device)
    for group, batch in _batches(make, groups):
        where = locate(batch, len(group))
        call = HeadCall(where.rows.to(device), where.targets.to(device), where.row_slots.to(device), len(group))
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        found[torch.tensor(group, device=device)] = model(**inputs, use_cache=False, lead=call).sample_nll
    if world > 1:
        dist.all_reduce(found)  # every row was scored by one rank
    return found.cpu()


def _batches(make: Callable[[int], Sample], groups: list[list[int]]) -> Iterator[tuple[list[int], dict[str, Any]]]:
    for group in groups:
        samples = [make(i) for i in group]
        tokens, labels = zip(*samples, strict=True)
        mask = pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
        ids, wanted = pad_sequence(tokens, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)
        yield group, {"input_ids": ids, "attention_mask": mask, "labels": wanted}
