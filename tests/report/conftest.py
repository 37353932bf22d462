"""Run folders with plausible contents, made without training; tests reach them through the fixture `synthetic`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lead_engine.config import TrainConfig, to_dict

TASKS = ("gsm8k", "cot_creak", "openstax_glossary", "gpteacher_roleplay", "oasst1")
SHARES = (0.35, 0.25, 0.2, 0.15, 0.05)
CLUSTERS = 7
POOL = 3000
POOL_TOKENS = 600_000
STEP_TOKENS = 1000


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """This module: make_run, make_evaluation, make_study and the constants they use."""
    return sys.modules[__name__]


def make_run(
    folder: Path,
    *,
    method: str = "lead",
    budget: float = 0.05,
    seed: int = 0,
    finished: bool = True,
    evaluated: bool = True,
    extra: float = 0.0,
) -> Path:
    """A run folder as `train` leaves it and, with `evaluated`, `eval`; `extra` lowers its held-out loss."""
    rng = np.random.default_rng([seed, len(method), int(1000 * budget)])
    folder.mkdir(parents=True)
    spent = {} if method == "full" else {"budget": budget}
    config = TrainConfig(pool=Path("prepared"), model="base", out=folder, method=method, seed=seed, **spent)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    share = 1.0 if method == "full" else budget
    steps = max(4, int(share * POOL_TOKENS / STEP_TOKENS))
    per_round = config.selection.round_steps
    task, cluster = rng.choice(len(TASKS), POOL, p=SHARES), rng.integers(CLUSTERS, size=POOL)
    initial = rng.gamma(6, 0.5, POOL) + 0.15 * cluster
    visits, final, weights = np.zeros(POOL, int), initial.copy(), np.zeros(CLUSTERS)
    metrics, rounds = [], []
    for first in range(0, steps, per_round):
        p = 0.9 * np.exp(weights) / np.exp(weights).sum() + 0.1 / CLUSTERS if method == "lead" else np.ones(1)
        arm = int(rng.choice(len(p), p=p))
        eligible = (
            np.flatnonzero((visits < 4) & (cluster == arm))
            if method == "lead"
            else np.flatnonzero(visits == visits.min())
        )
        order = eligible[np.argsort(-final[eligible])] if method == "lead" else rng.permutation(eligible)
        ids = order[: 5 * per_round]
        before = final[ids].mean()
        final[ids] = 0.9 * final[ids] * rng.uniform(0.6, 1.0, len(ids)) + 0.1 * final[ids]
        visits[ids] += 1
        reward = before - final[ids].mean()
        if method == "lead":
            weights[arm] += 0.1 / CLUSTERS * reward / p[arm]
        for step in range(first, min(first + per_round, steps)):
            done = (step + 1) / steps
            loss = (2.9 if method == "lead" else 2.4) - 0.5 * (1 - np.exp(-4 * done)) + rng.normal(0, 0.12)
            metrics.append(
                {
                    "step": step,
                    "round": first // per_round,
                    "tokens": (step + 1) * STEP_TOKENS,
                    "loss": loss,
                    "lr": 2e-4 * min(1, done / 0.05) * (0.55 + 0.45 * np.cos(np.pi * done)),
                    "grad_norm": rng.gamma(8, 0.1) + np.exp(-10 * done),
                    "mean_change": -0.02,
                    "first_order": -0.02 if step % 8 == 0 else None,
                    "step_tokens": STEP_TOKENS,
                    "step_samples": 5,
                    "step_seconds": 0.1,
                    "tokens_per_second": 10 * STEP_TOKENS,
                }
            )
        rounds.append(
            {
                "round": first // per_round,
                "step": first,
                "method": method,
                "cluster": arm,
                "probabilities": p.tolist(),
                "reward": float(np.clip(reward, -1, 1)),
                "reward_raw": float(reward),
                "tokens": per_round * STEP_TOKENS,
                "samples": len(ids),
                "samples_per_task": {name: int((task[ids] == i).sum()) for i, name in enumerate(TASKS)},
                "samples_per_cluster": np.bincount(cluster[ids], minlength=CLUSTERS).tolist(),
                "utility_before": float(before),
                "utility_after": float(final[ids].mean()),
                "ids": [f"s{i}" for i in ids],
            }
        )
    for name, lines in (("metrics.jsonl", metrics), ("selection.jsonl", rounds)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        np.savez(folder / "utility.npz", initial=initial, final=final, visits=visits, cluster=cluster, task=task)
        summary = {
            "method": method,
            "seed": seed,
            "budget": budget,
            "tokens_trained": steps * STEP_TOKENS,
            "samples_trained": int(visits.sum()),
            "distinct_samples": int((visits > 0).sum()),
            "steps": steps,
            "seconds": 0.1 * steps,
            "selection_seconds": 0.01 * steps,
            "scoring_seconds": 0.02 * steps if method == "lead" else 0.0,
            "pool_tokens": POOL_TOKENS,
            "pool_samples": POOL,
            "task_names": list(TASKS),
            "world_size": 1,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    if evaluated:
        gain = {"lead": 0.9, "random": 0.8, "full": 1.2}[method] * share**0.1
        make_evaluation(folder / "eval", gain + extra + rng.normal(0, 0.01))
    return folder


def add_heldout(run: Path, tasks: tuple[str, ...] = TASKS, every: int = 4) -> list[dict]:
    """Evaluations while a run of `make_run` trained; one of them is not finite."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = []
    for step in range(0, len(metrics) + 1, every):
        losses = {name: 2.6 + 0.2 * i - 0.8 * (1 - np.exp(-step / (6 + 4 * i))) for i, name in enumerate(tasks)}
        values = {
            name: {"loss": float(losses[name]), "samples": 20, "tokens": 900 - 50 * i} for i, name in enumerate(tasks)
        }
        tokens = [task["tokens"] for task in values.values()]
        each = list(losses.values())
        loss = {"overall": float(np.average(each, weights=tokens)), "macro": float(np.mean(each)), "tasks": values}
        lines.append({"step": step, "round": step // 4, "tokens": 1000 * step, "loss": loss, "lowest": True})
    unknown = {name: {**task, "loss": None} for name, task in values.items()}
    lines[2]["loss"] = {"overall": None, "macro": None, "tasks": unknown}
    (run / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def make_evaluation(folder: Path, gain: float) -> Path:
    """An eval folder of a model whose loss is `gain` below the base's."""
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True)
    samples = 40
    losses = {name: float(2.0 + 0.3 * i - gain * (1 + 0.1 * i)) for i, name in enumerate(TASKS)}
    tokens = rng.integers(10, 80, (len(TASKS), samples))
    nll = np.array(list(losses.values()))[:, None] + rng.normal(0, 0.3, (len(TASKS), samples))
    tasks = {
        name: {"loss": float(np.average(nll[i], weights=tokens[i])), "samples": samples, "tokens": int(tokens[i].sum())}
        for i, name in enumerate(TASKS)
    }
    loss = {
        "overall": float(np.average(nll, weights=tokens)),
        "macro": float(np.mean([task["loss"] for task in tasks.values()])),
        "tasks": tasks,
    }
    names = np.repeat(TASKS, samples).tolist()
    columns = {
        "id": [f"h{i}" for i in range(len(names))],
        "dataset": names,
        "nll": nll.ravel(),
        "tokens": tokens.ravel(),
    }
    pq.write_table(pa.table(columns), folder / "samples.parquet")
    (folder / "eval.json").write_text(json.dumps({"loss": loss, "exact_match": None, "problems": {}, "options": {}}))
    return folder


def make_study(
    folder: Path, *, seeds: int = 3, budgets: tuple[float, ...] = (0.025, 0.05, 0.1), variants: int = 0
) -> Path:
    """A folder as `compare` leaves it: full, lead, random, and so many variants of lead."""
    for seed in range(seeds):
        make_run(folder / "runs" / f"full-100pct-s{seed}", method="full", seed=seed)
        for budget in budgets:
            for method in ("lead", "random"):
                make_run(
                    folder / "runs" / f"{method}-{100 * budget:g}pct-s{seed}", method=method, budget=budget, seed=seed
                )
            for i in range(variants):
                name = f"lead-variant-{chr(ord('a') + i)}"
                make_run(
                    folder / "runs" / f"{name}-{100 * budget:g}pct-s{seed}",
                    budget=budget,
                    seed=seed,
                    extra=0.02 * i - 0.2,
                )
    make_evaluation(folder / "base", 0.0)
    names = ["lead", *(f"lead-variant-{chr(ord('a') + i)}" for i in reversed(range(variants))), "random", "full"]
    interval = {"mean": -0.1, "low": -0.15, "high": -0.05, "n": seeds}
    contrast = {
        "a": "lead",
        "b": names[1],
        "budgets": list(budgets),
        "pooled": len(budgets) > 1,
        "seeds": list(range(seeds)),
    }
    results = {
        "reference": "random",
        "runs": [{"variant": name} for name in names],
        "comparisons": [contrast | dict.fromkeys(("overall", "macro", "per_sample"), interval)] if variants else [],
        "verdicts": ["lead against random at 5 % of the pool: overall better (-0.08 [-0.1, -0.06])"],
        "warnings": [],
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder
