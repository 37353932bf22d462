"""Peak memory and times of calls that take turns, as bench/head.py measures them."""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from head_peers import Inputs


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
