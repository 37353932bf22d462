"""Checkpoints by torch.distributed.checkpoint: written in the background, valid once their marker exists.

A checkpoint is taken between two rounds and holds everything that the next round depends on: parameters, AdamW's moments, the selector and
the loss-change estimator, and the counters (round, step, tokens). Random numbers are counter-based on (seed, round), so there is no other
generator state. Sharded tensors are stored as such and load on any number of ranks.
"""
from __future__ import annotations

import json
import shutil
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from lead_engine.errors import UserError
from lead_engine.files import write_text
from lead_engine.training.distributed import Ranks

MARKER = "COMPLETE"


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two rounds."""

    round: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Of the clock, over all rounds."""
    selection_seconds: float = 0.0
    """Of these, for ordering, planning, U and rewards."""
    scoring_seconds: float = 0.0
    """And for forward passes over the pool that a method asked for."""


class Checkpoints:
    """The `checkpoints/` folder of one run."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int):
        self.folder, self.ranks, self.keep = folder, ranks, keep
        self._writing: tuple[Future, Path, Progress] | None = None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, parts: dict[str, Any], progress: Progress) -> None:
        """Start writing; returns once the tensors are copied. `parts`: name -> object with state_dict()."""
        self.finish()
        path = self.folder / f"step-{progress.step:08d}"
        if self.ranks.first:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        self.ranks.barrier()
        state = _state(model, optimizer, parts)
        future = dcp.async_save(state, checkpoint_id=path, process_group=self.ranks.host_group)
        self._writing = (future, path, progress)

    def finish(self) -> None:
        """Wait for the checkpoint being written, mark it complete, and remove those that are too many."""
        if self._writing is None:
            return
        future, path, progress = self._writing
        future.result()
        self._writing = None
        self.ranks.barrier()  # every rank's files are there before the marker says so
        if self.ranks.first:
            write_text(path / MARKER, json.dumps(asdict(progress)))
            for old in _complete(self.folder)[: -self.keep]:
                (old / MARKER).unlink()  # first: a half-deleted checkpoint must not look whole
                shutil.rmtree(old)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, parts: dict[str, Any]) -> Progress:
        """Load the newest complete checkpoint into the objects given; Progress() if there is none.

        Raises UserError naming the folder if it cannot be read.
        """
        chosen = [max(_complete(self.folder), default=None)]
        dist.broadcast_object_list(chosen, src=0, group=self.ranks.host_group)  # a shared file system may show ranks different folders
        path = chosen[0]
        if path is None:
            return Progress()
        state = _state(model, optimizer, parts)
        try:
            dcp.load(state, checkpoint_id=path, process_group=self.ranks.host_group)
        except Exception as error:  # dcp wraps whatever a rank met
            raise UserError(f"{path}: cannot be read ({type(error).__name__}); delete that folder to resume from an earlier one") from error
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_OPTIONS)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return Progress(**json.loads((path / MARKER).read_text()))


_OPTIONS = StateDictOptions(strict=True)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, parts: dict[str, Any]) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
    state = {"model": model_state, "optimizer": optimizer_state}
    for name, part in parts.items():
        state[name] = {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in part.state_dict().items()}
    return state


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MARKER}"))
