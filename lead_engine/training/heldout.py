"""Held-out loss while a run trains: when it is measured, which model was the best so far, and when to stop.

All of it happens between two rounds and leaves what is trained as it was: forward passes without gradients, dropout or
random numbers. Its time is not the training's. What is decided comes from numbers that are the same on every rank, and
lies in the checkpoints' notes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lead_engine.base.console import Bar, say, warn
from lead_engine.base.files import publish, read_json, write_text
from lead_engine.model.scoring import score_together, summarise_loss
from lead_engine.pool.heldout import HeldOutData
from lead_engine.training.build import TrainingSetup
from lead_engine.training.checkpoint import Checkpoints
from lead_engine.training.distributed import Ranks
from lead_engine.training.heartbeat import enter_phase
from lead_engine.training.rounds import Progress
from lead_engine.training.run_folder import RunFolder, why_not_written

BEST = "best"
"""Folder of the best model, in the run folder."""
NOTE = "heldout.json"
"""In BEST: {"step", "loss"} of its evaluation."""


class Mark(NamedTuple):
    """An evaluation: after `step` optimizer steps, the overall loss in nats a token was `loss`."""

    step: int
    loss: float


class HeldOut:
    """The evaluations of one run; one without --eval-data has none, and every method does nothing."""

    def __init__(self, setup: TrainingSetup, ranks: Ranks, folder: RunFolder, checkpoints: Checkpoints) -> None:
        self.setup, self.ranks, self.folder, self.checkpoints = setup, ranks, folder, checkpoints
        self.data = setup.heldout
        self.path = setup.config.out / BEST
        if ranks.first and self.data is not None:
            _tidy(self.path)
        self.last = -1
        """Step of the last evaluation."""
        self.lowest: Mark | None = None
        """The lowest loss so far."""
        self.kept: Mark | None = None
        """The model in BEST; until one is lower, the model before training, which is not written."""
        self.since = 0
        """Evaluations since the lowest."""
        self.seconds = self.waited = 0.0
        """Of the clock: for evaluations and writing the best model; before them, for training steps still under way."""
        self.tokens = 0
        """Evaluated in all."""
        self.loss: dict[str, Any] = {}
        """The last evaluation, as `summarise_loss` gives it."""
        self.stops = False
        """Whether patience has run out."""

    def state(self) -> dict[str, Any]:
        """As JSON, for a checkpoint's notes."""
        names = ("last", "lowest", "kept", "since", "seconds", "waited", "tokens", "loss", "stops")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's notes."""
        for name, value in state.items():
            setattr(self, name, Mark(*value) if name in ("lowest", "kept") and value else value)

    def look(self, done: Progress, bar: Bar) -> None:
        """Evaluate before training, and at the end of the first round that reaches a multiple of --eval-every.

        Keeps the model if it is the best so far, and sets `stops`.
        """
        every, patience = self.setup.config.eval_every, self.setup.config.patience
        if self.data is None or not (self.last < 0 or (every and done.step // every > self.last // every)):
            return
        lower = self._measure(self.data, done)
        bar.advance(0, **{"held-out": self.loss["overall"]})
        if lower and done.step and every:
            self.checkpoints.finish()  # ranks must not meet over its files and over ours at once
            self._keep(lower, done, lambda building: self.setup.save_model(building, self.ranks.rank))
        left = self.setup.trainer.budget - done.tokens >= int(self.setup.trainer.store.lengths.min())
        if patience and self.since >= patience and left:
            self.stops = True
            best = f"{self.lowest.loss:.4f} at step {self.lowest.step}" if self.lowest else "none is finite"
            told = f"{self.since} evaluations in a row without a lower held-out loss (lowest: {best})"
            say(f"--patience {patience}: {told}; training stops early")

    def last_look(self, done: Progress) -> None:
        """Evaluate the model as it is at the end."""
        if self.data is not None and self.last != done.step:
            self._measure(self.data, done)

    def keep_last(self, done: Progress, model: Path) -> None:
        """If the run's last model is its best, BEST is that, once more under another name."""

        def link(building: Path) -> None:
            if self.ranks.first:
                _link(model, building)

        if self.setup.config.eval_every and done.step and self.lowest and self.lowest.step == done.step:
            self._keep(self.lowest, done, link)

    def summary(self) -> dict[str, Any]:
        """For summary.json; empty without --eval-data."""
        if self.data is None:
            return {}
        best = read_json(self.path / NOTE) if (self.path / NOTE).exists() else {"step": 0, "loss": None}
        return {
            "heldout_loss": _finite(self.loss["overall"]),
            "heldout_macro": _finite(self.loss["macro"]),
            "best_step": best["step"] if self.setup.config.eval_every else None,
            "best_heldout_loss": best["loss"] if best["step"] else self.kept and self.kept.loss,
            "evaluation_seconds": self.seconds,
            "evaluated_tokens": self.tokens,
            "stopped_early": self.stops,
        }

    def tell(self) -> None:
        """Say at the end what came of it."""
        if self.data is None:
            return
        values, best = self.summary(), ""
        if values["best_step"]:
            best = f"; lowest {values['best_heldout_loss']:.4f} at step {values['best_step']}: {self.path}"
        elif self.setup.config.eval_every:
            best = "; it was never lower than before training, so no best model is kept"
        say(f"held-out loss {self.loss['overall']:.4f}{best}; {self.tokens:,} tokens evaluated in {self.seconds:.1f} s")

    def _measure(self, data: HeldOutData, done: Progress) -> Mark | None:
        """Evaluate, and write the result down; returns it if its loss is the lowest so far."""

        def before_each() -> None:
            enter_phase("held-out loss", done.round, done.step)

        before_each()
        begun = time.perf_counter()
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)  # the round's steps are training's time
        started = time.perf_counter()
        self.waited += started - begun
        self.loss = loss_of(data, self.setup, self.ranks, before_each)
        mark = Mark(done.step, self.loss["overall"])
        lower = math.isfinite(mark.loss) and (self.lowest is None or mark.loss < self.lowest.loss)
        self.since = 0 if lower else self.since + 1
        self.last, self.lowest = done.step, mark if lower else self.lowest
        if lower and not done.step:
            self.kept = mark
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.tokens += data.store.num_tokens
        line = {"step": done.step, "round": done.round, "tokens": done.tokens, "loss": _finite(self.loss)}
        self.folder.evaluation({**line, "lowest": lower, "seconds": seconds})
        self._tell_evaluation(mark, lower, seconds)
        return mark if lower else None

    def _tell_evaluation(self, mark: Mark, lower: bool, seconds: float) -> None:
        lowest = "" if lower or not self.lowest else f", lowest {self.lowest.loss:.4f} at step {self.lowest.step}"
        told = f"held-out loss {mark.loss:.4f}, macro {self.loss['macro']:.4f}{lowest} ({seconds:.1f} s)"
        say(f"step {mark.step:,}: {told}")
        if not math.isfinite(mark.loss):
            why = "the model has diverged, or needs --runtime.precision fp32"
            warn(f"step {mark.step}: the held-out loss is not finite; {why}")

    def _keep(self, mark: Mark, done: Progress, make: Callable[[Path], None]) -> None:
        """Give BEST the folder that `make` builds, on all ranks; if it cannot be written, warn, leave what is there."""
        started = time.perf_counter()
        building = self.path.with_name(f"{BEST}.new")
        enter_phase("writing the best model", done.round, done.step, limited=False)

        def write() -> None:
            make(building)
            if self.ranks.first:
                write_text(building / NOTE, json.dumps(mark._asdict()) + "\n")
                publish(building, self.path)

        reason = why_not_written(self.ranks, building, write)
        self.seconds += time.perf_counter() - started
        if reason is None:
            self.kept = mark
            return
        if self.ranks.first:
            shutil.rmtree(building, ignore_errors=True)
        there = f"the one of step {self.kept.step} stays" if self.kept and self.kept.step else "there is none before it"
        warn(f"{self.path}: the best model so far could not be written ({reason}); {there}, and training goes on")


def loss_of(
    data: HeldOutData, setup: TrainingSetup, ranks: Ranks, before_each: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """What `summarise_loss` says of the model as it is: the same on every rank, and but for rounding on any number."""
    nll = score_together(
        setup.trainer.model,
        data.store,
        torch.arange(data.store.num_samples),
        batch=setup.config.batch,
        rank=ranks.rank,
        world=ranks.size,
        before_each=before_each,
    )
    return summarise_loss(nll.double().cpu().numpy(), data.store.response_rows.numpy(), data.tasks)


def _tidy(path: Path) -> None:
    """What a killed run left: a folder half written goes, one that was about to be replaced is back in its place."""
    for begun in path.parent.glob(f"{path.name}.new*"):
        shutil.rmtree(begun, ignore_errors=True)
    old = path.with_name(f"{path.name}.old")
    if old.is_dir() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)


def _link(model: Path, building: Path) -> None:
    """A folder with the same files; those of weights are hard links where the file system has them."""
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(model, building, copy_function=_link_file)


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target) if source.endswith(".safetensors") else shutil.copy2(source, target)
    except OSError:
        shutil.copy2(source, target)


def _finite(value: Any) -> Any:
    """The same, with None for what is not finite: JSON has no name for it."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
