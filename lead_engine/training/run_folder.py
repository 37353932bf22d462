"""What a run leaves on disk while it trains: configuration, a line per step and per round, TensorBoard."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from lead_engine.config import TrainConfig, to_dict
from lead_engine.errors import UserError
from lead_engine.files import write_text

COMPLETE = "summary.json"
"""Written last: a run folder that has it is finished."""


class RunFolder:
    """Files of one run; only rank 0 writes.

    Raises UserError if `config.out` holds a run that would be overwritten, or, with --resume, one of another configuration.
    """

    def __init__(self, config: TrainConfig, *, writes: bool):
        self.path, self.writes, self.config = config.out, writes, config
        self._metrics = self._selection = self._board = None
        existing = self.path / "config.yaml"
        if existing.exists():
            if not config.resume:
                raise UserError(f"--out {self.path}: already holds a run; add --resume to go on with it, or name another folder")
            _same_configuration(existing, config)

    def open(self, steps: int, rounds: int) -> None:
        """Open the logs to go on after `steps` steps and `rounds` rounds; lines past them (of a run that was killed) are dropped.

        Call once every rank has built its RunFolder: the configuration written here is what their checks look for.
        """
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(to_dict(self.config), sort_keys=False))
        self._metrics = _reopen(self.path / "metrics.jsonl", "step", steps)
        self._selection = _reopen(self.path / "selection.jsonl", "round", rounds)
        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=steps)

    def step(self, line: dict[str, Any]) -> None:
        if not self.writes:
            return
        self._metrics.write(json.dumps(line) + "\n")
        for name in ("loss", "lr", "grad_norm", "tokens_per_second", "mean_change"):
            if line[name] is not None:
                self._board.add_scalar(f"train/{name}", line[name], line["step"])

    def round(self, line: dict[str, Any]) -> None:
        if not self.writes:
            return
        self._selection.write(json.dumps(line) + "\n")
        for name in ("cluster", "reward", "selection_seconds"):
            if line[name] is not None:
                self._board.add_scalar(f"selection/{name}", line[name], line["round"])
        self._metrics.flush(), self._selection.flush()

    def close(self) -> None:
        if self.writes and self._board is not None:
            self._metrics.close(), self._selection.close(), self._board.close()


def _reopen(path: Path, counter: str, done: int):
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)[counter] < done:
                    kept.append(line + "\n")
            except json.JSONDecodeError:  # the last line of a killed run may be cut
                break
    write_text(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def _same_configuration(path: Path, config: TrainConfig) -> None:
    """Refuse to resume under other options: the result would be neither run. Where it runs may change."""
    before, now = yaml.safe_load(path.read_text(encoding="utf-8")), to_dict(config)
    free = {"resume", "out", "checkpoint_every", "keep_checkpoints", "max_skipped_steps", "wandb", "mlflow", "runtime"}
    for name in now:
        if name not in free and before.get(name) != now[name]:
            raise UserError(f"--resume: {path} was started with {name} = {before.get(name)}, now it is {now[name]}; use the same options")
