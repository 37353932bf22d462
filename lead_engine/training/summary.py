"""What a finished run leaves beside its model: utility and visits of every sample, and the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lead_engine.base.console import say
from lead_engine.base.files import write_text
from lead_engine.training.build import TrainingSetup
from lead_engine.training.distributed import Ranks
from lead_engine.training.heldout import HeldOut
from lead_engine.training.memory import peak_bytes, size
from lead_engine.training.records import Meter
from lead_engine.training.rounds import Progress
from lead_engine.training.run_folder import COMPLETE


def write_summary(
    setup: TrainingSetup, ranks: Ranks, done: Progress, meter: Meter, skipped_steps: int, heldout: HeldOut
) -> None:
    """Write utility.npz, then summary.json, which marks the run as complete; and tell what came of it."""
    visits = setup.trainer.selector.samples.visits[:-1].cpu()
    _write_utility(setup, visits)
    summary = {
        **_what_was_trained(setup, done, visits, skipped_steps),
        **_time(setup, ranks, done, meter, visits, heldout),
        "world_size": ranks.size,
        "torch": torch.__version__,
        **heldout.summary(),
    }
    write_text(setup.config.out / COMPLETE, json.dumps(summary, indent=1))
    _tell(setup.config.out, done, summary)
    heldout.tell()


def _write_utility(setup: TrainingSetup, visits: Tensor) -> None:
    """Utility and visits of every sample."""
    out, state = setup.config.out, setup.state
    building = out / "utility.writing.npz"
    np.savez(
        building,
        initial=state.utility.numpy(),
        final=setup.trainer.selector.samples.utility[:-1].cpu().numpy(),
        visits=visits.numpy(),
        cluster=state.cluster.numpy(),
        task=state.task.numpy(),
        dropped=state.dropped.numpy(),
    )
    building.replace(out / "utility.npz")


def _what_was_trained(setup: TrainingSetup, done: Progress, visits: Tensor, skipped_steps: int) -> dict[str, Any]:
    config, store = setup.config, setup.trainer.store
    return {
        "method": config.method,
        "seed": config.seed,
        "budget": setup.trainer.budget / store.num_tokens if config.method == "full" else config.budget,
        "tokens_trained": done.tokens,
        "samples_trained": int(visits.sum()),
        "distinct_samples": int((visits > 0).sum()),
        "steps": done.step,
        "rounds": done.round,
        "skipped_steps": skipped_steps,
        "response_tokens_trained": int((visits * store.response_rows).sum()),
        "fingerprint": f"{int(setup.trainer.selector.fingerprint()) & (1 << 64) - 1:016x}",
        "pool": str(config.pool),
        "pool_tokens": store.num_tokens,
        "pool_samples": store.num_samples,
        "task_names": setup.state.task_names,
    }


def _time(
    setup: TrainingSetup, ranks: Ranks, done: Progress, meter: Meter, visits: Tensor, heldout: HeldOut
) -> dict[str, Any]:
    """Seconds, speed and memory. Training's time is all but that of scoring the pool again."""
    seconds = done.seconds + heldout.waited
    training = max(seconds - done.scoring_seconds, 1e-9)
    selection, flops = done.selection_seconds + setup.trainer.selection_timer.take(), meter.run_flops(visits)
    return {
        "seconds": seconds,
        "selection_seconds": selection,
        "selection_ms_per_round": 1e3 * selection / max(1, done.round),
        "selection_share": selection / training,
        "scoring_seconds": done.scoring_seconds,
        "tokens_per_second": done.tokens / training,
        "flops": flops,
        "mfu": meter.utilisation(flops, training),
        "peak_tflops": meter.peak.tflops,
        "peak_memory_bytes": peak_bytes(ranks.device),
    }


def _tell(out: Path, done: Progress, summary: dict[str, Any]) -> None:
    say(f"{done.tokens:,} tokens in {done.step} steps, {summary['seconds']:.1f} s; model: {out / 'model'}")
    mfu = f", {summary['mfu']:.1%} MFU" if summary["mfu"] is not None else ""
    count, skipped = summary["skipped_steps"], ""
    if count:
        skipped = f"; {count} steps skipped (their loss or gradient was not finite)"
    memory = size(summary["peak_memory_bytes"])
    say(f"{summary['tokens_per_second']:,.0f} tokens/s{mfu}; at most {memory} of memory{skipped}")
    per_round, share = summary["selection_ms_per_round"], summary["selection_share"]
    scoring = f"; scoring the pool again: {done.scoring_seconds:.1f} s" if done.scoring_seconds else ""
    say(f"selection: {per_round:.2f} ms a round, {share:.2%} of the time of training{scoring}")
