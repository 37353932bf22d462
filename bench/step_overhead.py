"""What LEAD adds to a training step: the same loop, model, samples and step sizes, with and without its work.

    python bench/step_overhead.py --pool PREPARED --model MODEL

Three engines take turns, a round each, in an order that rotates, so that whatever else the machine does hits all alike:
`random` (loss only), `lead` with loss_change none (bandit, top-k, U), and `lead` as by default (also the gradient
sketch and its calibration). All train the same samples in the same micro-batches: `random`'s plan is given to all
three, while each still makes its own. The result is the ratio of medians over rounds, with the quartiles of the paired
ratios; on a CPU of the process's own processor time too, which does not count what other processes take.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from machine import arguments, write

from lead_engine.config import BatchConfig, OptimizerConfig, RuntimeConfig, SelectionConfig, TrainConfig
from lead_engine.config.methods import method_options
from lead_engine.selection.plan import Plan
from lead_engine.training.build import build
from lead_engine.training.distributed import process_group
from lead_engine.training.rounds import read_header
from lead_engine.training.trainer import Trainer

VARIANTS = {"random": ("random", "none"), "lead, no loss change": ("lead", "none"), "lead": ("lead", "inner")}


def one_round(trainer: Trainer, shared: Plan, number: int, step: int, lr: float) -> tuple[float, float]:
    """Seconds of the clock and of the processor for a round that plans for itself but trains `shared`."""
    started, used = time.perf_counter(), time.process_time()
    own = trainer.selector.plan(number, 1 << 40)
    plan = shared._replace(cluster=own.cluster, probabilities=own.probabilities)
    header = read_header(plan, trainer.selector)
    for place in range(trainer.selector.layout.steps):
        trainer.train_step(plan, header, place, step + place, lr)
    trainer.selector.learn(plan)
    trainer.loss_change.finish_round(plan.cluster)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - used


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, object]]:
    """Of seconds a token, by round: each variant against `random`."""
    base = seconds["random"]
    return {
        name: {
            "microseconds_per_token": 1e6 * statistics.median(values),
            "ratio_of_medians": statistics.median(values) / statistics.median(base),
            "paired_ratio_quartiles": statistics.quantiles([a / b for a, b in zip(values, base, strict=True)], n=4),
        }
        for name, values in seconds.items()
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--round-steps", type=int, default=8)
    flags = parser.parse_args()
    with process_group() as ranks:
        running = {}
        for name, (method, change) in VARIANTS.items():
            config = TrainConfig(
                pool=flags.pool,
                model=flags.model,
                out=Path("unused"),
                method=method,
                batch=BatchConfig(capacity=flags.capacity),
                selection=SelectionConfig(round_steps=flags.round_steps),
                options=method_options(
                    method, {"loss_change": change, "max_visits": 1000} if method == "lead" else None
                ),
                optimizer=OptimizerConfig(lr=flags.lr),
                runtime=RuntimeConfig(precision=flags.precision),
            )
            running[name] = build(config, ranks).trainer
        clock: dict[str, list[float]] = {name: [] for name in VARIANTS}
        processor: dict[str, list[float]] = {name: [] for name in VARIANTS}
        names, step = list(VARIANTS), 0
        for turn in range(flags.rounds + 2):
            shared = running["random"].selector.plan(turn, 1 << 40)
            for name in names[turn % 3 :] + names[: turn % 3]:
                took = one_round(running[name], shared, turn, step, flags.lr)
                if turn >= 2:  # the first rounds warm caches up
                    for kind, value in zip((clock, processor), took, strict=True):
                        kind[name].append(value / int(shared.tokens.sum()))
            step += flags.round_steps
    setting = {
        "model": flags.model,
        "capacity": flags.capacity,
        "rounds": flags.rounds,
        "round_steps": flags.round_steps,
    }
    result = (
        {"result": ratios(clock)}
        if torch.cuda.is_available()
        else {"result": ratios(clock), "processor_time": ratios(processor)}
    )
    write("step_overhead", {**setting, "precision": flags.precision, **result}, flags.out)


if __name__ == "__main__":
    main()
