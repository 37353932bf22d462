"""A finished round as lines of metrics.jsonl and selection.jsonl."""
from __future__ import annotations

import math
from typing import Any

from lead_engine.pool.state import PoolState
from lead_engine.training.loop import Round, RoundValues
from lead_kernels import packing_waste


def step_lines(finished: Round, values: RoundValues) -> list[dict[str, Any]]:
    """One dict per optimizer step. Times are the round's, shared among its steps: a GPU's steps have no end the host could see."""
    before, after = finished.before, finished.after
    seconds = (after.seconds - before.seconds - after.scoring_seconds + before.scoring_seconds) / len(values.steps)
    step_tokens = [tokens for tokens in finished.header.tokens if tokens]
    step_samples = (values.plan.sample_ids < finished.dummy).sum((1, 2)).tolist()
    step_samples = [n for n, tokens in zip(step_samples, finished.header.tokens, strict=True) if tokens]
    lines, tokens = [], before.tokens
    for place, step in enumerate(values.steps):
        tokens += step_tokens[place]
        first_order = float(step.first_order)
        lines.append(
            {
                "step": before.step + place,
                "round": before.round,
                "tokens": tokens,
                "loss": float(step.loss),
                "lr": finished.rates[place],
                "grad_norm": float(step.grad_norm),
                "mean_change": float(step.mean_change),
                "first_order": None if math.isnan(first_order) else first_order,
                "step_tokens": step_tokens[place],
                "step_samples": step_samples[place],
                "step_seconds": seconds,
                "tokens_per_second": step_tokens[place] / seconds,
            }
        )
    return lines


def round_line(finished: Round, values: RoundValues, method: str, state: PoolState, names: list[str], capacity: int) -> dict[str, Any]:
    """What a round selected, and what the method made of it. `cluster` is None where a round is drawn from all of them."""
    plan, stats, before, after = values.plan, values.stats, finished.before, finished.after
    ids = plan.sample_ids.flatten()
    ids = ids[ids < finished.dummy].tolist()
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
