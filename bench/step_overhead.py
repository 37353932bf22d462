"""What LEAD adds to a training step: the same loop, model, samples and step sizes, with and without its work.

    python bench/step_overhead.py --pool PREPARED --model MODEL

Three engines take turns, a round each, in an order that rotates, so that whatever else the machine does hits all alike: `random` (loss only), `lead`
with loss_change none (bandit, top-k, U), and `lead` as by default (also the gradient sketch and its calibration). Time is counted per token trained,
because rounds differ a little in length. The result is the ratio of medians over rounds, with the spread of the paired ratios.
"""
from __future__ import annotations

import statistics
from pathlib import Path

from machine import arguments, write

from lead_engine.config import BatchConfig, OptimizerConfig, RuntimeConfig, SelectionConfig, TrainConfig
from lead_engine.training.checkpoint import Progress
from lead_engine.training.distributed import process_group
from lead_engine.training.train import build

VARIANTS = {"random": ("random", "none"), "lead, no loss change": ("lead", "none"), "lead": ("lead", "inner")}


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
                selection=SelectionConfig(round_steps=flags.round_steps, loss_change=change, max_visits=1000),
                optimizer=OptimizerConfig(lr=flags.lr),
                runtime=RuntimeConfig(precision=flags.precision),
            )
            engine = build(config, ranks).engine
            running[name] = engine.rounds(Progress(), 1 << 60)
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        names = list(VARIANTS)
        for turn in range(flags.rounds + 2):
            for name in names[turn % 3 :] + names[: turn % 3]:
                done = next(running[name])
                if turn >= 2:  # the first rounds warm caches up
                    took = done.after.seconds - done.before.seconds
                    seconds[name].append(took / (done.after.tokens - done.before.tokens))
    base = seconds["random"]
    result = {
        name: {
            "microseconds_per_token": 1e6 * statistics.median(values),
            "ratio_of_medians": statistics.median(values) / statistics.median(base),
            "paired_ratio_quartiles": statistics.quantiles([a / b for a, b in zip(values, base, strict=True)], n=4),
        }
        for name, values in seconds.items()
    }
    write("step_overhead", {"model": flags.model, "capacity": flags.capacity, "rounds": flags.rounds, "precision": flags.precision, "result": result}, flags.out)


if __name__ == "__main__":
    main()
