"""Checkpoints by torch.distributed.checkpoint: written in the background, valid once their marker exists.

A checkpoint is taken between two rounds and holds everything that the next round depends on: trained parameters,
AdamW's moments, the selector and the loss-change estimator, and the counters (round, step, tokens). Random numbers are
counter-based on (seed, round), so there is no other generator state. Sharded tensors are stored as such and load on any
number of ranks. Frozen parameters are the base model's.

The marker names every file with its size and checksum, and is written last. Whatever goes wrong, at writing or at
reading, all ranks learn of it and do the same.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from lead_engine.base.console import warn
from lead_engine.base.errors import UserError
from lead_engine.base.files import write_text
from lead_engine.training.checkpoint_files import METADATA, Planner, Reader, Writer, check_file
from lead_engine.training.distributed import Ranks
from lead_engine.training.rounds import Progress

MARKER = "COMPLETE"
PER_TENSOR = 2048
"""Bytes that a tensor takes on the disk beside its numbers, and in the metadata."""
RESERVE = 1 << 30
"""Bytes that a checkpoint leaves free, at most: for logs and the final model."""


class _Writing(NamedTuple):
    """A checkpoint on its way to the disk."""

    future: Future[Any]
    path: Path
    writer: Writer
    progress: Progress
    notes: dict[str, Any]


class Checkpoints:
    """The `checkpoints/` folder of one run."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int):
        self.folder, self.ranks, self.keep = folder, ranks, keep
        self._writing: _Writing | None = None

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parts: dict[str, Any],
        progress: Progress,
        notes: dict[str, Any] | None = None,
    ) -> bool:
        """Start writing; returns once the tensors are copied.

        `parts`: name -> object with state_dict(); `notes`: JSON, for the marker.

        False, with a warning, if nothing can be written there.
        """
        self.finish()
        path = self.folder / f"step-{progress.step:08d}"
        state = _state(model, optimizer, parts)
        bytes_needed = sum(self.ranks.everyone(_local_bytes(state, self.ranks.first)))
        if self._failed(path, _try(_make_folder, path, bytes_needed) if self.ranks.first else None):
            return False
        writer = Writer(path)
        future = state_dict_saver.async_save(state, storage_writer=writer, process_group=self.ranks.host_group)
        assert isinstance(future, Future)  # of the thread that writes: no stager was asked for
        self._writing = _Writing(future, path, writer, progress, notes or {})
        return True

    def finish(self) -> bool:
        """Wait for the checkpoint being written, mark it complete, and remove those that are too many.

        False, with a warning, if it could not be written; what there is of it is removed then, and earlier ones stay.
        """
        if self._writing is None:
            return True
        writing, self._writing = self._writing, None
        error = None
        try:
            writing.future.result()
        except (CheckpointException, Exception) as failure:  # the first is no Exception
            error = _reason(failure)
        files = writing.writer.files
        file_error = _reason(files.error) if files.error else None
        everyone = self.ranks.everyone((file_error, error, files.written))
        # A file's own error, of any rank, says more than what DCP makes of it.
        errors = [file_error for file_error, _, _ in everyone] + [dcp_error for _, dcp_error, _ in everyone]
        error = next(filter(None, errors), None)
        if error is None and self.ranks.first:
            written = {name: entry for _, _, files in everyone for name, entry in files.items()}
            marker = {"progress": asdict(writing.progress), "notes": writing.notes, "files": written}
            error = _try(write_text, writing.path / MARKER, json.dumps(marker))
        if self._failed(writing.path, error):
            return False
        if self.ranks.first:
            self._remove_old(writing.path)
        return True

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, parts: dict[str, Any]
    ) -> tuple[Progress, dict[str, Any]]:
        """Load the newest whole checkpoint into the objects given.

        Returns where it stands and its notes; (Progress(), {}) if there is no checkpoint at all.

        One that is damaged is named in a warning, and the one before it is taken. Raises UserError if there are some,
        but none is whole.
        """
        # Rank 0's names: a shared file system may show ranks different ones.
        names = self.ranks.everyone([path.name for path in _complete(self.folder)])[0]
        problems = []
        for path in (self.folder / name for name in reversed(names)):
            marker, problem = self._verify(path)
            problem = problem or self._read(path, model, optimizer, parts)
            if problem is None:
                return Progress(**marker["progress"]), marker["notes"]
            next_try = "; the one before it is tried" if path.name != names[0] else ""
            warn(f"{path}: damaged, not used ({problem}){next_try}")
            problems.append(f"{path.name}: {problem}")
        if problems:
            raise UserError(
                f"--resume: no checkpoint in {self.folder} is whole ({'; '.join(problems)}); bring back one that is, "
                "or delete that folder to train from the start"
            )
        return Progress(), {}

    def _verify(self, path: Path) -> tuple[dict[str, Any], str | None]:
        """(marker, what is wrong with it or any file: the same on all ranks). Ranks share the reading."""
        marker: dict[str, Any] = {}
        try:
            marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
            files = sorted(marker["files"].items())
            Progress(**marker["progress"]), marker["notes"]
            problem = None if METADATA in marker["files"] else f"{MARKER} does not name {METADATA}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            files, problem = [], f"{MARKER} cannot be read"
        for name, (size, crc) in files[self.ranks.rank :: self.ranks.size]:
            problem = problem or check_file(path / name, size, crc)
        return marker, self.ranks.first_problem(problem)

    def _read(
        self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, parts: dict[str, Any]
    ) -> str | None:
        """Fill the objects; what went wrong, the same on all ranks."""
        try:
            Reader(path).read_metadata()
            problem = None
        except Exception as error:  # whatever a wrong pickle leads to
            problem = _reason(error)
        problem = self.ranks.first_problem(problem)
        if problem is not None:
            return problem
        state = _state(model, optimizer, parts)
        try:
            state_dict_loader.load(
                state, storage_reader=Reader(path), planner=Planner(), process_group=self.ranks.host_group
            )
        except (CheckpointException, Exception) as error:  # DCP makes all ranks raise if one does
            return _reason(error)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])  # parameters were filled in place
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return None

    def _failed(self, path: Path, error: str | None) -> bool:
        """Whether any rank has an error; if so, the checkpoint is given up."""
        error = self.ranks.first_problem(error)
        if error is None:
            return False
        if self.ranks.first:
            shutil.rmtree(path, ignore_errors=True)
        left = "earlier ones stay" if any(_complete(self.folder)) else "there is no earlier one"
        warn(f"{path}: this checkpoint could not be written ({error}) and is removed; {left}, and training goes on")
        return True

    def _remove_old(self, newest: Path) -> None:
        """All but the last `keep` up to the newest, and what killed runs left unfinished."""
        kept = [path for path in _complete(self.folder) if path <= newest][-self.keep :]
        for path in self.folder.glob("step-*"):
            if path < newest and path not in kept:
                (path / MARKER).unlink(missing_ok=True)  # first: a half-deleted checkpoint must not look whole
                shutil.rmtree(path, ignore_errors=True)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, parts: dict[str, Any]) -> dict[str, Any]:
    """Trained parameters themselves; copies of all else."""
    state: dict[str, Any] = {
        "model": {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad},
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    for name, part in parts.items():
        state[name] = {
            key: value.detach().clone() if isinstance(value, Tensor) else value
            for key, value in part.state_dict().items()
        }
    return state


def _complete(folder: Path) -> list[Path]:
    """Checkpoints with a marker, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MARKER}"))


def _make_folder(path: Path, bytes_needed: int) -> None:
    """Make an empty folder.

    OSError if the disk has too little room: filling it up would stop the run's logs, and other runs, too.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    free, wanted = shutil.disk_usage(path).free, bytes_needed + min(bytes_needed // 10, RESERVE)
    if wanted > free:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: it needs {wanted / 2**20:,.1f} MiB, {free / 2**20:,.1f} are free",
        )


def _local_bytes(state: dict[str, Any], first: bool) -> int:
    """About what this rank will write of a state. Of a tensor that several ranks hold, one writes."""
    total = 0
    for tensor in pytree.tree_leaves(state):
        if isinstance(tensor, DTensor):
            mesh, placements = tensor.device_mesh, tensor.placements
            copies = math.prod(mesh.size(dim) for dim, placement in enumerate(placements) if placement.is_replicate())
            total += PER_TENSOR + tensor.to_local().nbytes // copies
        elif isinstance(tensor, Tensor) and first:
            total += PER_TENSOR + tensor.nbytes
    return total


def _try(action: Any, *arguments: Any) -> str | None:
    """Why an action on files failed; None if it did not."""
    try:
        action(*arguments)
    except OSError as error:
        return _reason(error)
    return None


def _reason(error: BaseException) -> str:
    """One line for a person."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
