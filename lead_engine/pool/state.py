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

VERSION = 2
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
    """Vectors over the pool's N samples, on the CPU. ValueError on construction unless shapes, dtypes and ranges
    agree.
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
                raise ValueError(
                    f"{name}: expected {dtype} [{n}] on the CPU, got {value.dtype} {list(value.shape)} on {value.device}"
                )
        for name, limit in (("cluster", self.num_clusters), ("task", len(self.task_names))):
            value = getattr(self, name)
            if n and not 0 <= int(value.min()) <= int(value.max()) < limit:
                raise ValueError(
                    f"{name}: values must lie in [0, {limit}), found {int(value.min())} to {int(value.max())}"
                )

    @property
    def ifd(self) -> Tensor:
        """fp32 [N]: instruction-following difficulty, exp(mean NLL(answer | instruction) - mean NLL(answer)) (IFD, in the form of arXiv
        2412.17365); below 1 where the instruction helps.
        """
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
        folder = argument(Path, folder, "PoolState.save(folder)")
        folder.mkdir(parents=True, exist_ok=True)
        header = {
            "version": VERSION,
            "num_samples": self.num_samples,
            "num_clusters": self.num_clusters,
            "task_names": self.task_names,
        }
        # state.json is what completes a state: a file left from an earlier one must not vouch for new tensors.
        (folder / "state.json").unlink(missing_ok=True)
        write_bytes(folder / "state.safetensors", save({name: getattr(self, name).contiguous() for name in DTYPES}))
        write_text(folder / "state.json", json.dumps(header, indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def load(folder: Path | str, num_samples: int | None = None) -> PoolState:
        """Read what `save` wrote. UserError naming the file that is missing, damaged, or not of `num_samples`
        samples.
        """
        folder = argument(Path, folder, "PoolState.load(folder)")
        again = "prepare the pool again (lead-engine prepare)"
        for name in ("state.json", "state.safetensors"):
            if not (folder / name).is_file():
                raise UserError(f"{folder / name}: no such file; the folder is not a completely prepared pool, {again}")
        try:
            header = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if header["version"] != VERSION:
                raise UserError(
                    f"{folder / 'state.json'}: version {header['version']}, this program reads {VERSION}; {again}"
                )
            expected, names, clusters = (
                int(header["num_samples"]),
                list(header["task_names"]),
                int(header["num_clusters"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'state.json'}: damaged ({error!r}); {again}") from None
        try:
            state = PoolState(**load_file(folder / "state.safetensors"), task_names=names, num_clusters=clusters)
        except (safetensors.SafetensorError, ValueError, TypeError) as error:
            raise UserError(f"{folder / 'state.safetensors'}: damaged ({error}); {again}") from None
        for wanted, source in ((expected, "state.json"), (num_samples, "the token store")):
            if wanted is not None and state.num_samples != wanted:
                raise UserError(
                    f"{folder / 'state.safetensors'}: has {state.num_samples} samples, {source} has {wanted}; {again}"
                )
        return state

    @staticmethod
    def exists(folder: Path | str) -> bool:
        """Whether `folder` holds a complete state."""
        return (argument(Path, folder, "PoolState.exists(folder)") / "state.json").is_file()

    @staticmethod
    def unscored(num_samples: int) -> PoolState:
        """The state of a pool whose samples nobody has scored: one cluster, one task, utility 0. Enough for `random`
        and `full`.
        """
        zeros, places = torch.zeros(num_samples), torch.zeros(num_samples, dtype=torch.int64)
        return PoolState(
            zeros, zeros + 1, zeros, places, places, torch.zeros(num_samples, dtype=torch.bool), ["all"], 1
        )
