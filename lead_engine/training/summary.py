"""What a finished run leaves beside its model: utility and visits of every sample, and the summary."""

from __future__ import annotations

import json

import numpy as np
import torch

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
    """Utility, visits and the summary; the summary comes last and marks the run complete."""
    config, state, selector, store = setup.config, setup.state, setup.trainer.selector, setup.trainer.store
    counts = selector.samples.visits[:-1].cpu()
    seconds = done.seconds + heldout.waited
    visits, flops, training = counts.numpy(), meter.run_flops(counts), max(seconds - done.scoring_seconds, 1e-9)
    selection = done.selection_seconds + setup.trainer.selection_timer.take()
    building = config.out / "utility.writing.npz"
    np.savez(
        building,
        initial=state.utility.numpy(),
        final=selector.samples.utility[:-1].cpu().numpy(),
        visits=visits,
        cluster=state.cluster.numpy(),
        task=state.task.numpy(),
        dropped=state.dropped.numpy(),
    )
    building.replace(config.out / "utility.npz")
    summary = {
        "method": config.method,
        "seed": config.seed,
        "budget": config.budget if config.method != "full" else float(config.epochs),
        "tokens_trained": done.tokens,
        "samples_trained": int(visits.sum()),
        "distinct_samples": int((visits > 0).sum()),
        "steps": done.step,
        "rounds": done.round,
        "skipped_steps": skipped_steps,
        "seconds": seconds,
        "selection_seconds": selection,
        "selection_ms_per_round": 1e3 * selection / max(1, done.round),
        "selection_share": selection / training,
        "scoring_seconds": done.scoring_seconds,
        "response_tokens_trained": int((visits * store.response_rows.numpy()).sum()),
        "fingerprint": f"{int(selector.fingerprint()) & (1 << 64) - 1:016x}",
        "pool": str(config.pool),
        "pool_tokens": store.num_tokens,
        "pool_samples": store.num_samples,
        "task_names": state.task_names,
        "tokens_per_second": done.tokens / training,
        "flops": flops,
        "mfu": meter.utilisation(flops, training),
        "peak_tflops": meter.peak.tflops,
        "peak_memory_bytes": peak_bytes(ranks.device),
        "world_size": ranks.size,
        "torch": torch.__version__,
        **heldout.summary(),
    }
    write_text(config.out / COMPLETE, json.dumps(summary, indent=1))
    say(f"{done.tokens:,} tokens in {done.step} steps, {seconds:.1f} s; model: {config.out / 'model'}")
    mfu = f", {summary['mfu']:.1%} MFU" if summary["mfu"] is not None else ""
    skipped = f"; {skipped_steps} steps skipped (their loss or gradient was not finite)" if skipped_steps else ""
    say(
        f"{summary['tokens_per_second']:,.0f} tokens/s{mfu}; at most {size(summary['peak_memory_bytes'])} of "
        f"memory{skipped}"
    )
    per_round, share = summary["selection_ms_per_round"], summary["selection_share"]
    scoring = f"; scoring the pool again: {done.scoring_seconds:.1f} s" if done.scoring_seconds else ""
    say(f"selection: {per_round:.2f} ms a round, {share:.2%} of the time of training{scoring}")
    heldout.tell()
