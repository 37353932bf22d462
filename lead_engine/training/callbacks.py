"""What surrounds the rounds of a run that has a folder: progress bar, logs, signals, evaluations, checkpoints."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lead_engine.base import fingerprint
from lead_engine.base.console import Bar, say
from lead_engine.base.console import progress as progress_bar
from lead_engine.base.errors import UserError
from lead_engine.pool.record_ids import RecordIds
from lead_engine.selection.replicas import check_replicas
from lead_engine.training.build import TrainingSetup
from lead_engine.training.checkpoint import Checkpoints
from lead_engine.training.diagnosis import SkippedSteps
from lead_engine.training.distributed import Ranks
from lead_engine.training.flops import ModelFlops, find_peak
from lead_engine.training.heartbeat import enter_phase
from lead_engine.training.heldout import HeldOut
from lead_engine.training.origin import check_same, written
from lead_engine.training.records import Meter, bar_info, round_line, step_lines
from lead_engine.training.rounds import Progress, Round
from lead_engine.training.run_folder import RunFolder
from lead_engine.training.signals import Stopped, StopSignals


class RunCallbacks:
    """The `trainer.Callbacks` of `lead-engine train`."""

    def __init__(self, setup: TrainingSetup, ranks: Ranks, folder: RunFolder, signals: StopSignals) -> None:
        self.setup, self.ranks, self.folder, self.signals = setup, ranks, folder, signals
        config, trainer = setup.config, setup.trainer
        self.checkpoints = Checkpoints(config.out / "checkpoints", ranks, config.keep_checkpoints)
        self.names = RecordIds(config.pool)
        self.skipped = SkippedSteps(config.max_skipped_steps, self.names, config.out, config.pool)
        peak = find_peak(ranks.device)
        self.meter = Meter.of(trainer.store, ModelFlops.of(trainer.model), peak, ranks.size)
        self.heldout = HeldOut(setup, ranks, folder, self.checkpoints)
        self.start = Progress()
        """Where this process began to train."""
        self._bar = Bar()
        self._unlogged: Round | None = None
        """The last round, whose values may still be on the device."""

    def resume(self) -> Progress:
        """Go on from the newest whole checkpoint; from the start, and saying so, if the run has none."""
        config, trainer = self.setup.config, self.setup.trainer
        self.start, notes = self.checkpoints.load(trainer.model, trainer.optimizer, self._parts())
        if notes:
            way_out = "Bring back what it was written over, or delete the checkpoints to train from the start"
            before, what = notes.get(fingerprint.KEY), f"--resume: {self.checkpoints.folder}"
            check_same(before, self.setup.made_from, config.pool, what, way_out)
            self.skipped.load(notes["skipped"])
            self.heldout.load(notes.get("heldout", {}))
        elif (config.out / "metrics.jsonl").exists():
            say(f"--resume: {config.out} has no checkpoint, starting anew")
        return self.start

    @contextmanager
    def progress_bar(self) -> Iterator[None]:
        """Show a bar over the budget's tokens."""
        budget, method = self.setup.trainer.budget, self.setup.config.method
        with progress_bar(budget, f"{method}, training tokens", done=self.start.tokens) as self._bar:
            yield

    @property
    def stops_early(self) -> bool:
        """Whether --patience has run out."""
        return self.heldout.stops

    def log(self, finished: Round) -> None:
        """Write the round before `finished`. That one has left the device long ago: reading it waits for nothing."""
        self.log_last()
        self._unlogged = finished

    def log_last(self) -> None:
        """Write the lines of the last round. UserError, on all ranks alike, once too many steps were skipped."""
        finished, self._unlogged = self._unlogged, None
        if finished is None:
            return
        config, values = self.setup.config, finished.values.read()
        lines = step_lines(finished, values, self.meter)
        for line in lines:
            self.folder.step(line)
        capacity = config.batch.capacity
        self.folder.round(round_line(finished, values, config.method, self.setup.state, self.names, capacity))
        tokens = finished.after.tokens - finished.before.tokens
        self._bar.advance(tokens, **bar_info(lines, self.folder.skipped_steps))
        try:
            self.skipped.add(finished, values)
        except UserError:
            self.checkpoints.finish()
            raise

    def stop_on_signal(self, progress: Progress) -> None:
        """Write a checkpoint of what was trained since the start and raise `Stopped`, if any rank got a signal."""
        trained = progress != self.start
        if trained:
            enter_phase("agreeing whether to stop", progress.round, progress.step)
        number = self.signals.agreed()
        if not number:
            return
        what = "nothing was trained since it started"
        if trained:
            is_written = self._write_checkpoint(progress) and self.checkpoints.finish()
            what = "a checkpoint is written" if is_written else "its checkpoint could not be written"
        where = f"{signal.Signals(number).name} after step {progress.step} (round {progress.round})"
        say(f"{self.setup.config.out}: stopped by {where}: {what}; go on with --resume")
        raise Stopped(number)

    def evaluate(self, progress: Progress) -> None:
        """Measure the held-out loss, if it is time."""
        self.heldout.look(progress, self._bar)

    def checkpoint(self, progress: Progress) -> None:
        """Begin to write a checkpoint, every --checkpoint-every rounds."""
        every = self.setup.config.checkpoint_every
        if every and progress.round % every == 0:
            self._write_checkpoint(progress)

    def _write_checkpoint(self, progress: Progress) -> bool:
        """Begin to write a checkpoint; whether that was possible."""
        self.log_last()  # so that the logs reach as far as the checkpoint
        trainer = self.setup.trainer
        enter_phase("checkpoint", progress.round, progress.step, limited=False)
        check_replicas(trainer.selector, self.ranks.size, progress.step)
        notes = {
            "skipped": self.skipped.state(),
            "heldout": self.heldout.state(),
            fingerprint.KEY: written(self.setup.made_from, self.setup.config.pool),
        }
        return self.checkpoints.save(trainer.model, trainer.optimizer, self._parts(), progress, notes)

    def _parts(self) -> dict[str, Any]:
        """What a checkpoint holds beside model and optimizer."""
        return {"selector": self.setup.trainer.selector, "loss_change": self.setup.trainer.loss_change}
