"""Scores of a trainer's own rows, by its own model, before the first step.

Two forward passes over the rows: the answer given its instruction (the initial utility) and the answer alone. The ratio
of the two losses is the difficulty (arXiv 2505.07437). `lead-engine prepare` briefly trains a copy of the model before
it measures difficulty; this does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
"""At most; fewer if the rows are few, or have fewer distinct difficulties."""
ROWS_A_CLUSTER = 100
"""At least, on average."""
Sample = tuple[Tensor, Tensor]
"""Tokens and labels, int64 [n] each."""


def score_rows(
    model: torch.nn.Module,
    sample: Callable[[int], Sample],
    lengths: Tensor,
    prompt: list[int],
    tasks: Sequence[str | None] | None,
    *,
    batch: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
) -> PoolState:
    """The scores of rows 0 to N - 1, the same on every rank.

    sample(i): row i. lengths: int64 [N], their tokens. prompt: tokens that ask for an answer without an instruction.
    tasks: their N task names, or None for one task. batch: rows in a forward pass. Raises UserError if a loss is not
    finite.
    """

    def alone(i: int) -> Sample:
        tokens, labels = sample(i)
        answer = tokens[labels != -100]
        return torch.cat([torch.tensor(prompt), answer]), torch.cat([torch.full((len(prompt),), -100), answer])

    order = lengths.argsort().tolist()  # rows of similar length together, so that little is padded
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
    distinct = len(torch.unique(ratio[~dropped]))
    clusters, cluster = 1, torch.zeros(len(ratio), dtype=torch.int64)
    if distinct:
        clusters = min(CLUSTERS, distinct, max(1, len(ratio) // ROWS_A_CLUSTER))
        cluster, _ = cluster_by_difficulty(ratio, dropped, clusters, seed)
    task, names = torch.zeros(len(ratio), dtype=torch.int64), ["all"]
    if tasks:
        task, names = tasks_by_name([name or "" for name in tasks])  # "" is the task "unnamed"
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
    """Mean loss of every row: fp32 [N] on the host, the same on every rank. groups: the row numbers of each batch."""
    losses = torch.zeros(count, device=device)
    for group, batch in _batches(make, groups):
        located = locate(batch, len(group))
        positions, targets, slots = (x.to(device) for x in (located.positions, located.targets, located.slots))
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        head = model(**inputs, use_cache=False, lead=HeadCall(positions, targets, slots, len(group)))
        losses[torch.tensor(group, device=device)] = head.sample_nll
    if world > 1:
        dist.all_reduce(losses)  # one rank scored each row; the others hold 0 there
    return losses.cpu()


def _batches(make: Callable[[int], Sample], groups: list[list[int]]) -> Iterator[tuple[list[int], dict[str, Any]]]:
    for group in groups:
        samples = [make(i) for i in group]
        tokens = [sample[0] for sample in samples]
        labels = [sample[1] for sample in samples]
        yield (
            group,
            {
                "input_ids": pad_sequence(tokens, batch_first=True),
                "attention_mask": pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True),
                "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            },
        )
