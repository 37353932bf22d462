"""What planning a round costs, from pools of up to 100 million samples: draw, eligibility, the order of the best, packing.

    python bench/plan.py                                     # on the GPU where there is one, every size that fits its memory
    python bench/plan.py --device cpu --samples 600000 10000000 --threads 1 2 --out bench/results/plan-cpu.json

The pool is synthetic: utilities uniform in [0, 4], clusters of equal size, tasks of unequal size (the largest has 1 / sqrt(tasks) of
the samples), lengths uniform in [16, 512], a tenth dropped, visits uniform in 0 to 4 of at most 4. Every repetition plans another round,
which draws another cluster; times are medians, from call to result (on a GPU: synchronised), so that they contain the launches.

`bytes` counts what the GPU's kernels read and write of the pool's vectors (with all the passes that ties may need), `bytes_least` each
vector once; `bytes_ms` and `floor_ms` are the times that these take at --bandwidth, by default that of an H200.
"""
from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import write
from torch import Tensor

from lead_engine.config import SelectionConfig
from lead_engine.pool.state import PoolState
from lead_engine.selection.selector import Layout, Selector
from lead_kernels.select_topk import ORDER_BITS, _digits, _launch

SIZES = (600_000, 10_000_000, 100_000_000)
HOST_BYTES, DEVICE_BYTES = 120, 80
"""Most memory that a sample takes while a pool is made here, and while the selector plans."""


def synthetic_selector(samples: int, tasks: int, clusters: int, layout: Layout, device: torch.device) -> Selector:
    generator = torch.Generator().manual_seed(0)

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (samples,), generator=generator, dtype=torch.int32)

    state = PoolState(
        utility=torch.rand(samples, generator=generator) * 4,
        difficulty=torch.rand(samples, generator=generator),
        answer_nll=torch.zeros(samples),
        cluster=whole(0, clusters).long(),
        task=(torch.rand(samples, generator=generator).square_() * tasks).long(),
        dropped=torch.rand(samples, generator=generator) < 0.1,
        task_names=[str(number) for number in range(tasks)],
        num_clusters=clusters,
    )
    lengths = whole(16, 513).long()
    config = SelectionConfig(max_visits=4)
    selector = Selector(state, lengths, lengths // 2, method="lead", config=config, layout=layout, seed=0, device=device)
    selector.visits[:-1] = whole(0, 5).to(device)
    return selector


def median_ms(call: Callable[[int], object], repeats: int, device: torch.device) -> float:
    """call(round) is given another round each time; the first two are not counted."""
    seconds = []
    for number in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return round(1e3 * statistics.median(seconds[2:]), 3)


def bytes_per_sample(selector: Selector, passes: int) -> tuple[int, int]:
    """(what planning on a GPU reads and writes of a sample's entries, what it would if it read each once).

    Masks: visits and dropped to open (4 + 1, 2, 2 + 1), who is present (1 + arm), eligible (arm + 1, 2 + 1). Order: `passes` over
    utility, eligible and task.
    """
    arm, task = selector.arm.element_size(), selector.quota_task.element_size()
    masks = (4 + 1) + 2 + (2 + 1) + (1 + arm) + (arm + 1) + (2 + 1)
    return masks + passes * (4 + 1 + task), 4 + 1 + arm + 4 + task


def measure(selector: Selector, repeats: int, bandwidth: float) -> dict[str, Any]:
    """The parts by themselves, on what the part before them gives, and the whole plan."""
    device = selector.device
    _, _, eligible = selector._draw(0)
    order = selector._lead_order(eligible)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    plan = selector.plan(0, 1 << 40)
    result: dict[str, Any] = {
        "samples": selector.num_samples,
        "eligible": int(eligible.sum()),
        "tasks": selector.num_quotas,
        "places": order.shape[0],
        "planned": int((plan.sample_ids < selector.num_samples).sum()),
        "plan_ms": median_ms(lambda number: selector.plan(number, 1 << 40), repeats, device),
        "draw_and_eligible_ms": median_ms(selector._draw, repeats, device),
        "select_topk_ms": median_ms(lambda _: selector._lead_order(eligible), repeats, device),
        "pack_plan_ms": median_ms(lambda _: selector._pack(order, 1 << 40), repeats, device),
    }
    samples = selector.num_samples
    digits = _digits(ORDER_BITS + (samples - 1).bit_length(), _launch(samples, selector.num_quotas).bits)
    moved, least = (count * samples for count in bytes_per_sample(selector, len(digits) + 2))  # two more count and copy the chosen
    result |= {"bytes": moved, "bytes_ms": round(moved / bandwidth / 1e6, 3)}
    result |= {"bytes_least": least, "floor_ms": round(least / bandwidth / 1e6, 3)}
    if device.type == "cuda":
        result["extra_memory_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return result


def fitting(device: torch.device) -> list[int]:
    """The sizes for which there is memory, on the host and on the device."""
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else host
    need = HOST_BYTES if device.type == "cuda" else HOST_BYTES + DEVICE_BYTES
    return [size for size in SIZES if size * need < host and size * DEVICE_BYTES < free]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, nargs="+", help="sizes of pools; default: of 600 thousand, 10 and 100 million, what fits")
    parser.add_argument("--tasks", type=int, nargs="+", default=[16])
    parser.add_argument("--clusters", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a round")
    parser.add_argument("--micro-batches", type=int, default=16, help="of an optimizer step, over all ranks")
    parser.add_argument("--slots", type=int, default=128, help="most samples in a micro-batch")
    parser.add_argument("--capacity", type=int, default=4096, help="tokens in a micro-batch")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="of the CPU")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--bandwidth", type=float, default=4800.0, help="GB/s of memory for the floor; default: an H200's")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/plan.json")
    flags = parser.parse_args(arguments)
    device = torch.device(flags.device)
    layout = Layout(flags.steps, flags.micro_batches, flags.slots, flags.capacity)
    rows = []
    for samples in flags.samples or fitting(device):
        for tasks in flags.tasks:
            selector = synthetic_selector(samples, tasks, flags.clusters, layout, device)
            for threads in flags.threads:
                torch.set_num_threads(threads)
                rows.append({"threads": threads, **measure(selector, flags.repeats, flags.bandwidth)})
                print(rows[-1], flush=True)
            del selector
    write("plan", {"device": str(device), "bandwidth_gb_s": flags.bandwidth, "clusters": flags.clusters, "rows": rows}, flags.out)


if __name__ == "__main__":
    main()
