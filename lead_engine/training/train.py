"""`lead-engine train`: from a prepared pool and a base model to a run folder."""
from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from lead_engine.config import TrainConfig
from lead_engine.console import Bar, say, warn
from lead_engine.console import progress as progress_bar
from lead_engine.errors import UserError
from lead_engine.model.save import save_model
from lead_engine.selection.selector import Selector
from lead_engine.training.announce import announce
from lead_engine.training.checkpoint import Checkpoints, Progress
from lead_engine.training.combinations import check_combination
from lead_engine.training.diagnosis import SkippedSteps
from lead_engine.training.distributed import Ranks, process_group
from lead_engine.training.flops import ModelFlops, find_peak
from lead_engine.training.loop import Round
from lead_engine.training.records import Meter, bar_info, round_line, step_lines
from lead_engine.training.run_folder import COMPLETE, RunFolder
from lead_engine.training.session import Session, build
from lead_engine.training.signals import Stopped, StopSignals
from lead_engine.training.summary import write_summary
from lead_engine.training.watchdog import at, here, lost_connection


def run(config: TrainConfig) -> None:
    """Train and write the run folder. Raises UserError for everything that the user can mend, `Stopped` after a signal."""
    with process_group(config.runtime.timeout) as ranks:
        train(config, ranks)


def train(config: TrainConfig, ranks: Ranks) -> None:
    """The same inside a process group that exists already."""
    _check(config, ranks)
    folder = RunFolder(config, writes=ranks.first)
    if (config.out / COMPLETE).exists():  # then --resume was given, with the same options
        say(f"{config.out}: already complete")
        return
    try:
        with StopSignals(ranks) as signals:
            _train(config, ranks, folder, signals)
        ranks.barrier()  # nobody goes on before rank 0's files are there
    except RuntimeError as error:
        if not lost_connection(error):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"lost the connection to another rank in {here()}: it has ended, and its own output says why, or its machine is out of reach; "
            f"go on with --resume ({reason})"
        ) from error
    finally:
        at("after training", limited=False)
        folder.close()


def _train(config: TrainConfig, ranks: Ranks, folder: RunFolder, signals: StopSignals) -> None:
    session = build(config, ranks)
    engine, budget = session.engine, session.budget
    names = _sample_names(config.pool)
    skipped = SkippedSteps(config.max_skipped_steps, names, config.out, config.pool)
    checkpoints = Checkpoints(config.out / "checkpoints", ranks, config.keep_checkpoints)
    parts = {"selector": engine.selector, "loss_change": engine.change}
    start = _resume(config, session, checkpoints, parts, skipped) if config.resume else Progress()
    meter = Meter.of(engine.store, ModelFlops.of(engine.model), find_peak(config.runtime.peak_tflops, ranks.device), ranks.size)
    announce(session, ranks, meter)
    ranks.barrier()
    folder.open(start.step, start.round)
    if number := signals.agreed():
        _stop(config, number, start, "nothing was trained since it started")
    done, waiting = start, None
    with progress_bar(budget, f"{config.method}, training tokens", done=start.tokens) as bar:
        for finished in engine.rounds(start, budget):
            # The round before this one has long left the device: reading it now waits for nothing that is not done.
            _record(waiting, folder, session, meter, names, bar, skipped)
            done, waiting = finished.after, finished
            at("agreeing whether to stop", done.round, done.step)
            number = signals.agreed()
            if number or (config.checkpoint_every and done.round % config.checkpoint_every == 0):
                _record(waiting, folder, session, meter, names, bar, skipped)  # so that the logs reach as far as the checkpoint
                waiting = None
                at("checkpoint", done.round, done.step)
                check_replicas(engine.selector, ranks, done.step)
                started = checkpoints.save(engine.model, engine.optimizer, parts, done, {"skipped": skipped.state()})
            if number:
                written = started and checkpoints.finish()
                _stop(config, number, done, "a checkpoint is written" if written else "its checkpoint could not be written")
        _record(waiting, folder, session, meter, names, bar, skipped)
    at("last checkpoint", done.round, done.step)
    checkpoints.finish()
    check_replicas(engine.selector, ranks, done.step)
    if done.step == 0:
        shortest = int(engine.store.lengths.min())
        why = f"{budget:,} tokens, the shortest sample has {shortest:,}" if budget < shortest else "no sample is eligible that fits into it"
        warn(f"nothing was trained: --budget {config.budget:g} ({why}); the model written is the base")
    elif budget - done.tokens > int(engine.store.lengths.max()):  # else what is left is too little for the next sample
        say(f"no eligible sample is left after {done.tokens:,} of {budget:,} tokens (--selection.max-visits {config.selection.max_visits})")
    at("writing the model", done.round, done.step, limited=False)
    model = config.out / "model"
    _write(ranks, model, lambda: save_model(engine.model, session.tokenizer, model, base=session.base, rank=ranks.rank))
    _write(ranks, config.out, lambda: write_summary(session, ranks, done, meter, folder.skipped_steps) if ranks.first else None)


def _resume(config: TrainConfig, session: Session, checkpoints: Checkpoints, parts: dict[str, object], skipped: SkippedSteps) -> Progress:
    """Go on from the newest whole checkpoint; from the start, and saying so, if the run has none."""
    start, notes = checkpoints.load(session.engine.model, session.engine.optimizer, parts)
    if notes:
        skipped.load(notes["skipped"])
    elif (config.out / "metrics.jsonl").exists():
        say(f"--resume: {config.out} has no checkpoint, starting anew")
    return start


def _stop(config: TrainConfig, number: int, done: Progress, what: str) -> None:
    name = signal.Signals(number).name
    say(f"{config.out}: stopped by {name} after step {done.step} (round {done.round}): {what}; go on with --resume")
    raise Stopped(number)


def _write(ranks: Ranks, path: Path, write: Callable[[], None]) -> None:
    """Write files; UserError on all ranks if it fails on any, with what was there before intact."""
    reason = None
    try:
        write()
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
    reason = next(filter(None, ranks.everyone(reason)), None)
    if reason is not None:
        if ranks.first:
            shutil.rmtree(path.with_name(path.name + ".writing"), ignore_errors=True)
        raise UserError(f"{path}: cannot be written ({reason}); make room, then finish the run with --resume")


def check_replicas(selector: Selector, ranks: Ranks, step: int) -> None:
    """RuntimeError on all ranks unless every rank's selector is that of rank 0, bit for bit. Waits for the device.

    Ranks that disagree would train different plans from then on, and nothing else would tell.
    """
    if ranks.size == 1:
        return
    own = selector.fingerprint().view(1)
    everyone = [torch.empty_like(own) for _ in range(ranks.size)]
    dist.all_gather(everyone, own)
    first, *others = torch.cat(everyone).tolist()
    different = [str(rank) for rank, other in enumerate(others, 1) if other != first]
    if different:
        raise RuntimeError(
            f"the selection's state of ranks {', '.join(different)} differs from rank 0's after step {step}, though it is a function of "
            "what all ranks see: a machine that computes wrongly, or a defect here; checkpoints up to now agree, go on with --resume"
        )


def _record(
    finished: Round | None, folder: RunFolder, session: Session, meter: Meter, names: list[str], bar: Bar, skipped: SkippedSteps
) -> None:
    """Write a finished round's metrics. UserError once too many steps were skipped."""
    if finished is None:
        return
    values = finished.values.read()
    lines = step_lines(finished, values, meter)
    for line in lines:
        folder.step(line)
    folder.round(round_line(finished, values, session.config.method, session.state, names, session.config.batch.capacity))
    bar.advance(finished.after.tokens - finished.before.tokens, **bar_info(lines, folder.skipped_steps))
    skipped.add(finished, values)


def _check(config: TrainConfig, ranks: Ranks) -> None:
    check_combination(config, ranks.size, ranks.device)
    if not (config.pool / "store").is_dir():
        raise UserError(f"--pool {config.pool}: not a prepared pool (no store/ in it); make one with `lead-engine prepare`")


def _sample_names(pool: Path) -> list[str]:
    return pq.read_table(pool / "records.parquet", columns=["id"]).column("id").to_pylist()
