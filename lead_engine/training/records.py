"""A finished round as lines of metrics.jsonl and selection.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lead_engine.pool.state import PoolState
from lead_engine.pool.store import TokenStore
from lead_engine.training.flops import ModelFlops, Peak, utilisation
from lead_engine.training.memory import size, used_bytes
from lead_engine.training.rounds import Round, RoundValues
from lead_kernels import packing_waste


@dataclass(frozen=True)
class Meter:
    """What turns a plan into FLOPs, and FLOPs into a share of the machine's peak."""

    flops: ModelFlops
    lengths: Tensor
    """int64 [N] on the host, tokens of each sample."""
    rows: Tensor
    """int64 [N] on the host, response tokens of each sample."""
    peak: Peak
    devices: int
    device: torch.device

    @staticmethod
    def of(store: TokenStore, flops: ModelFlops, peak: Peak, devices: int) -> Meter:
        return Meter(flops, store.lengths, store.response_rows, peak, devices, store.device)

    def step_flops(self, sample_ids: Tensor) -> list[float]:
        """Model FLOPs of each step over all ranks: sample_ids int64 [S, M, B] on the host, N in empty slots."""
        used = sample_ids < len(self.lengths)
        ids = sample_ids.clamp(max=len(self.lengths) - 1)
        return torch.where(used, self.flops.samples(self.lengths[ids], self.rows[ids]), 0.0).sum((1, 2)).tolist()

    def run_flops(self, visits: Tensor) -> float:
        """Model FLOPs of a run that trained each sample so many times: visits int [N] on the host."""
        return float((self.flops.samples(self.lengths, self.rows) * visits).sum())

    def utilisation(self, flops: float, seconds: float) -> float | None:
        """MFU; None where the peak is not known."""
        return utilisation(flops, seconds, self.devices, self.peak)


def step_lines(finished: Round, values: RoundValues, meter: Meter) -> list[dict[str, Any]]:
    """One dict per optimizer step (docs/METRICS.md says what stands in it).

    Times are the round's, shared among its steps: a GPU's steps have no end the host could see. Memory is read when the
    line is made, a round later. Values that are not finite are None: JSON has no name for them.
    """
    before, after = finished.before, finished.after
    seconds = (finished.device_time.seconds - after.scoring_seconds + before.scoring_seconds) / len(values.steps)
    flops = [
        count
        for count, tokens in zip(meter.step_flops(values.plan.sample_ids), finished.header.tokens, strict=True)
        if tokens
    ]
    memory = used_bytes(meter.device)
    step_tokens = [tokens for tokens in finished.header.tokens if tokens]
    step_samples = (values.plan.sample_ids < finished.dummy).sum((1, 2)).tolist()
    step_samples = [n for n, tokens in zip(step_samples, finished.header.tokens, strict=True) if tokens]
    lines, tokens = [], before.tokens
    for place, step in enumerate(values.steps):
        tokens += step_tokens[place]
        lines.append(
            {
                "step": before.step + place,
                "round": before.round,
                "tokens": tokens,
                "loss": _finite(step.loss),
                "lr": finished.rates[place],
                "grad_norm": _finite(step.grad_norm),
                "mean_change": _finite(step.mean_change),
                "first_order": _finite(step.first_order),
                "skipped": bool(getattr(step, "skipped", False)),
                "step_tokens": step_tokens[place],
                "step_samples": step_samples[place],
                "step_seconds": seconds,
                "tokens_per_second": step_tokens[place] / seconds,
                "flops": flops[place],
                "mfu": meter.utilisation(flops[place], seconds),
                "memory_bytes": memory,
            }
        )
    return lines


def bar_info(lines: list[dict[str, Any]], skipped_steps: int) -> dict[str, object]:
    """What a progress bar shows beside a round's last step: its speed is the round's."""
    last, tokens = lines[-1], sum(line["step_tokens"] for line in lines)
    seconds = sum(line["step_seconds"] for line in lines)
    info: dict[str, object] = {"loss": last["loss"], "tok/s": round(tokens / seconds)}
    if last["mfu"] is not None:
        info["MFU"] = f"{sum(line['mfu'] for line in lines) / len(lines):.1%}"
    info["memory"] = size(last["memory_bytes"])
    if skipped_steps:
        info["skipped"] = skipped_steps
    return info


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def round_line(
    finished: Round, values: RoundValues, method: str, state: PoolState, names: Sequence[str], capacity: int
) -> dict[str, Any]:
    """What a round selected, and what the method made of it.

    `cluster` is None where a round is drawn from all of them.
    """
    plan, stats, before, after = values.plan, values.stats, finished.before, finished.after
    slots = plan.sample_ids.flatten()
    ids = slots[slots < finished.dummy].tolist()
    cluster = int(plan.cluster)
    return {
        "round": before.round,
        "step": before.step,
        "method": method,
        "cluster": None if cluster < 0 else cluster,
        "probabilities": plan.probabilities.tolist(),
        "reward": float(stats.reward),
        "reward_raw": float(stats.reward_raw),
        "tokens": after.tokens - before.tokens,
        "response_tokens": int(plan.rows.sum()),
        "waste": float(packing_waste(plan.tokens, capacity)),  # share of the computed token places that are empty
        "selection_seconds": after.selection_seconds - before.selection_seconds,
        "scoring_seconds": after.scoring_seconds - before.scoring_seconds,
        "samples": len(ids),
        "samples_per_task": dict(zip(state.task_names, stats.samples_per_task.tolist(), strict=True)),
        "samples_per_cluster": stats.samples_per_cluster.tolist(),
        "utility_before": float(stats.utility_before),
        "utility_after": float(stats.utility_after),
        "ids": [names[i] for i in ids],
    }
