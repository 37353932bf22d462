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
import ctypes
import importlib.metadata
import io
import math
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from head_counts import BUDGET, SHAPES, Machine, Shape, default_rows, expected_seconds, product_flops
from head_peers import CONTESTANTS, GPU_VARIANTS, PACKAGES, SKETCH, VARIANTS, Inputs, Loss, make_inputs
from head_report import BOTH, FORWARD, plot, table
from machine import RESULTS, write
from torch import Tensor

CPU_SHAPES = (Shape(2048, 256, 4096), Shape(1024, 512, 8192), Shape(4096, 256, 32768))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAR_OFF = 0.1
"""A relative error that is not rounding any more."""


# Correctness


@dataclass(frozen=True)
class Reference:
    loss: float
    dhidden: Tensor
    dweight: Tensor


def reference(inputs: Inputs, dtype: torch.dtype = torch.float64, rows: int = 256) -> Reference:
    """Loss and gradients by the textbook, in `dtype`, `rows` rows at a time."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach().to(dtype)
    total, dhidden, dweight = 0.0, torch.empty_like(hidden, dtype=dtype), torch.zeros_like(weight)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        h, y = hidden[part].to(dtype), inputs.targets[part, None]
        log_p = torch.log_softmax(h @ weight.T, -1)
        total -= float(log_p.gather(1, y).sum())
        g = log_p.exp_().scatter_add_(1, y, torch.full_like(y, -1, dtype=dtype)).div_(hidden.shape[0])
        dhidden[part] = g @ weight
        dweight.addmm_(g.T, h)
    return Reference(total / hidden.shape[0], dhidden, dweight)


def best_reference(inputs: Inputs) -> tuple[Reference, str]:
    try:
        return reference(inputs), "float64"
    except torch.OutOfMemoryError:
        return reference(inputs, torch.float32), "float32"


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm, by blocks of rows: no float64 copy of a whole weight gradient."""
    rows = max(1, 2**26 // max(1, expected[0].numel()))
    blocks = zip(value.split(rows), expected.split(rows), strict=True)
    difference = sum(float((a.to(b.dtype) - b).square().sum()) for a, b in blocks)
    return math.sqrt(difference / float(torch.linalg.vector_norm(expected)) ** 2)


def errors(loss: Loss, inputs: Inputs, expected: Reference) -> dict[str, float]:
    inputs.drop_gradients()
    value = loss(inputs.hidden, inputs.weight, inputs.targets)
    value.backward()
    found = {
        "loss": abs(float(value.detach()) - expected.loss) / expected.loss,
        "dh": relative_error(inputs.hidden.grad, expected.dhidden),
        "dW": relative_error(inputs.weight.grad, expected.dweight),
    }
    inputs.drop_gradients()
    return found


# Memory and time


def peak_bytes(run: Callable[[], Any], inputs: Inputs) -> int | None:
    """Beyond what is there before the call; None where it cannot be measured."""
    run()
    inputs.drop_gradients()
    if inputs.hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])


class Timer:
    """Seconds of a call, its inputs' old gradients gone and, on a GPU, the cache full of something else."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.flush = (
            torch.empty(2**28, dtype=torch.int8, device=inputs.hidden.device) if inputs.hidden.is_cuda else None
        )

    def __call__(self, run: Callable[[], Any]) -> float:
        self.inputs.drop_gradients()
        if self.flush is None:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)


def take_turns(
    runs: dict[str, Callable[[], Any]], timer: Callable[[Callable[[], Any]], float], turns: int, seconds: float
) -> dict[str, list[float]]:
    """Times of each, `turns` of them; fewer, but at least 3, once `seconds` have passed. One turn before warms up."""
    names, times = list(runs), {name: [] for name in runs}
    started = time.perf_counter()
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took = timer(runs[name])
            if turn > 0:
                times[name].append(took)
        if turn >= 3 and time.perf_counter() - started > seconds:
            break
    return times


def summary(times: list[float], others: dict[str, list[float]]) -> dict[str, Any]:
    """Median and quartiles, also of the ratios to others, which are taken within turns."""
    result: dict[str, Any] = {
        "ms": 1e3 * statistics.median(times),
        "quartiles_ms": [1e3 * x for x in _quartiles(times)],
    }
    for name, other in others.items():
        ratios = [a / b for a, b in zip(times, other, strict=True)]
        result[f"over_{name}"] = statistics.median(ratios)
        result[f"over_{name}_quartiles"] = _quartiles(ratios)
    return result


def _quartiles(values: list[float]) -> list[float]:
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


# A case: one shape, dtype and number of threads


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


PRODUCTS = {f"{n} product{'s' * (n > 1)}": n for n in (1, 2, 3)}


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not ready after {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def admit(
    build: Callable[[Inputs], Loss], inputs: Inputs, expected: Reference, seconds: int
) -> tuple[Loss | None, dict[str, Any]]:
    """A contestant that runs and is right, or the reason why it does not take part."""
    try:
        with time_limit(seconds):
            loss = build(inputs)
            found = errors(loss, inputs, expected)
    except Exception as error:
        return None, {"absent": _reason(error)}
    if not all(x < FAR_OFF for x in found.values()):
        return None, {"absent": "wrong result", "error": found}
    return loss, {"error": found}


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        return f"{PACKAGES[error.name]} is not installed"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def run_case(inputs: Inputs, flags: argparse.Namespace) -> dict[str, Any]:
    names = flags.contestants
    expected, precision = best_reference(inputs)
    builders = {name: CONTESTANTS[name] for name in names}
    if "ours" in names:
        builders |= VARIANTS | (GPU_VARIANTS if inputs.hidden.is_cuda else {})
    losses: dict[str, Loss] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, build in builders.items():
        loss, entries[name] = admit(build, inputs, expected, flags.build_seconds)
        if loss is not None:
            losses[name] = loss
        print(f"    {name}: {entries[name]}", flush=True)
    del expected
    both = {name: forward_backward(loss, inputs) for name, loss in losses.items()}
    if "ours" in losses:
        entries["ours, frozen head"] = {}
        both["ours, frozen head"] = forward_backward(losses["ours"], inputs, frozen=True)
    once = {name: forward(losses[name], inputs) for name in names if name in losses}
    memory = {
        mode: {name: peak_bytes(run, inputs) for name, run in runs.items()}
        for mode, runs in ((FORWARD, once), (BOTH, both))
    }

    logits = inputs.hidden.new_empty(inputs.shape.rows, inputs.shape.vocabulary)
    alone = {name: products(inputs, logits, count) for name, count in PRODUCTS.items()}
    timer = Timer(inputs)
    measured = {
        FORWARD: take_turns(once | {"1 product": alone["1 product"]}, timer, flags.turns, flags.seconds),
        BOTH: take_turns(
            both | {name: alone[name] for name in ("2 products", "3 products")}, timer, flags.turns, flags.seconds
        ),
    }
    for mode, times in measured.items():
        for name, values in times.items():
            floor = "1 product" if mode == FORWARD else "2 products" if name == "ours, frozen head" else "3 products"
            entry = summary(
                values,
                {"products": times[floor]} | {other: times[other] for other in ("naive", "ours") if other in times},
            )
            if name in memory[mode]:
                entry["memory_bytes"] = memory[mode][name]
            entries.setdefault(name, {})[mode] = entry
    return {
        **inputs.shape._asdict(),
        "dtype": {v: k for k, v in DTYPES.items()}[inputs.hidden.dtype],
        "threads": torch.get_num_threads(),
        "reference": precision,
        "turns": {mode: len(times[next(iter(times))]) for mode, times in measured.items()},
        "tflops": product_flops(inputs.shape, 3) / statistics.median(measured[BOTH]["3 products"]) / 1e12,
        "load": os.getloadavg()[0],
        "gradient_bytes": sum(x.numel() * x.element_size() for x in (inputs.hidden, inputs.weight)),
        "entries": entries,
    }


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
    if flags.device == "cuda":
        result["rates"] = rates = gpu_rates()
        machine = Machine(
            rates["tflops"] * 1e12,
            rates["tb_per_s"] * 1e12,
            units=torch.cuda.get_device_properties(0).multi_processor_count,
        )
    result["cases"] = cases = []
    for threads in flags.threads:
        torch.set_num_threads(threads)
        for dtype in flags.dtype:
            for shape in flags.shapes:
                print(f"{shape}, {dtype}, {threads} threads", flush=True)
                inputs = make_inputs(shape, DTYPES[dtype], flags.device)
                case = run_case(inputs, flags)
                if flags.device == "cuda":
                    rows, size = default_rows(shape.vocabulary, DTYPES[dtype].itemsize), DTYPES[dtype].itemsize
                    case["counted"] = {
                        "chunk_rows": rows,
                        "ms": 1e3 * expected_seconds(shape, rows, size, machine=machine),
                    }
                cases.append(case)
                with redirect_stdout(io.StringIO()):  # kept at once, in case a later one is killed
                    write("head", result, flags.out)
                plot(result, flags.out.with_suffix(".png"))
                print(f"\n{table(case)}\n", flush=True)
                del inputs
                torch.cuda.empty_cache()
    failed = sorted(
        {
            name
            for case in cases
            for name, entry in case["entries"].items()
            if name.startswith("ours") and "absent" in entry
        }
    )
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
