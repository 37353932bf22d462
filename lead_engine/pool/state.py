"""What `prepare` finds out about each sample: the vectors over the pool with which a selection starts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from lead_engine.base.errors import UserError
from lead_engine.base.files import write_bytes, write_text
from lead_engine.config.options import argument
from lead_engine.pool.store_files import AGAIN

VERSION = 2
HEADER, TENSORS = "state.json", "state.safetensors"
DTYPES = {
    "utility": torch.float32,
    "difficulty": torch.float32,
    "answer_nll": torch.float32,
    "cluster": torch.int64,
    "task": torch.int64,
    "dropped": torch.bool,
}


@dataclass(frozen=True)
class PoolState:
    """Vectors over the pool's N samples, on the CPU.

    ValueError on construction unless shapes, dtypes and ranges agree.
    """

    utility: Tensor
    """fp32 [N]: the base model's mean NLL per response token (initial IU), in nats."""
    difficulty: Tensor
    """fp32 [N]: mean NLL(answer | instruction) / mean NLL(answer) after the warm-up."""
    answer_nll: Tensor
    """fp32 [N]: mean NLL of the answer without its instruction, by the same judge."""
    cluster: Tensor
    """int64 [N]: difficulty cluster, 0 to num_clusters - 1 (also where dropped)."""
    task: Tensor
    """int64 [N]: index into task_names."""
    dropped: Tensor
    """bool [N]: the instruction does not help (difficulty >= 1); LEAD never selects these."""
    task_names: list[str]
    num_clusters: int

    def __post_init__(self) -> None:
        n = len(self.utility)
        for name, dtype in DTYPES.items():
            value = getattr(self, name)
            if value.shape != (n,) or value.dtype != dtype or value.device.type != "cpu":
                found = f"{value.dtype} {list(value.shape)} on {value.device}"
                raise ValueError(f"{name}: expected {dtype} [{n}] on the CPU, got {found}")
        self._check_range("cluster", self.num_clusters)
        self._check_range("task", len(self.task_names))

    def _check_range(self, name: str, limit: int) -> None:
        value: Tensor = getattr(self, name)
        if not len(value):
            return
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name}: values must lie in [0, {limit}), found {low} to {high}")

    @property
    def ifd(self) -> Tensor:
        """fp32 [N]: instruction-following difficulty (IFD), below 1 where the instruction helps.

        exp(mean NLL(answer | instruction) - mean NLL(answer)), the form of arXiv 2412.17365.
        """
        # difficulty is the ratio of the two, answer_nll the second: their difference is (ratio - 1) * second.
        return torch.exp((self.difficulty - 1) * self.answer_nll)

    @property
    def num_samples(self) -> int:
        return len(self.utility)

    def digest(self) -> str:
        """A hash of all vectors, whose equality means the same scores, clusters and tasks."""
        found = hashlib.blake2b(digest_size=8)
        for name in DTYPES:
            found.update(getattr(self, name).contiguous().numpy().tobytes())
        return found.hexdigest()

    def save(self, folder: Path | str) -> None:
        """Write FOLDER/state.safetensors, then FOLDER/state.json, each by rename."""
        place: Path = argument(Path, folder, "PoolState.save(folder)")
        place.mkdir(parents=True, exist_ok=True)
        header = {
            "version": VERSION,
            "num_samples": self.num_samples,
            "num_clusters": self.num_clusters,
            "task_names": self.task_names,
        }
        # state.json is what completes a state: a file left from an earlier one must not vouch for new tensors.
        (place / HEADER).unlink(missing_ok=True)
        write_bytes(place / TENSORS, save({name: getattr(self, name).contiguous() for name in DTYPES}))
        write_text(place / HEADER, json.dumps(header, indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def load(folder: Path | str, num_samples: int | None = None) -> PoolState:
        """Read what `save` wrote.

        UserError naming the file that is missing or damaged, or that holds another number of samples than
        `num_samples`.
        """
        place: Path = argument(Path, folder, "PoolState.load(folder)")
        for path in (place / HEADER, place / TENSORS):
            if not path.is_file():
                raise UserError(f"{path}: no such file; the folder is not a completely prepared pool, {AGAIN}")
        expected, names, clusters = _read_header(place / HEADER)
        path = place / TENSORS
        try:
            state = PoolState(**load_file(path), task_names=names, num_clusters=clusters)
        except (safetensors.SafetensorError, ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); {AGAIN}") from None
        for wanted, source in ((expected, HEADER), (num_samples, "the token store")):
            if wanted is not None and state.num_samples != wanted:
                raise UserError(f"{path}: has {state.num_samples} samples, {source} has {wanted}; {AGAIN}")
        return state

    @staticmethod
    def exists(folder: Path | str) -> bool:
        """Whether `folder` holds a complete state."""
        place: Path = argument(Path, folder, "PoolState.exists(folder)")
        return (place / HEADER).is_file()

    @staticmethod
    def unscored(num_samples: int) -> PoolState:
        """The state of a pool whose samples nobody has scored: one cluster, one task, utility 0.

        Enough for `random` and `full`.
        """
        first = torch.zeros(num_samples, dtype=torch.int64)
        return PoolState(
            utility=torch.zeros(num_samples),
            difficulty=torch.ones(num_samples),
            answer_nll=torch.zeros(num_samples),
            cluster=first,
            task=first,
            dropped=torch.zeros(num_samples, dtype=torch.bool),
            task_names=["all"],
            num_clusters=1,
        )


def _read_header(path: Path) -> tuple[int, list[str], int]:
    """(num_samples, task_names, num_clusters). UserError where the file is damaged or of another version."""
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        if header["version"] != VERSION:
            raise UserError(f"{path}: version {header['version']}, this program reads {VERSION}; {AGAIN}")
        return int(header["num_samples"]), list(header["task_names"]), int(header["num_clusters"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); {AGAIN}") from None
