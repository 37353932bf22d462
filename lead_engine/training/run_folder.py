"""What a run writes while it trains: configuration, a line per step and round, and lines for trackers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml
from safetensors import SafetensorError

from lead_engine.base import fingerprint
from lead_engine.base.errors import UserError
from lead_engine.base.files import write_text
from lead_engine.base.fingerprint import Parts
from lead_engine.config import TrainConfig, to_dict
from lead_engine.config.old_names import under_new_names
from lead_engine.config.reads import unread
from lead_engine.config.yaml_file import read_yaml
from lead_engine.training.distributed import Ranks
from lead_engine.training.origin import BY_CONTENTS, check_same, written
from lead_engine.training.trackers import Trackers, check_packages

COMPLETE = "summary.json"
"""Written last: a run folder that has it is finished."""
STEP_SCALARS = ("loss", "lr", "grad_norm", "mean_change", "tokens_per_second", "mfu", "memory_bytes")
ROUND_SCALARS = ("cluster", "reward", "selection_seconds")
"""Of the lines of metrics.jsonl and selection.jsonl, what trackers get."""


@dataclass
class _Logs:
    """The logs of a run that has begun."""

    metrics: TextIO
    selection: TextIO
    heldout: TextIO | None
    trackers: Trackers

    def files(self) -> list[TextIO]:
        return [self.metrics, self.selection] + ([] if self.heldout is None else [self.heldout])

    def write_evaluation(self, line: dict[str, Any]) -> None:
        """Send a line of heldout.jsonl to the trackers."""
        loss = line["loss"]
        tasks = {f"task/{name}": task["loss"] for name, task in loss["tasks"].items()}
        self.trackers.log("eval", line["step"], {"loss": loss["overall"], "macro": loss["macro"], **tasks})


class RunFolder:
    """Files of one run; only rank 0 writes.

    Raises UserError if `config.out` holds a run that would be overwritten, or, with --resume, one of another
    configuration.
    """

    def __init__(self, config: TrainConfig, *, writes: bool):
        self.path, self.writes, self.config = config.out, writes, config
        self._logs: _Logs | None = None
        """On rank 0, once they are open."""
        self.made_from: Parts = {}
        """The run's fingerprint, once `check` was told."""
        self.skipped_steps = 0
        """Of the whole run, also before it was resumed."""
        check_packages(config)
        existing = self.path / "config.yaml"
        if existing.exists():
            if not config.resume:
                raise UserError(
                    f"--out {self.path}: already holds a run; add --resume to go on with it, or name another folder"
                )
            _same_configuration(existing, config)

    def open(self, steps: int, rounds: int) -> None:
        """Open the logs to go on after `steps` steps and `rounds` rounds.

        Lines past them, of a run that was killed, are dropped.

        Call once every rank has built its RunFolder: the configuration written here is what their checks look for.
        """
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        # Trackers first: where one cannot start, nothing looks like a run that was begun.
        trackers = Trackers(self.config, steps)
        # The fingerprint before config.yaml, which says that a run was begun.
        fingerprint.write(self.path, written(self.made_from, self.config.pool))
        write_text(self.path / "config.yaml", yaml.safe_dump(to_dict(self.config), sort_keys=False))
        metrics, kept = _reopen(self.path / "metrics.jsonl", "step", steps)
        selection, _ = _reopen(self.path / "selection.jsonl", "round", rounds)
        self.skipped_steps = sum(line.get("skipped", False) for line in kept)
        self._logs = _Logs(metrics, selection, None, trackers)
        if self.config.eval_data:
            # An evaluation after the last step that counts is in the checkpoint that the run goes on from.
            self._logs.heldout, kept = _reopen(self.path / "heldout.jsonl", "step", steps + 1 if steps else 0)
            for line in kept[-1:]:
                self._logs.write_evaluation(line)  # TensorBoard has just dropped what it had of this step

    def check(self, made_from: Parts) -> None:
        """UserError if the run was begun from other contents than `made_from`, which is written when it begins."""
        self.made_from = made_from
        if (self.path / "config.yaml").exists():
            way_out = "Bring back what it was begun with, or begin a new run in another --out"
            before = fingerprint.read(self.path)
            check_same(before, made_from, self.config.pool, f"--resume: {self.path}", way_out)

    def step(self, line: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl."""
        if self._logs is None:
            return
        self._logs.metrics.write(json.dumps(line) + "\n")
        self.skipped_steps += line["skipped"]
        scalars = {name: line[name] for name in STEP_SCALARS}
        self._logs.trackers.log("train", line["step"], {**scalars, "skipped_steps": self.skipped_steps})

    def round(self, line: dict[str, Any]) -> None:
        """Write a line of selection.jsonl, and all lines so far to the disk."""
        if self._logs is None:
            return
        self._logs.selection.write(json.dumps(line) + "\n")
        self._logs.trackers.log("selection", line["round"], {name: line[name] for name in ROUND_SCALARS})
        self._logs.metrics.flush()
        self._logs.selection.flush()
        self._logs.trackers.flush()

    def evaluation(self, line: dict[str, Any]) -> None:
        """Write a line of heldout.jsonl."""
        if self._logs is None or self._logs.heldout is None:
            return
        self._logs.heldout.write(json.dumps(line) + "\n")
        self._logs.heldout.flush()
        self._logs.write_evaluation(line)
        self._logs.trackers.flush()

    def close(self) -> None:
        """End the logs; trackers hear whether the run is complete."""
        if self._logs is None:
            return
        for file in self._logs.files():
            file.close()
        self._logs.trackers.close((self.path / COMPLETE).exists())


def why_not_written(ranks: Ranks, path: Path, write: Callable[[], None]) -> str | None:
    """Write a file or folder together: None, or on all ranks alike the reason why one of them could not.

    PATH.writing is then removed. Not to be called while a checkpoint is being written.
    """
    reason = None
    try:
        write()
    except OSError as error:
        reason = error.strerror or str(error)
    except (SafetensorError, UserError) as error:
        reason = str(error)
    reason = ranks.first_problem(reason)
    if reason is not None and ranks.first:
        shutil.rmtree(path.with_name(path.name + ".writing"), ignore_errors=True)
    return reason


def _reopen(path: Path, counter: str, done: int) -> tuple[TextIO, list[dict[str, Any]]]:
    """The file, open to be written on, with the lines before `done`; and those."""
    kept, lines = [], []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
                if values[counter] < done:
                    kept.append(line + "\n")
                    lines.append(values)
            except json.JSONDecodeError:  # the last line of a killed run may be cut
                break
    write_text(path, "".join(kept))
    return path.open("a", encoding="utf-8"), lines


def _same_configuration(path: Path, config: TrainConfig) -> None:
    """Refuse to resume under other options: the result would be neither run.

    Where it runs may change, and what is compared by contents may have moved.
    """
    free = ("resume", "out", "checkpoint_every", "keep_checkpoints", "max_skipped_steps", "wandb", "mlflow", "runtime")
    for name, before, now in changed_options(path, config, free):
        raise UserError(f"--resume: {path} was started with {name} = {before}, now it is {now}; use the same options")


def changed_options(path: Path, config: TrainConfig, free: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """(name, before, now) of the options in which a run's config.yaml differs from `config`, but for the `free` ones.

    A run of an older version has no value for options that came later; it did what their defaults do. What is compared
    by contents is free where the run has a fingerprint.
    """
    saved = under_new_names(read_yaml(path))
    plain = TrainConfig(config.pool, config.model, config.out, method=config.method)
    now, before = _flat(to_dict(config)), _flat(to_dict(plain)) | _flat(saved)
    gone = [(name, value, "gone from this version") for name, value in _flat(saved).items() if _is_gone(name)]
    moved = BY_CONTENTS if (path.parent / fingerprint.FILE).exists() else ()
    ignored = unread(config, config.table())  # whatever an older version wrote there had no effect
    return gone + [
        (name, before[name], now[name])
        for name in now
        if name.partition(".")[0] not in free
        and name not in ignored
        and before[name] != now[name]
        and not (name in moved and bool(before[name]) == bool(now[name]))
    ]


def _is_gone(name: str) -> bool:
    """Whether an older version had this option, and it decides what is trained: see `under_new_names`."""
    return (name.startswith("selection.") and name != "selection.round_steps") or name in (
        "optimizer.eps",
        "optimizer.final_lr",
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"batch": {"capacity": 1}} -> {"batch.capacity": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
