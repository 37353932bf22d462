"""The LM head's loss, ours and others': time and peak memory, forward and forward + backward, in one run and in turns.

    python bench/head.py [--device cuda|cpu] [--shapes TxHxV ...] [--dtype bf16 fp32] [--threads 1 2]
        [--turns N] [--out FILE.json]

Inputs are the same for all: hidden states partly aligned with their target's row of the weight, so that the mean loss
is that of a language model (1 to 2 nats) and probabilities are as peaked as there: a kernel that skips small
probabilities skips what it would skip in training. The loss is the mean over rows. `forward` is the loss alone, without
gradients; in `forward+backward` gradients are fresh each time.

First every contestant's loss, dh and dW are compared with float64, relative to its norm; one that is far off is not
timed. Then its memory is measured, then all take turns, in an order that rotates; the first turn warms up. Times are
medians with quartiles; ratios are medians of the ratios within a turn, so that other work on the machine hits both
sides. On a GPU, events time a call after the L2 cache has been overwritten.

`products` are the matrix products alone, [T, V] whole: 1 in the forward, 3 in the forward + backward pass, 2 for a
frozen head.

Memory is the peak beyond what was there before the call, gradients included. On a GPU: the allocator's
`max_memory_allocated`. On a CPU: the process's resident high-water mark (/proc/self/clear_refs sets it back), after a
warm-up call and malloc_trim. It counts what libraries allocate beside PyTorch. Against the allocations that PyTorch's
profiler sees it was equal where tensors are large (1610.6 MB both for the naive loss at 4096 x 256 x 32768), and up to
17 MB more at 2048 x 256 x 4096. Linux only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from head_check import admit, best_reference
from head_counts import BUDGET, SHAPES, Machine, Shape, default_rows, expected_seconds, product_flops
from head_measure import Timer, peak_bytes, summary, take_turns
from head_peers import CONTESTANTS, GPU_VARIANTS, PACKAGES, SKETCH, VARIANTS, Inputs, Loss, make_inputs
from head_report import BOTH, FORWARD, plot, table
from machine import RESULTS, write
from torch import Tensor

CPU_SHAPES = (Shape(2048, 256, 4096), Shape(1024, 512, 8192), Shape(4096, 256, 32768))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def forward(loss: Loss, inputs: Inputs) -> Callable[[], Any]:
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()

    def run() -> None:
        with torch.no_grad():
            loss(hidden, weight, inputs.targets)

    return run


def forward_backward(loss: Loss, inputs: Inputs, frozen: bool = False) -> Callable[[], Any]:
    weight = inputs.weight.detach() if frozen else inputs.weight
    return lambda: loss(inputs.hidden, weight, inputs.targets).backward()


def products(inputs: Inputs, logits: Tensor, count: int) -> Callable[[], Any]:
    """The matrix products of the loss and nothing else; `logits` [T, V] is where the first goes."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        if count > 1:
            torch.mm(logits, weight)
        if count > 2:
            torch.mm(logits.T, hidden)

    return run


PRODUCTS = {"1 product": 1, "2 products": 2, "3 products": 3}
FROZEN = "ours, frozen head"


def run_case(inputs: Inputs, flags: argparse.Namespace) -> dict[str, Any]:
    """Check, memory and times of every contestant for one shape, dtype and number of threads."""
    expected, precision = best_reference(inputs)
    builders = {name: CONTESTANTS[name] for name in flags.contestants}
    if "ours" in builders:
        builders |= VARIANTS | (GPU_VARIANTS if inputs.hidden.is_cuda else {})
    losses: dict[str, Loss] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, build in builders.items():
        loss, entries[name] = admit(build, inputs, expected, flags.build_seconds)
        if loss is not None:
            losses[name] = loss
        print(f"    {name}: {entries[name]}", flush=True)
    del expected  # two tensors of float64, which the memory measured below should not include
    times = measure_case(inputs, losses, entries, flags)
    return {
        **inputs.shape._asdict(),
        "dtype": {v: k for k, v in DTYPES.items()}[inputs.hidden.dtype],
        "threads": torch.get_num_threads(),
        "reference": precision,
        "turns": {mode: len(times[mode][next(iter(times[mode]))]) for mode in times},
        "tflops": product_flops(inputs.shape, 3) / statistics.median(times[BOTH]["3 products"]) / 1e12,
        "load": os.getloadavg()[0],
        "gradient_bytes": sum(x.numel() * x.element_size() for x in (inputs.hidden, inputs.weight)),
        "entries": entries,
    }


def measure_case(
    inputs: Inputs, losses: dict[str, Loss], entries: dict[str, dict[str, Any]], flags: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Adds what is measured to the contestants' entries; returns the times of each mode by name."""
    once = {name: forward(losses[name], inputs) for name in flags.contestants if name in losses}
    both = {name: forward_backward(loss, inputs) for name, loss in losses.items()}
    if "ours" in losses:
        entries[FROZEN] = {}
        both[FROZEN] = forward_backward(losses["ours"], inputs, frozen=True)
    runs = {FORWARD: once, BOTH: both}
    memory = {mode: {name: peak_bytes(run, inputs) for name, run in runs[mode].items()} for mode in runs}

    logits = inputs.hidden.new_empty(inputs.shape.rows, inputs.shape.vocabulary)
    alone = {name: products(inputs, logits, count) for name, count in PRODUCTS.items()}
    runs[FORWARD] = once | {"1 product": alone["1 product"]}
    runs[BOTH] = both | {name: alone[name] for name in ("2 products", "3 products")}
    timer = Timer(inputs)
    times = {mode: take_turns(runs[mode], timer, flags.turns, flags.seconds) for mode in (FORWARD, BOTH)}
    for mode, by_name in times.items():
        others = {other: by_name[other] for other in ("naive", "ours") if other in by_name}
        for name, values in by_name.items():
            entry = summary(values, {"products": by_name[floor_of(mode, name)]} | others)
            if name in memory[mode]:
                entry["memory_bytes"] = memory[mode][name]
            entries.setdefault(name, {})[mode] = entry
    return times


def floor_of(mode: str, name: str) -> str:
    """The products that a contestant cannot do without."""
    if mode == FORWARD:
        return "1 product"
    return "2 products" if name == FROZEN else "3 products"


def gpu_rates() -> dict[str, float]:
    """TFLOP/s of a bf16 8192^3 product and TB/s of a copy of 4 GB, medians of 10."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**32, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    result = {}
    for name, run, work in (
        ("tflops", lambda: a @ b, 2 * 8192**3),
        ("tb_per_s", lambda: target.copy_(source), 2 * 2**32),
    ):
        times = []
        for _ in range(13):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(1e-3 * start.elapsed_time(end))
        result[name] = work / statistics.median(times[3:]) / 1e12
    return result


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES.values():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument(
        "--shapes", nargs="+", type=lambda text: Shape(*map(int, text.split("x"))), help="as TxHxV; default by device"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), help="default bf16 on a GPU, fp32 and bf16 on a CPU"
    )
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[torch.get_num_threads()], help="on a CPU: a case for each"
    )
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=60, help="stop a case's turns then, after at least 3")
    parser.add_argument(
        "--build-seconds", type=int, default=300, help="for a contestant's compilation, tuning and check"
    )
    parser.add_argument(
        "--out", type=Path, help="default bench/results/head-cpu.json or head-gpu.json; the plot goes beside it"
    )
    flags = parser.parse_args(arguments)
    on_gpu = flags.device == "cuda"
    flags.shapes = flags.shapes or (SHAPES if on_gpu else CPU_SHAPES)
    flags.dtype = flags.dtype or (["bf16"] if on_gpu else ["fp32", "bf16"])
    flags.out = flags.out or RESULTS / f"head-{'gpu' if on_gpu else 'cpu'}.json"
    return flags


def main(arguments: list[str] | None = None) -> None:
    flags = parse(arguments)
    result: dict[str, Any] = {"device": flags.device, "peers": versions(), "sketch": SKETCH, "budget": BUDGET}
    machine = None
    if flags.device == "cuda":
        result["rates"] = rates = gpu_rates()
        units = torch.cuda.get_device_properties(0).multi_processor_count
        machine = Machine(rates["tflops"] * 1e12, rates["tb_per_s"] * 1e12, units=units)
    result["cases"] = cases = []
    for threads, dtype, shape in itertools.product(flags.threads, flags.dtype, flags.shapes):
        torch.set_num_threads(threads)
        print(f"{shape}, {dtype}, {threads} threads", flush=True)
        inputs = make_inputs(shape, DTYPES[dtype], flags.device)
        case = run_case(inputs, flags)
        if machine is not None:
            size = DTYPES[dtype].itemsize
            rows = default_rows(shape.vocabulary, size)
            case["counted"] = {"chunk_rows": rows, "ms": 1e3 * expected_seconds(shape, rows, size, machine=machine)}
        cases.append(case)
        with redirect_stdout(io.StringIO()):  # kept at once, in case a later one is killed
            write("head", result, flags.out)
        plot(result, flags.out.with_suffix(".png"))
        print(f"\n{table(case)}\n", flush=True)
        del inputs
        torch.cuda.empty_cache()
    found = (pair for case in cases for pair in case["entries"].items())
    failed = sorted({name for name, entry in found if name.startswith("ours") and "absent" in entry})
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
