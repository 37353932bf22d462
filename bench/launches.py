"""What a step launches, and what CUDA graphs would save: of a micro-batch, and of the selection's own work in a round.

    python bench/launches.py --pool PREPARED --model MODEL

Counted of one round, with blocks as they are and compiled: operators that PyTorch dispatches, kernels that the host
launches (where there is a GPU), and memory that the allocator took from the device, which a round should not do. Then a
micro-batch of one shape, forward and backward, and the selection's plan, observations and end of round are captured as
a CUDA graph each. What cannot be captured is a result, with its reason; without a GPU nothing can be.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import arguments, write
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lead_engine.config import BatchConfig, OptimizerConfig, RuntimeConfig, SelectionConfig, TrainConfig
from lead_engine.model.load import build_model
from lead_engine.training.build import build
from lead_engine.training.distributed import Ranks, process_group
from lead_engine.training.rounds import read_header
from lead_engine.training.trainer import Trainer

CUDA = torch.cuda.is_available()
LAUNCHES = ("LaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaGraphLaunch")


class Operators(TorchDispatchMode):
    """Counts what reaches PyTorch's dispatcher; one of ours counts once, whatever it launches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(run: Callable[[], object]) -> int:
    with Operators() as counted:
        run()
    return counted.count


def launches(run: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that the host starts, off a trace of torch's profiler; None without a GPU."""
    if not CUDA:
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    return sum(any(part in name for part in LAUNCHES) for name in names)


def allocations() -> dict[str, int] | None:
    """How often the allocator has asked the device for memory so far, and how often it had to give some back first."""
    if not CUDA:
        return None
    stats = torch.cuda.memory_stats()
    return {"segments": stats["segment.all.allocated"], "retries": stats["num_alloc_retries"]}


def since(before: dict[str, int] | None) -> dict[str, int] | None:
    now = allocations()
    return now and {name: now[name] - before[name] for name in now}


def attempt(what: Callable[[], dict[str, Any]], failure: str) -> dict[str, Any]:
    """Its result, or under `failure` the reason why there is none: what fails here must not lose the others."""
    try:
        return what()
    except Exception as error:
        if CUDA:  # a capture that failed leaves an error behind, which the next call would report as its own
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize()
        return {failure: f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """The median, of the clock."""
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return 1e3 * statistics.median(taken)


def as_graph(run: Callable[[], object]) -> dict[str, Any]:
    """Run some times on a side stream, capture once, and time both ways. Raises whatever the capture raises."""
    if not CUDA:
        raise RuntimeError("no CUDA device")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return {"as it is, ms": milliseconds(run), "as a graph, ms": milliseconds(graph.replay)}


def config_of(flags: Any, compiled: bool) -> TrainConfig:
    return TrainConfig(
        pool=flags.pool,
        model=flags.model,
        out=Path("unused"),
        batch=BatchConfig(capacity=flags.capacity),
        selection=SelectionConfig(round_steps=flags.round_steps),
        options={"max_visits": 1000},
        optimizer=OptimizerConfig(lr=flags.lr),
        runtime=RuntimeConfig(precision=flags.precision, compile=compiled),
    )


def selection(trainer: Trainer, number: int) -> Callable[[], object]:
    """The selection's work of round `number`: plan, observe losses, learn from them; the model does nothing."""
    shape = trainer.selector.layout
    loss = torch.ones(shape.micro_batches, shape.slots, device=trainer.device)
    change = torch.full_like(loss, -0.1)
    skip = torch.zeros((), dtype=torch.bool, device=trainer.device)

    def run() -> None:
        plan = trainer.selector.plan(number, 1 << 40)
        trainer.selector.sizes(plan)
        for step in range(shape.steps):
            trainer.selector.observe(trainer.selector.bar(plan.sample_ids[step], loss, skip), loss, change)
        trainer.selector.learn(plan)

    return run


def count_round(flags: Any, ranks: Ranks, compiled: bool) -> dict[str, Any]:
    """Of the third round: what it dispatches, launches and allocates, a step and for the selection."""
    trainer = build(config_of(flags, compiled), ranks).trainer
    steps, done = trainer.selector.layout.steps, 0

    def one_round(number: int) -> None:
        plan = trainer.selector.plan(number, 1 << 40)
        header = read_header(plan, trainer.selector)
        for step in range(steps):
            trainer.train_step(plan, header, step, number * steps + step, flags.lr)
        trainer.selector.learn(plan)
        trainer.loss_change.finish_round(plan.cluster)

    for number in range(2):
        one_round(number)
        done += 1
    before = allocations()
    one_round(done)
    taken = since(before)
    found = {
        "launches a step": (count := launches(lambda: one_round(done + 1))) and count / steps,
        "launches of a round's selection": launches(selection(trainer, done + 2)),
        "operators of a round's selection": operators(selection(trainer, done + 3)),
        "taken from the device in a round": taken,
    }
    if not compiled:  # in compiled code there are none to count
        found["operators a step"] = operators(lambda: one_round(done + 4)) / steps
    return found


def micro_batch(flags: Any, ranks: Ranks, sharded: bool) -> dict[str, Any]:
    """Forward and backward pass of one full micro-batch, always the same."""
    trainer = build(config_of(flags, False), ranks).trainer
    plan = trainer.selector.plan(0, 1 << 40)
    header = read_header(plan, trainer.selector)
    rows, held = header.rows[0][0], header.held[0][0]
    batch = trainer.store.batch(plan.sample_ids[0, 0], capacity=flags.capacity, num_rows=rows)
    model = trainer.model
    if not sharded:
        runtime, longest = RuntimeConfig(precision=flags.precision), model.max_length
        model = build_model(Path(flags.model), device=ranks.device, runtime=runtime, max_length=longest)
    weight = torch.ones((), device=ranks.device) / max(1, rows)

    def run() -> None:
        model(batch, token_weight=weight, held=held).loss.backward()

    return {"launches": launches(run), **as_graph(run)}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--round-steps", type=int, default=8)
    flags = parser.parse_args()
    result: dict[str, Any] = {}

    def keep(name: str, what: Callable[[], dict[str, Any]]) -> None:
        result[name] = attempt(what, "not captured" if "graph" in name else "not counted")
        setting = {"model": flags.model, "capacity": flags.capacity, "round_steps": flags.round_steps}
        write("launches", {**setting, "precision": flags.precision, "result": result}, flags.out)

    with process_group() as ranks:
        keep("eager", lambda: count_round(flags, ranks, False))
        keep("selection, graph", lambda: as_graph(selection(build(config_of(flags, False), ranks).trainer, 0)))
        keep("micro-batch, graph", lambda: micro_batch(flags, ranks, False))
        keep("compiled", lambda: count_round(flags, ranks, True))
        keep("micro-batch under FSDP, graph", lambda: micro_batch(flags, ranks, True))


if __name__ == "__main__":
    main()
