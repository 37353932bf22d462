"""How well the engine's own dL predicts what a step does to its samples.

    python bench/loss_change_fidelity.py --pool PREPARED --model MODEL

Trains `lead` as a user would; the samples of every step are scored before and after it by forward passes of their own,
and the change seen is compared with the dL that the selector was given: Spearman and Pearson correlation within a step,
and over all steps the slope and the error of "loss after the step" with and without dL. The learning rate is constant.
Samples are LEAD's own choice, or, where a run's name says so, uniformly random ones: LEAD's are the extremes of their
cluster, which is harder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import arguments, write
from scipy.stats import spearmanr

from lead_engine.config import BatchConfig, LoraConfig, OptimizerConfig, RuntimeConfig, SelectionConfig, TrainConfig
from lead_engine.config.methods import method_options
from lead_engine.selection.selector import Selector
from lead_engine.training.build import build
from lead_engine.training.distributed import process_group
from lead_engine.training.rounds import read_header
from lead_engine.training.trainer import Trainer

RUNS = {
    "sketch q = 64, full": ({}, {}, "lead"),
    "sketch q = 128, full": ({"sketch_dim": 128}, {}, "lead"),
    "exact, full": ({"sketch_dim": 0}, {}, "lead"),
    "paper, full": ({"loss_change": "paper", "draw": "cluster"}, {}, "lead"),
    "sketch q = 64, LoRA": ({}, {"rank": 8}, "lead"),
    "sketch q = 64, full, random samples": ({}, {}, "random"),
    "exact, full, random samples": ({"sketch_dim": 0}, {}, "random"),
    "sketch q = 64, LoRA, random samples": ({}, {"rank": 8}, "random"),
}


@torch.no_grad()
def losses(trainer: Trainer, plan, header, step: int) -> torch.Tensor:
    capacity, found = trainer.selector.layout.capacity, []
    for ids, rows in zip(plan.sample_ids[step], header.rows[step], strict=True):
        found.append(trainer.model(trainer.store.batch(ids, capacity=capacity, num_rows=rows)).sample_nll)
    return torch.stack(found)


def follow(trainer: Trainer, planner: Selector, lr: float, rounds: int, settle: int) -> dict[str, float]:
    """Train the plans of `planner` (the engine's own selector, or another); compare each step's dL with what it did."""
    given: list[torch.Tensor] = []
    observe = trainer.selector.observe

    def keep(ids: torch.Tensor, loss: torch.Tensor, change: torch.Tensor) -> None:
        given.append(change.clone())
        observe(ids, loss, change)
        if planner is not trainer.selector:
            planner.observe(ids, loss, change)

    trainer.selector.observe = keep
    predicted, seen, rank_correlation, linear = [], [], [], []
    global_step = 0
    for number in range(rounds):
        plan = planner.plan(number, 1 << 40)
        header = read_header(plan, trainer.selector)
        for step in range(trainer.selector.layout.steps):
            trained = plan.sample_ids[step] < trainer.selector.samples.num_samples
            before = losses(trainer, plan, header, step)
            trainer.train_step(plan, header, step, global_step, lr)
            global_step += 1
            if number < settle:  # the optimizer's moments
                continue
            change = (losses(trainer, plan, header, step) - before)[trained].numpy()
            guess = given[-1][trained].numpy()
            predicted.append(guess)
            seen.append(change)
            if np.ptp(guess) > 0:
                rank_correlation.append(spearmanr(guess, change)[0])
                linear.append(np.corrcoef(guess, change)[0, 1])
        planner.learn(plan)
        trainer.loss_change.finish_round(plan.cluster)
    p, a = np.concatenate(predicted), np.concatenate(seen)
    return {
        "spearman_within_step": float(np.mean(rank_correlation)) if rank_correlation else None,
        "pearson_within_step": float(np.mean(linear)) if linear else None,
        "pearson_pooled": float(np.corrcoef(p, a)[0, 1]),
        "slope": float((p * a).sum() / (p * p).sum()),
        "rmse_with": float(((a - p) ** 2).mean() ** 0.5),
        "rmse_without": float((a**2).mean() ** 0.5),
        "steps": len(predicted),
        "samples": len(p),
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", default="", help="runs whose name holds this text")
    parser.add_argument("--slots", type=int, default=16, help="samples a step")
    flags = parser.parse_args()
    result = {}
    runs = {name: run for name, run in RUNS.items() if flags.only in name}
    with process_group() as ranks:
        for name, (own, lora, chosen) in runs.items():
            config = TrainConfig(
                pool=flags.pool,
                model=flags.model,
                out=Path("unused"),
                batch=BatchConfig(capacity=flags.capacity, slots=flags.slots),
                selection=SelectionConfig(round_steps=4),
                options=method_options("lead", own),
                optimizer=OptimizerConfig(lr=4 * flags.lr if lora else flags.lr),
                lora=LoraConfig(**lora),
                runtime=RuntimeConfig(precision=flags.precision),
            )
            trainer = build(config, ranks).trainer
            other = build(replace(config, method="random", options=method_options("random")), ranks).trainer.selector
            planner = trainer.selector if chosen == "lead" else other
            result[name] = follow(trainer, planner, config.optimizer.lr, flags.rounds, settle=2)
            print(name, result[name], flush=True)
    write(
        "loss_change_fidelity",
        {"model": flags.model, "lr": flags.lr, "precision": flags.precision, "result": result},
        flags.out,
    )


if __name__ == "__main__":
    main()
