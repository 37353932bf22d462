"""The contenders of bench/training.py: a process each, which builds its trainer once and trains steps on request.

A contender's whole loop is timed as its users have it: data loading, forward, backward, clipping, AdamW, scheduler,
logging of the loss. All read the same steps: steps.pt holds the ids of the samples of every step's micro-batches.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training_link import CUDA, Link, Spec, peak_bytes, seconds


def main() -> None:
    spec, link = Spec(**json.loads(sys.argv[1])), Link()
    torch.set_num_threads(1)
    if spec.kind in ("lead", "random"):
        engine(spec, link)
    else:
        from training_trainers import trainer

        trainer(spec, link)


def engine(spec: Spec, link: Link) -> None:
    from lead_engine.config import BatchConfig, OptimizerConfig, RuntimeConfig, SelectionConfig, TrainConfig
    from lead_engine.config.methods import method_options
    from lead_engine.training.build import build
    from lead_engine.training.distributed import process_group
    from lead_engine.training.flops import ModelFlops, Peak
    from lead_engine.training.records import Meter, round_line, step_lines
    from lead_engine.training.rounds import Progress

    before = peak_bytes()
    options = {"max_visits": 1000} if spec.kind == "lead" else {}  # so that no sample is used up
    config = TrainConfig(
        pool=Path(spec.data, "pool"),
        model=str(Path(spec.data, "model")),
        out=Path("unused"),
        method=spec.kind,
        batch=BatchConfig(spec.capacity, spec.micro_batches),
        selection=SelectionConfig(round_steps=spec.round_steps),
        options=method_options(spec.kind, options),
        optimizer=OptimizerConfig(lr=spec.lr, schedule="constant", warmup=0.0),
        runtime=RuntimeConfig(precision=spec.precision, compile=spec.compiled),
    )
    with process_group() as ranks:
        session = build(config, ranks)
        running, state = session.trainer, session.state
        meter = Meter.of(running.store, ModelFlops.of(running.model), Peak(None, ""), 1)
        names = [str(i) for i in range(running.store.num_samples)]
        trained: list[int] = []
        train_what_all_train(running, torch.load(Path(spec.data, "steps.pt")), spec, trained)
        running.budget = 1 << 60
        rounds = running.rounds(Progress())
        waiting, losses = [], []

        def rounds_of(count: int) -> Callable[[], None]:
            return lambda: [one_round() for _ in range(count)]

        def one_round() -> None:
            finished = next(rounds)
            if waiting:  # logged a round later, as the engine does
                last = waiting.pop()
                losses[:] = [line["loss"] for line in step_lines(last, last.values.read(), meter)]
                round_line(last, last.values.read(), spec.kind, state, names, spec.capacity)
            waiting.append(finished)

        link.tell(ready=True, before=before)
        while (order := link.order())[0] != "stop":
            if order[0] == "run":
                count = max(1, int(order[1]) // spec.round_steps)
                trained.clear()
                took = seconds(rounds_of(count))
                link.tell(seconds=took, steps=count * spec.round_steps, tokens=sum(trained), losses=losses)
            else:
                link.tell(synchronisations=profiled_rounds(running, one_round, Path(order[1])))
        link.tell(peak=peak_bytes())


def train_what_all_train(running, steps, spec: Spec, counted: list[int]) -> None:
    """The selector still plans every round by its method; what is trained are the steps that all contenders train.

    Every round's tokens are added to `counted`.
    """
    pack_its_own, samples = running.selector.pack, running.selector.samples
    ids = steps["ids"].to(samples.device)  # [steps, micro-batches, slots]
    sizes = [steps[name].to(samples.device) for name in ("tokens", "rows")]
    numbers = itertools.count()

    def pack(*arguments: Any) -> Any:
        own = pack_its_own(*arguments)
        low = next(numbers) * spec.round_steps % len(ids)
        trained, tokens, rows = (x[low : low + spec.round_steps] for x in (ids, *sizes))
        counted.append(int(steps["tokens"][low : low + spec.round_steps].sum()))
        return own._replace(
            sample_ids=trained,
            tokens=tokens,
            rows=rows,
            utility=samples.utility[trained],
            visits=samples.visits[trained],
        )

    running.selector.pack = pack


def profiled_rounds(running, one_round: Callable[[], None], trace: Path) -> list[str]:
    """What makes the host wait inside two rounds, by torch's profiler; the trace goes to a file."""
    from round_profile import mark_rounds, synchronisations
    from torch.profiler import ProfilerActivity, profile

    mark_rounds(running)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]) as profiler:
        one_round()
        one_round()
    profiler.export_chrome_trace(str(trace))
    return synchronisations(json.loads(trace.read_text())["traceEvents"])


if __name__ == "__main__":
    main()
