"""What a round's selection costs, from pools of up to 100 million samples: order, packing, statistics, feedback.

    python bench/plan.py        # on the GPU where there is one, every size that fits its memory
    python bench/plan.py --device cpu --samples 10000 100000 1000000 10000000 --tasks 8 --threads 1 \
        --published 10000 100000 1000000 --out bench/results/plan-cpu.json

Selections: `lead-paper` (`--recipe paper`: the drawn cluster, the best first), `lead-mixture` (the defaults, all
clusters in a soft ranking, and U of unseen samples moved by their cell's drift), `random`. Beside them with
--published: `hkust-lead`, a re-implementation of how a round of HKUSTDial/LEAD chooses (src/online/run_lead.py at
commit cbb922f): for every task a `datasets` filter over the whole pool by a Python function of one sample, a Python
list of the utilities of those left, and their argsort; then a dict entry and an array entry for each chosen. It is kept
to that, in its favour: the dataset has no token columns (the published one decodes them for every sample that a filter
leaves), no sample is used up (the published filter looks each one up in a list of those that are), no sample is
dropped, and nothing is written to a disk. It chooses its published share of each task, 1.5 %, whatever the number of
tokens. One round is measured.

The pool is synthetic: utilities uniform in [0, 4], clusters of equal size, tasks of unequal size (the largest has 1 /
sqrt(tasks) of the samples), lengths uniform in [16, 512], a tenth dropped, visits uniform in 0 to 3 of at most 4. Every
repetition is another round, which draws another cluster, and is observed with made-up losses; times are the least of
the repetitions, from call to result (on a GPU: synchronised), so that they contain the launches; on one thread of a
CPU, of processor time: a machine may have other work. `round_ms` is the whole round; the parts are measured by
themselves.

`bytes_least` are the pool's vectors that an order depends on, each read once; `floor_ms` is the time that this takes at
--bandwidth.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, write
from plan_measure import least_ms, plot
from plan_published import measure_published
from torch import Tensor

from lead_engine.pool.state import PoolState
from lead_engine.selection.methods.lead import LeadOptions
from lead_engine.selection.plan import Layout, Plan
from lead_engine.selection.selector import Selector

SIZES = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
HOST_BYTES, DEVICE_BYTES = 60, 100
"""Most memory that a sample takes in a pool that is made here, and in a selector that plans."""
SELECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "lead-paper": ("lead", dict(LeadOptions.recipe("paper"))),
    "lead-mixture": ("lead", {"draw": "mixture", "ranking": "soft", "unseen": "drift"}),
    "random": ("random", {}),
}
UNLIMITED = 1 << 40


def synthetic_pool(samples: int, tasks: int, clusters: int) -> tuple[PoolState, Tensor, Tensor]:
    """(state, lengths int64 [N], visits int32 [N])."""
    generator = torch.Generator().manual_seed(0)

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (samples,), generator=generator, dtype=torch.int32)

    utility = torch.rand(samples, generator=generator) * 4
    state = PoolState(
        utility=utility,
        difficulty=utility,  # no selection here looks at it or at answer_nll
        answer_nll=utility,
        cluster=whole(0, clusters).long(),
        task=(torch.rand(samples, generator=generator).square_() * tasks).long(),
        dropped=torch.rand(samples, generator=generator) < 0.1,
        task_names=[str(number) for number in range(tasks)],
        num_clusters=clusters,
    )
    return state, whole(16, 513).long(), whole(0, 4)


def make_selector(name: str, pool: tuple[PoolState, Tensor, Tensor], layout: Layout, device: torch.device) -> Selector:
    state, lengths, visits = pool
    method, options = SELECTIONS[name]
    selector = Selector(
        state, lengths, lengths // 2, method=method, options=options, layout=layout, seed=0, device=device
    )
    selector.samples.visits[:-1] = visits.to(device)
    if method == "lead":
        selector.method.count_open()
    return selector


def measure(name: str, selector: Selector, repeats: int, bandwidth: float) -> dict[str, Any]:
    """The parts of a round by themselves, and the whole."""
    device, shape, samples = selector.samples.device, selector.layout, selector.samples.num_samples
    generator = torch.Generator().manual_seed(1)
    loss = (torch.rand(shape.steps, shape.micro_batches, shape.slots, generator=generator) * 4).to(device)
    change = -0.1 * loss

    def observe(plan: Plan) -> None:
        for step in range(shape.steps):
            selector.observe(plan.sample_ids[step], loss[step], change[step])

    def whole_round(number: int) -> None:
        plan = selector.plan(number, UNLIMITED)
        observe(plan)
        selector.learn(plan)

    drawn = selector.method.draw(0)
    order = selector.method.order(0, drawn)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    result: dict[str, Any] = {
        "selection": name,
        "samples": samples,
        "round_ms": least_ms(whole_round, repeats, device),
        "order_ms": least_ms(
            lambda number: selector.method.order(number, selector.method.draw(number)), repeats, device
        ),
        "pack_ms": least_ms(lambda _: selector.pack(drawn, order, UNLIMITED), repeats, device),
    }
    if device.type == "cuda":
        result["extra_memory_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    plan = selector.plan(repeats + 1, UNLIMITED)
    result["observe_ms"] = least_ms(lambda _: observe(plan), repeats, device)
    result["finish_ms"] = least_ms(lambda _: selector.learn(plan), repeats, device)
    result |= {"places": order.sample_ids.shape[0], "planned": int((plan.sample_ids < samples).sum())}
    result["bytes_least"] = bytes_least(name, selector) * samples
    result["floor_ms"] = round(result["bytes_least"] / bandwidth / 1e6, 4)
    return result


def bytes_least(name: str, selector: Selector) -> int:
    """Bytes of a sample's entries that an order is a function of."""
    pool = selector.samples
    vectors = [pool.visits]
    if name != "random":
        vectors += [pool.dropped, pool.utility, pool.cell]
    return sum(vector.element_size() for vector in vectors)


def ratios(rows: list[dict[str, Any]]) -> None:
    """Adds to every row its round's time over that of `lead-paper` on the same pool and as many threads."""
    for row in rows:
        setting = ("lead-paper", row["samples"], row["tasks"])
        same = [r for r in rows if (r["selection"], r["samples"], r["tasks"]) == setting]
        same = [r for r in same if row["threads"] in (r["threads"], None)]
        if same and row["round_ms"]:
            row["over_lead_paper"] = round(row["round_ms"] / same[0]["round_ms"], 3)


def fitting(device: torch.device) -> list[int]:
    """The sizes for which there is memory, on the host and on the device."""
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else host
    need = HOST_BYTES if device.type == "cuda" else HOST_BYTES + DEVICE_BYTES
    return [size for size in SIZES if size * need < host and size * DEVICE_BYTES < free]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--samples", type=int, nargs="+", help="sizes of pools; default: of 10 thousand to 100 million, what fits"
    )
    parser.add_argument("--tasks", type=int, nargs="+", default=[16])
    parser.add_argument("--clusters", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a round")
    parser.add_argument("--micro-batches", type=int, default=16, help="of an optimizer step, over all ranks")
    parser.add_argument("--slots", type=int, default=128, help="most samples in a micro-batch")
    parser.add_argument("--capacity", type=int, default=4096, help="tokens in a micro-batch")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="of the CPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--published", type=int, nargs="*", default=[], help="sizes at which the published way is measured too"
    )
    parser.add_argument(
        "--published-seconds", type=float, default=150.0, help="a published round expected to take longer is left out"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=4800.0, help="GB/s of memory for the floor; default: an H200's"
    )
    parser.add_argument(
        "--out", type=Path, help="result file; default bench/results/plan.json; the plot lies beside it"
    )
    return parser.parse_args(arguments)


def measure_all(flags: argparse.Namespace, layout: Layout, device: torch.device) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for tasks in flags.tasks:
        previous = None
        for samples in flags.samples or fitting(device):
            pool = synthetic_pool(samples, tasks, flags.clusters)
            for threads in flags.threads:
                torch.set_num_threads(threads)
                for name in SELECTIONS:
                    selector = make_selector(name, pool, layout, device)
                    measured = measure(name, selector, flags.repeats, flags.bandwidth)
                    rows.append({"threads": threads, "tasks": tasks, **measured})
                    del selector
                    print(rows[-1], flush=True)
            if samples in flags.published:
                previous = measure_published(pool, previous, flags.published_seconds)
                rows.append({"threads": flags.threads[0], "tasks": tasks, **previous})
                print(rows[-1], flush=True)
            del pool
    ratios(rows)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parse(arguments)
    device = torch.device(flags.device)
    layout = Layout(flags.steps, flags.micro_batches, flags.slots, flags.capacity)
    rows = measure_all(flags, layout, device)
    out = flags.out or RESULTS / "plan.json"
    result = {
        "device": str(device),
        "bandwidth_gb_s": flags.bandwidth,
        "clusters": flags.clusters,
        "layout": layout.__dict__,
    }
    write("plan", {**result, "rows": rows}, out)
    threads = flags.threads[0]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} threads of a CPU"
    if threads == 1 and device.type == "cpu":
        where = "1 thread of a CPU"
    title = f"A round's selection, {where}, {flags.tasks[0]} tasks, {flags.clusters} clusters"
    plot(rows, title, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
