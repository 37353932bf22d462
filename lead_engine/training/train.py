"""`lead-engine train`: from a prepared pool and a base model to a run folder."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lead_engine.base import fingerprint
from lead_engine.base.console import Bar, say, warn
from lead_engine.base.console import progress as progress_bar
from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json
from lead_engine.config import TrainConfig
from lead_engine.model.save import save_model
from lead_engine.pool.names import SampleNames
from lead_engine.selection.replicas import check_replicas
from lead_engine.training.announce import announce
from lead_engine.training.checkpoint import Checkpoints, Progress
from lead_engine.training.combinations import check_combination
from lead_engine.training.diagnosis import SkippedSteps
from lead_engine.training.distributed import Ranks, process_group
from lead_engine.training.flops import ModelFlops, find_peak
from lead_engine.training.heartbeat import enter_phase
from lead_engine.training.heldout import HeldOut
from lead_engine.training.heldout_data import check_heldout
from lead_engine.training.loop import Round
from lead_engine.training.origin import check_same, written
from lead_engine.training.records import Meter, bar_info, round_line, step_lines
from lead_engine.training.run_folder import COMPLETE, RunFolder, why_not_written
from lead_engine.training.session import Inputs, Session, build, find_inputs
from lead_engine.training.signals import Stopped, StopSignals
from lead_engine.training.summary import write_summary


def run(config: TrainConfig) -> None:
    """Train and write the run folder. Raises UserError for everything that the user can mend, `Stopped` after a signal."""
    with process_group(config.runtime.timeout) as ranks:
        train(config, ranks)


def train(config: TrainConfig, ranks: Ranks) -> None:
    """The same inside a process group that exists already."""
    _check(config, ranks)
    folder = RunFolder(config, writes=ranks.first)
    inputs = find_inputs(config, ranks)
    folder.check(inputs.parts)
    if (config.out / COMPLETE).exists():  # then --resume was given, with the same options
        check_heldout(config, ranks)
        summary = read_json(config.out / COMPLETE)
        early = f" (stopped early after step {summary['steps']})" if summary.get("stopped_early") else ""
        say(f"{config.out}: already complete{early}")
        return
    try:
        with StopSignals(ranks) as signals:
            _train(config, ranks, folder, signals, inputs)
        ranks.barrier()  # nobody goes on before rank 0's files are there
        enter_phase("after training", limited=False)
    finally:
        folder.close()


@dataclass
class _Run:
    """The parts of a run that is being driven."""

    session: Session
    ranks: Ranks
    folder: RunFolder
    signals: StopSignals
    checkpoints: Checkpoints
    skipped: SkippedSteps
    meter: Meter
    names: SampleNames
    """Of the pool's samples."""
    heldout: HeldOut

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds beside model and optimizer."""
        return {"selector": self.session.engine.selector, "loss_change": self.session.engine.change}

    def _notes(self) -> dict[str, Any]:
        made_from = written(self.session.parts, self.session.config.pool)
        return {"skipped": self.skipped.state(), "heldout": self.heldout.state(), fingerprint.KEY: made_from}

    def resume(self) -> Progress:
        """Go on from the newest whole checkpoint; from the start, and saying so, if the run has none."""
        engine, out = self.session.engine, self.session.config.out
        start, notes = self.checkpoints.load(engine.model, engine.optimizer, self.parts)
        if notes:
            way_out = "Bring back what it was written over, or delete the checkpoints to train from the start"
            before, what = notes.get(fingerprint.KEY), f"--resume: {self.checkpoints.folder}"
            check_same(before, self.session.parts, self.session.config.pool, what, way_out)
            self.skipped.load(notes["skipped"])
            self.heldout.load(notes.get("heldout", {}))
        elif (out / "metrics.jsonl").exists():
            say(f"--resume: {out} has no checkpoint, starting anew")
        return start

    def rounds(self, start: Progress) -> Progress:
        """Train until the budget is spent or nothing is left. `Stopped` after a signal, UserError once too many steps were skipped."""
        config, budget, done, waiting = self.session.config, self.session.budget, start, None
        if number := self.signals.agreed():
            self._stop(number, start, "nothing was trained since it started")
        with progress_bar(budget, f"{config.method}, training tokens", done=start.tokens) as bar:
            self.heldout.look(start, bar)
            for finished in self.session.engine.rounds(start, budget) if not self.heldout.stops else ():
                # The round before this one has long left the device: reading it now waits for nothing that is not done.
                self._record(waiting, bar)
                done, waiting = finished.after, finished
                enter_phase("agreeing whether to stop", done.round, done.step)
                number = self.signals.agreed()
                if not number:  # else there may be no time left; the resumed run makes up for it
                    self.heldout.look(done, bar)
                if number or (config.checkpoint_every and done.round % config.checkpoint_every == 0):
                    self._record(waiting, bar)  # so that the logs reach as far as the checkpoint
                    waiting = None
                    begun = self._checkpoint(done)
                if number:
                    written = begun and self.checkpoints.finish()
                    self._stop(
                        number, done, "a checkpoint is written" if written else "its checkpoint could not be written"
                    )
                if self.heldout.stops:
                    break
            self._record(waiting, bar)
        return done

    def finish(self, done: Progress) -> None:
        """Write the model and the summary."""
        config, engine, ranks = self.session.config, self.session.engine, self.ranks
        enter_phase("last checkpoint", done.round, done.step, limited=False)
        self.checkpoints.finish()
        check_replicas(engine.selector, ranks.size, done.step)
        self._tell_what_is_left(done)
        self.heldout.last_look(done)
        enter_phase("writing the model", done.round, done.step, limited=False)
        path = config.out / "model"
        saving = {"base": self.session.base, "parts": self.session.parts["model"], "rank": ranks.rank}
        _write(ranks, path, lambda: save_model(engine.model, self.session.tokenizer, path, **saving))
        self.heldout.keep_last(done, path)
        summary = (self.session, ranks, done, self.meter, self.folder.skipped_steps, self.heldout)
        _write(ranks, config.out, lambda: write_summary(*summary) if ranks.first else None)

    def _record(self, finished: Round | None, bar: Bar) -> None:
        """Write a finished round's metrics."""
        if finished is None:
            return
        config, values = self.session.config, finished.values.read()
        lines = step_lines(finished, values, self.meter)
        for line in lines:
            self.folder.step(line)
        self.folder.round(
            round_line(finished, values, config.method, self.session.state, self.names, config.batch.capacity)
        )
        bar.advance(finished.after.tokens - finished.before.tokens, **bar_info(lines, self.folder.skipped_steps))
        try:
            self.skipped.add(finished, values)
        except UserError:  # of all ranks alike
            self.checkpoints.finish()
            raise

    def _checkpoint(self, done: Progress) -> bool:
        """Begin to write a checkpoint; whether that was possible."""
        engine = self.session.engine
        enter_phase("checkpoint", done.round, done.step, limited=False)
        check_replicas(engine.selector, self.ranks.size, done.step)
        return self.checkpoints.save(engine.model, engine.optimizer, self.parts, done, self._notes())

    def _stop(self, number: int, done: Progress, what: str) -> None:
        name = signal.Signals(number).name
        say(
            f"{self.session.config.out}: stopped by {name} after step {done.step} (round {done.round}): {what}; go on with --resume"
        )
        raise Stopped(number)

    def _tell_what_is_left(self, done: Progress) -> None:
        """Say so if less was trained than was asked for."""
        config, budget, lengths = self.session.config, self.session.budget, self.session.engine.store.lengths
        if done.step == 0:
            few = budget < int(lengths.min())
            why = (
                f"{budget:,} tokens, the shortest sample has {int(lengths.min()):,}"
                if few
                else "no sample is eligible that fits into it"
            )
            warn(f"nothing was trained: --budget {config.budget:g} ({why}); the model written is the base")
        elif not self.heldout.stops and budget - done.tokens > int(lengths.max()):  # else too little for another
            visits = config.selection.max_visits
            say(
                f"no eligible sample is left after {done.tokens:,} of {budget:,} tokens (--selection.max-visits {visits})"
            )


def _train(config: TrainConfig, ranks: Ranks, folder: RunFolder, signals: StopSignals, inputs: Inputs) -> None:
    session, names = build(config, ranks, inputs, evaluates=True), SampleNames(config.pool)
    engine = session.engine
    checkpoints = Checkpoints(config.out / "checkpoints", ranks, config.keep_checkpoints)
    skipped = SkippedSteps(config.max_skipped_steps, names, config.out, config.pool)
    meter = Meter.of(
        engine.store, ModelFlops.of(engine.model), find_peak(config.runtime.peak_tflops, ranks.device), ranks.size
    )
    heldout = HeldOut(session, ranks, folder, checkpoints)
    run = _Run(session, ranks, folder, signals, checkpoints, skipped, meter, names, heldout)
    start = run.resume() if config.resume else Progress()
    announce(session, ranks, meter)
    ranks.barrier()
    folder.open(start.step, start.round)
    run.finish(run.rounds(start))


def _write(ranks: Ranks, path: Path, write: Callable[[], None]) -> None:
    """Write files; UserError on all ranks if it fails on any, with what was there before intact."""
    reason = why_not_written(ranks, path, write)
    if reason is not None:
        raise UserError(f"{path}: cannot be written ({reason}); make room, then finish the run with --resume")


def _check(config: TrainConfig, ranks: Ranks) -> None:
    check_combination(config, ranks.size, ranks.device)
    if not (config.pool / "store").is_dir():
        raise UserError(
            f"--pool {config.pool}: not a prepared pool (no store/ in it); make one with `lead-engine prepare`"
        )
