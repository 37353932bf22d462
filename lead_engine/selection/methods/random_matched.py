"""`random-matched`: another run's picks, each replaced by a random sample of the same task and of like length: the
control for IDU.

A method may look good because it prefers long answers or certain tasks. Whatever of its gain this control shows too is
not due to its choice of samples.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from lead_engine.base.errors import UserError
from lead_engine.config.methods import MethodOptions
from lead_engine.pool.state import PoolState
from lead_engine.selection.methods.base import Draw, Method, Order
from lead_engine.selection.samples import Samples

LIKE = 16
"""Samples among which one is as good as another: neighbours by length within a task."""


@dataclass(frozen=True)
class RandomMatchedOptions(MethodOptions):
    """Another run's picks, imitated."""

    flags: ClassVar[str] = "--random-matched."

    match: Path | None = None
    """Folder of the finished run whose picks it imitates in length and task."""


class RandomMatched(Method):
    """Every sample is renamed by a random permutation among `LIKE` samples of its task that are next to it by response
    tokens, then tokens, and the run of `--random-matched.match` is followed under these names: as many visits, lengths
    and tasks as there, in the same order.

    Only samples that are not dropped are renamed, and only to each other, so that dropping is common to both.
    """

    Options = RandomMatchedOptions

    def __init__(
        self, samples: Samples, state: PoolState, options: RandomMatchedOptions, order_length: int, seed: int
    ) -> None:
        super().__init__(samples, state, options, order_length, seed)
        if options.match is None:
            raise UserError(
                "--random-matched.match: random-matched needs the folder of the finished run whose picks it imitates"
            )
        picks = _picks(options.match, samples.num_samples)
        rows = samples.rows[:-1].cpu().numpy()
        renamed = like_permutation(
            state.task.numpy(), rows, samples.lengths.cpu().numpy(), state.dropped.numpy(), seed
        )[picks]
        self.sequence = torch.from_numpy(renamed).to(samples.device)
        self.occurrence = torch.from_numpy(_occurrences(renamed)).to(samples.device)

    @classmethod
    def describe(cls, options: RandomMatchedOptions) -> str:
        return f"the picks of {options.match}, each replaced by one of like length and task"

    def order(self, round: int, drawn: Draw) -> Order:
        """The next of the sequence: an entry is due when its sample was trained as often as it occurs before the
        entry.
        """
        n, length = self.samples.num_samples, self.sequence.shape[0]
        due = (self.occurrence == self.samples.visits[self.sequence]) & ~self.samples.barred[self.sequence]
        place = torch.where(due, torch.arange(length, device=due.device), length)
        next_places = place.sort().values[: self.order_length]
        ids = F.pad(self.sequence, (0, 1), value=n)[next_places]
        return self.plain(F.pad(ids, (0, self.order_length - ids.shape[0]), value=n))


def like_permutation(
    task: np.ndarray, rows: np.ndarray, lengths: np.ndarray, fixed: np.ndarray, seed: int
) -> np.ndarray:
    """A random permutation int64 [N] that keeps tasks, and response tokens and tokens nearly; samples that are `fixed`
    stay themselves.
    """
    random = np.random.default_rng([seed, 0x6D617463])
    renamed = np.arange(len(task))
    free = np.flatnonzero(~fixed)
    order = free[np.lexsort((lengths[free], _coarse(rows[free]), task[free]))]
    start = np.concatenate([[0], np.flatnonzero(np.diff(task[order])) + 1, [len(order)]])
    for low, high in itertools.pairwise(start):
        for first in range(low, high, LIKE):
            group = order[first : min(first + LIKE, high)]
            renamed[group] = random.permutation(group)
    return renamed


def _coarse(rows: np.ndarray) -> np.ndarray:
    """Response tokens in steps of an eighth: within a step, samples are ordered by their whole length."""
    coarse: np.ndarray = np.round(np.log2(np.maximum(rows, 1)) * 8)
    return coarse


def _picks(run: Path, num_samples: int) -> np.ndarray:
    """The samples that a run trained, in its order: int64 [n]."""
    log = run / "selection.jsonl"
    for name in ("summary.json", "selection.jsonl"):
        if not (run / name).exists():
            raise UserError(f"--random-matched.match {run}: not a finished run (no {name} in it)")
    records = Path(json.loads((run / "summary.json").read_text(encoding="utf-8"))["pool"]) / "records.parquet"
    if not records.exists():
        raise UserError(
            f"--random-matched.match {run}: was trained on the pool {records.parent}, which has no records.parquet; "
            "was it moved?"
        )
    names = pq.read_table(records, columns=["id"]).column("id").to_pylist()
    number = {name: i for i, name in enumerate(names)}
    with log.open(encoding="utf-8") as lines:
        picked = [number[name] for line in lines for name in json.loads(line)["ids"]]
    if len(names) != num_samples:
        raise UserError(
            f"--random-matched.match {run}: was trained on a pool of {len(names)} samples, this one has {num_samples}"
        )
    return np.array(picked, dtype=np.int64)


def _occurrences(sequence: np.ndarray) -> np.ndarray:
    """How often each entry's sample occurs before it: int32 [n]."""
    order = np.argsort(sequence, kind="stable")
    first = np.r_[True, np.diff(sequence[order]) != 0] if len(order) else np.zeros(0, bool)
    start = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    found = np.empty(len(order), dtype=np.int32)
    found[order] = np.arange(len(order)) - start
    return found
