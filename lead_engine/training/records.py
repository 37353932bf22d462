"""A finished round as lines of metrics.jsonl and selection.jsonl.

These read the device: the loop calls them between rounds, for the round before, whose work is done by then.
"""
from __future__ import annotations

import math
from typing import Any

import torch

from lead_engine.pool.state import PoolState
from lead_engine.training.loop import Round
from lead_kernels import packing_waste


def step_lines(finished: Round) -> list[dict[str, Any]]:
    """One dict per optimizer step. Times are the round's, shared among its steps: a GPU's steps have no end the host could see."""
    values = torch.stack([torch.stack(list(step)) for step in finished.steps]).cpu().tolist()
    before, after = finished.before, finished.after
    seconds = (after.seconds - before.seconds) / len(values)
    step_tokens = [tokens for tokens in finished.header.tokens if tokens]
    step_samples = (finished.plan.sample_ids < finished.dummy).sum((1, 2)).cpu().tolist()
    step_samples = [n for n, tokens in zip(step_samples, finished.header.tokens, strict=True) if tokens]
    lines, tokens = [], before.tokens
    for place, (loss, norm, change, first_order) in enumerate(values):
        tokens += step_tokens[place]
        lines.append(
            {
                "step": before.step + place,
                "round": before.round,
                "tokens": tokens,
                "loss": loss,
                "lr": finished.rates[place],
                "grad_norm": norm,
                "mean_change": change,
                "first_order": None if math.isnan(first_order) else first_order,
                "step_tokens": step_tokens[place],
                "step_samples": step_samples[place],
                "step_seconds": seconds,
                "tokens_per_second": step_tokens[place] / seconds,
            }
        )
    return lines


def round_line(finished: Round, method: str, state: PoolState, names: list[str], capacity: int) -> dict[str, Any]:
    """What a round selected, and what the bandit made of it."""
    ids = finished.plan.sample_ids.flatten().cpu()
    ids = ids[ids < finished.dummy].tolist()
    stats = finished.stats
    return {
        "round": finished.before.round,
        "step": finished.before.step,
        "method": method,
        "cluster": int(finished.plan.cluster),
        "probabilities": finished.plan.probabilities.cpu().tolist(),
        "reward": float(stats.reward),
        "reward_raw": float(stats.reward_raw),
        "tokens": finished.after.tokens - finished.before.tokens,
        "waste": float(packing_waste(finished.plan.tokens, capacity)),  # share of the computed token places that are empty
        "samples": len(ids),
        "samples_per_task": dict(zip(state.task_names, stats.samples_per_task.tolist(), strict=True)),
        "samples_per_cluster": stats.samples_per_cluster.tolist(),
        "utility_before": float(stats.utility_before),
        "utility_after": float(stats.utility_after),
        "ids": [names[i] for i in ids],
    }
