"""`lead-engine train`: from a prepared pool and a base model to a run folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

from lead_engine.base.console import say, warn
from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json
from lead_engine.config import TrainConfig
from lead_engine.selection.replicas import check_replicas
from lead_engine.training.announce import announce
from lead_engine.training.build import TrainingSetup, build, find_inputs
from lead_engine.training.callbacks import RunCallbacks
from lead_engine.training.combinations import check_combination
from lead_engine.training.distributed import Ranks, process_group
from lead_engine.training.heartbeat import enter_phase
from lead_engine.training.heldout_data import check_heldout
from lead_engine.training.rounds import Progress
from lead_engine.training.run_folder import COMPLETE, RunFolder, why_not_written
from lead_engine.training.signals import StopSignals
from lead_engine.training.summary import write_summary


def run(config: TrainConfig, ranks: Ranks | None = None) -> None:
    """Train and write the run folder. ranks: of a process group that exists already; by default one is made.

    Raises UserError for everything that the user can mend, `Stopped` after a signal.
    """
    with process_group(config.runtime.timeout) if ranks is None else nullcontext(ranks) as ranks:
        check_combination(config, ranks.size, ranks.device)
        _check_pool(config.pool)
        with closing(RunFolder(config, writes=ranks.first)) as folder:
            inputs = find_inputs(config, ranks)
            folder.check(inputs.made_from)
            if _is_complete(config, ranks):
                return
            with StopSignals(ranks) as signals:
                setup = build(config, ranks, inputs, evaluates=True)
                callbacks = RunCallbacks(setup, ranks, folder, signals)
                start = callbacks.resume() if config.resume else Progress()
                announce(setup, ranks, callbacks.meter)
                ranks.barrier()
                folder.open(start.step, start.round)
                with callbacks.progress_bar():
                    done = setup.trainer.train(start, callbacks)
                _finish(setup, ranks, done, callbacks)
            ranks.barrier()  # nobody goes on before rank 0's files are there
            enter_phase("after training", limited=False)


def _check_pool(pool: Path) -> None:
    if not (pool / "store").is_dir():
        raise UserError(f"--pool {pool}: not a prepared pool (no store/ in it); make one with `lead-engine prepare`")


def _is_complete(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether the run is finished already: then --resume was given, with the same options."""
    if not (config.out / COMPLETE).exists():
        return False
    check_heldout(config, ranks)
    summary = read_json(config.out / COMPLETE)
    early = f" (stopped early after step {summary['steps']})" if summary.get("stopped_early") else ""
    say(f"{config.out}: already complete{early}")
    return True


def _finish(setup: TrainingSetup, ranks: Ranks, done: Progress, callbacks: RunCallbacks) -> None:
    """Write the model and the summary."""
    config, heldout = setup.config, callbacks.heldout
    enter_phase("last checkpoint", done.round, done.step, limited=False)
    callbacks.checkpoints.finish()
    check_replicas(setup.trainer.selector, ranks.size, done.step)
    _tell_what_is_left(setup, done, stopped_early=callbacks.stops_early)
    heldout.last_look(done)
    enter_phase("writing the model", done.round, done.step, limited=False)
    path = config.out / "model"
    _write(ranks, path, lambda: setup.save_model(path, ranks.rank))
    heldout.keep_last(done, path)

    def summarise() -> None:
        if ranks.first:
            write_summary(setup, ranks, done, callbacks.meter, callbacks.folder.skipped_steps, heldout)

    _write(ranks, config.out, summarise)


def _tell_what_is_left(setup: TrainingSetup, done: Progress, *, stopped_early: bool) -> None:
    """Say so if less was trained than was asked for."""
    config, budget, lengths = setup.config, setup.trainer.budget, setup.trainer.store.lengths
    shortest, longest = int(lengths.min()), int(lengths.max())
    if done.step == 0:
        why = "no sample is eligible that fits into it"
        if budget < shortest:
            why = f"{budget:,} tokens, the shortest sample has {shortest:,}"
        warn(f"nothing was trained: --budget {config.budget:g} ({why}); the model written is the base")
    elif not stopped_early and budget - done.tokens > longest:  # else too little is left for another sample
        told = f"no eligible sample is left after {done.tokens:,} of {budget:,} tokens"
        visits = getattr(config.options, "max_visits", None)
        say(f"{told} (--{config.method}.max-visits {visits})" if visits else told)


def _write(ranks: Ranks, path: Path, write: Callable[[], None]) -> None:
    """Write files; UserError on all ranks if it fails on any, with what was there before intact."""
    reason = why_not_written(ranks, path, write)
    if reason is not None:
        raise UserError(f"{path}: cannot be written ({reason}); make room, then finish the run with --resume")
