"""IDU fidelity: how well U, as LEAD believes in it, ranks the pool by its true loss while the model learns.

    python bench/study/utility_fidelity.py --pool PREPARED --ngram-pool PREPARED_BY_NGRAMS --model MODEL

One run a seed trains what `--method lead` with the default options picks. Beside its own, shadow selectors are told the
same losses and changes, and differ in what they believe of samples that were not trained yet:

  initial          the base model's loss (LEAD as published)
  drift            that, moved by how far the sample's cluster and task have come
  estimate         the running loss of its cluster and task alone: no pass over the pool for U
  ngram            the loss under counts of n-grams (`prepare --scoring ngram`; clusters are its own too): no pass
  ngram, drift     that, moved
  rescored         the true losses at the last point: what a pass over the pool at every point would give

At points of the run the true loss of `--sample` samples of the pool (drawn at random; all, if it is not larger) is
measured, and compared: Spearman's rank correlation over all of them and over the unseen ones, and the mean of U - loss.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import write

from lead_engine.config import BatchConfig, OptimizerConfig, TrainConfig
from lead_engine.pool.state import PoolState
from lead_engine.selection.selector import Selector
from lead_engine.training.build import TrainingSetup, build
from lead_engine.training.distributed import process_group
from lead_engine.training.rounds import Progress

BELIEFS = {
    "initial": ("model", "initial"),
    "drift": ("model", "drift"),
    "estimate": ("model", "estimate"),
    "ngram": ("ngram", "initial"),
    "ngram, drift": ("ngram", "drift"),
}


def shadows(session: TrainingSetup, ngram: Path | None) -> dict[str, Selector]:
    """Selectors that plan nothing, one for each belief."""
    store, found = session.trainer.store, {}
    states = {"model": session.state, "ngram": PoolState.load(ngram, store.num_samples) if ngram else None}
    for name, (judge, unseen) in BELIEFS.items():
        if states[judge] is not None:
            options = replace(session.config.options, unseen=unseen)
            found[name] = Selector(
                states[judge],
                store.lengths,
                store.response_rows,
                method="lead",
                options=options,
                layout=session.trainer.selector.layout,
                seed=session.config.seed,
                device=store.device,
            )
            estimates = found[name].method.unseen
            if estimates is not None:
                estimates.optimism = 0.0  # a belief, not a bonus
    return found


def believed(selector: Selector) -> Tensor:
    unseen = selector.method.unseen
    return (selector.samples.utility if unseen is None else unseen.utility())[:-1]


def compare(
    selectors: dict[str, Selector], ids: Tensor, loss: Tensor, last: Tensor | None
) -> dict[str, dict[str, float]]:
    beliefs = {name: believed(selector)[ids].double().numpy() for name, selector in selectors.items()}
    if last is not None:
        beliefs["rescored"] = last.double().numpy()
    true = loss.double().numpy()
    unseen = (next(iter(selectors.values())).samples.visits[:-1][ids] == 0).numpy()
    return {
        name: {
            "spearman": _correlation(values, true),
            "spearman_unseen": _correlation(values[unseen], true[unseen]),
            "mean_error": float(np.mean(values - true)),
            "mean_error_unseen": float(np.mean((values - true)[unseen])),
            "rmse_unseen": float(np.sqrt(np.mean((values - true)[unseen] ** 2))),
        }
        for name, values in beliefs.items()
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; 0 where one of them does not vary: it ranks nothing."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def follow(config: TrainConfig, ngram: Path | None, points: list[float], sample: int) -> list[dict[str, Any]]:
    with process_group() as ranks:
        session = build(config, ranks)
        trainer, selectors = session.trainer, shadows(session, ngram)
        observe = trainer.selector.observe

        def tell_all(ids: Tensor, loss: Tensor, change: Tensor) -> None:
            for selector in selectors.values():
                selector.observe(ids, loss, change)
            observe(ids, loss, change)

        trainer.selector.observe = tell_all
        generator = torch.Generator().manual_seed(config.seed)
        ids = torch.randperm(trainer.store.num_samples, generator=generator)[:sample].sort().values
        rows, last, waiting = [], None, list(points)
        progress = Progress()
        for finished in _rounds(trainer, progress):
            share = finished / trainer.budget
            if waiting and share >= waiting[0]:
                waiting.pop(0)
                loss = trainer.scorer.given(ids).cpu()
                trained = int((trainer.selector.samples.visits[:-1] > 0).sum())
                beliefs = compare(selectors, ids, loss, last)
                rows.append(
                    {
                        "share": round(share, 3),
                        "samples_trained": trained,
                        "true_loss": float(loss.mean()),
                        "beliefs": beliefs,
                    }
                )
                last = loss
                short = {
                    name: (round(v["spearman"], 3), round(v["mean_error_unseen"], 2)) for name, v in beliefs.items()
                }
                print(f"seed {config.seed}, {share:.0%}:", short, flush=True)
        return rows


def _rounds(trainer, progress: Progress):
    """Tokens trained: before the first round, and after each."""
    yield 0
    for finished in trainer.rounds(progress):
        yield finished.after.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--ngram-pool", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--points", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.99])
    parser.add_argument("--sample", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    runs = {}
    for seed in flags.seeds:
        config = TrainConfig(
            pool=flags.pool,
            model=flags.model,
            out=Path("unused"),
            budget=flags.budget,
            seed=seed,
            batch=BatchConfig(capacity=flags.capacity),
            optimizer=OptimizerConfig(lr=flags.lr),
        )
        runs[seed] = follow(config, flags.ngram_pool, sorted(flags.points), flags.sample)
    result = {"budget": flags.budget, "sample": flags.sample, "means": means(list(runs.values())), "runs": runs}
    write("utility_fidelity", result, flags.out)


def means(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Over seeds, a line for each point."""
    found = []
    for rows in zip(*runs, strict=True):
        first = rows[0]["beliefs"]
        beliefs = {
            name: {key: float(np.mean([row["beliefs"][name][key] for row in rows])) for key in first[name]}
            for name in first
        }
        found.append(
            {
                "share": rows[0]["share"],
                "true_loss": float(np.mean([row["true_loss"] for row in rows])),
                "beliefs": beliefs,
            }
        )
    return found


if __name__ == "__main__":
    main()
