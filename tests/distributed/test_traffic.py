"""Bytes that the selection sends between ranks, counted at the collectives: they depend on options, not on the pool.

Ranks are forked. In each, a dispatch mode sees every collective that the training thread starts and finds its owner in
the call stack. A rank's bytes are those of the tensor that it hands in: its part of a gather, the whole of what is
reduced. docs/SCALE.md derives them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lead_engine.config import BatchConfig, OptimizerConfig, RuntimeConfig, SelectionConfig, TrainConfig
from lead_engine.pool.state import PoolState
from lead_engine.pool.store import TokenStore
from lead_engine.selection.plan import Layout
from lead_engine.selection.selector import Selector
from ranks import free_port
from runs import options_for

pytestmark = pytest.mark.slow

LENGTH, HIDDEN = 16, 32
"""Tokens of every sample: pools differ in nothing but the number of samples."""
SIZES = (250, 500, 1_000, 10_000, 100_000)
STEP_SITES = {
    "take": "sketch",
    "gather_statistics": "statistics",
    "_update_weights": "first order",
    "clip_gradients": "norm",
    "check_replicas": "fingerprint",
}
"""The engine's function that starts a collective -> whose bytes they are."""
WRAPPERS = ("_sum_over_ranks", "sum_over_ranks", "barrier")
"""Functions that only start a collective for their caller."""
BESIDE = ("model", "norm", "whole", "everyone")
"""Not the selection's, for `random` has them too: FSDP's parameters and gradients; the gradient's norm for clipping, a
number a parameter; writing the model at the end; agreement on what checkpoints wrote.
"""


class Counting(TorchDispatchMode):
    """calls, sent: this thread's collectives and the bytes handed to them, by owner ("model" is FSDP)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # what it comes to on the ranks' own tensors is seen here again
        namespace, name = func._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            owner = whose()
            self.calls[owner] += 1
            # Those of c10d that gather or scatter take (output, input, ...); all others (input, ...).
            given = args[1] if namespace == "c10d" and ("gather" in name or "scatter" in name) else args[0]
            if name != "barrier":
                self.sent[owner] += sum(
                    x.numel() * x.element_size() for x in tree_leaves(given) if isinstance(x, torch.Tensor)
                )
        return func(*args, **(kwargs or {}))


def whose() -> str:
    """The innermost function of the engine on the stack, or "model" if FSDP stands before it."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "torch/distributed/fsdp" in file:
            return "model"
        if "lead_engine/" in file and frame.f_code.co_name not in WRAPPERS:
            return STEP_SITES.get(frame.f_code.co_name, frame.f_code.co_name)
        frame = frame.f_back
    return "elsewhere"


@dataclass(frozen=True)
class Case:
    """One run; q is the sketch's width."""

    samples: int = 1_000
    micro_batches: int = 4
    slots: int = 5
    q: int = 8
    method: str = "lead"
    steps: int = 4
    checkpoint_every: int = 2

    def config(self, pools: Path, model: Path, out: Path) -> TrainConfig:
        tokens = self.steps * self.micro_batches * self.slots * LENGTH
        return TrainConfig(
            pool=pools / str(self.samples),
            model=str(model),
            out=out,
            method=self.method,
            budget=tokens / (self.samples * LENGTH),
            checkpoint_every=self.checkpoint_every,
            batch=BatchConfig(capacity=self.slots * LENGTH, micro_batches=self.micro_batches, slots=self.slots),
            selection=SelectionConfig(round_steps=2),
            options=options_for(self.method, sketch_dim=self.q, calibrate_every=3),
            optimizer=OptimizerConfig(lr=1e-3),
            runtime=RuntimeConfig(precision="fp32"),
        )

    def expected(self, world: int) -> dict[str, int]:
        """Bytes a rank sends in the whole run, by the formulas of docs/SCALE.md."""
        reduced = 0 if self.method == "random" else self.q**2 or HIDDEN**2
        slots = self.micro_batches // world * self.slots
        measured = 0 if self.method == "random" else -(-self.steps // 3)
        rounds = self.steps // 2
        checkpoints = rounds // self.checkpoint_every
        return {
            "sketch": self.steps * 4 * reduced,
            "statistics": self.steps * 2 * 4 * slots,  # loss and change of every slot, fp32
            "first order": 8 * measured,  # a float64
            "agreed": 8 * (rounds + 1),  # whether a signal has come: an int64 before and after every round
            "fingerprint": 8 * (checkpoints + 1),  # an int64 at every checkpoint and at the end
        }


class Found(NamedTuple):
    """One run's counters."""

    calls: dict[str, int]
    sent: dict[str, int]
    steps: int


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared pool a size, named by it."""
    folder = tmp_path_factory.mktemp("pools")
    for samples in SIZES:
        random = np.random.default_rng(0)
        ids = random.integers(4, 300, (samples, LENGTH))
        response = np.arange(LENGTH) >= LENGTH // 2
        TokenStore.write(folder / str(samples) / "store", ((row, response) for row in ids))
        pq.write_table(pa.table({"id": [str(i) for i in range(samples)]}), folder / str(samples) / "records.parquet")
        PoolState(
            utility=torch.from_numpy(random.uniform(3, 6, samples)).float(),
            difficulty=torch.full((samples,), 0.5),
            answer_nll=torch.ones(samples),
            cluster=torch.from_numpy(random.integers(0, 3, samples)),
            task=torch.from_numpy(random.integers(0, 3, samples)),
            dropped=torch.zeros(samples, dtype=torch.bool),
            task_names=["chat", "code", "maths"],
            num_clusters=3,
        ).save(folder / str(samples))
    return folder


def rank_main(rank: int, world: int, port: int, configs: list[TrainConfig], out: Path) -> None:
    """Train all configs in one process group, counting each."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    from lead_engine.training.distributed import process_group
    from lead_engine.training.train import run

    found = []
    with open(out / f"{rank}.log", "w") as log, redirect_stdout(log), process_group() as ranks:
        for config in configs:
            with Counting() as counting:
                run(config, ranks)
            found.append({"calls": counting.calls, "sent": counting.sent})
    (out / f"{rank}.json").write_text(json.dumps(found))


def in_ranks(world: int, cases: dict[str, Case], pools: Path, model: Path, out: Path) -> dict[str, Found]:
    """Every case's counters, which must be the same on all ranks."""
    configs = [case.config(pools, model, out / name) for name, case in cases.items()]
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [
        context.Process(target=rank_main, args=(rank, world, port, configs, out), daemon=True) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world
    everyone = [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]
    assert all(each == everyone[0] for each in everyone)
    steps = [len((out / name / "metrics.jsonl").read_text().splitlines()) for name in cases]
    return {name: Found(**counters, steps=n) for name, counters, n in zip(cases, everyone[0], steps, strict=True)}


POOLS = {f"pool of {samples:,}": Case(samples=samples) for samples in (1_000, 10_000, 100_000)}
MORE = {"more of everything": Case(micro_batches=8, slots=9, q=16, steps=8)}
OTHERS = {"exact": Case(q=0), "random": Case(method="random")}
RESCORE = {f"rescore, pool of {samples:,}": Case(samples=samples, method="rescore") for samples in (250, 500)}


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("world", "cases"), [(2, {**POOLS, **MORE, **OTHERS}), (4, {**POOLS, **MORE})])
def test_bytes_follow_from_the_options_alone(
    world: int, cases: dict[str, Case], pools: Path, make_model: Any, tmp_path: Path
) -> None:
    found = in_ranks(world, cases, pools, make_model("llama"), tmp_path)
    for name, case in cases.items():
        run, expected = found[name], case.expected(world)
        assert run.steps == case.steps
        assert {site: run.sent.get(site, 0) for site in expected} == expected, name
        # Flags and the like may come on top, but nothing that is more than a few numbers a step.
        flags = sum(run.sent.values()) - sum(run.sent.get(site, 0) for site in [*expected, *BESIDE])
        assert flags <= 64 * run.steps, f"{name}: {run.sent}"
    # What ranks write to each other about files holds sizes and checksums, pickled: a byte more or less for a number.
    written = [found[name].sent.pop("everyone") for name in POOLS]
    assert max(written) <= 1024
    small, *larger = (found[name] for name in POOLS)
    assert all(run == small for run in larger), f"bytes or calls grow with the pool: {small} {larger}"
    if "random" in cases:
        selection = [
            {k: v for k, v in found[name].sent.items() if k in ("sketch", "first order")}
            for name in ("random", "pool of 1,000")
        ]
        assert selection == [{}, {"sketch": 4 * 4 * 64, "first order": 16}]


@pytest.mark.timeout(200)
def test_scoring_the_pool_again_does_grow_with_it(pools: Path, make_model: Any, tmp_path: Path) -> None:
    """What LEAD replaces, and a sign that the counters see what grows."""
    small, large = in_ranks(2, RESCORE, pools, make_model("llama"), tmp_path).values()
    assert large.sent["_everyone"] > 1.9 * small.sent["_everyone"] > 0
    # So small a model stays gathered while it scores: its weights travel once, however many micro-batches there are.
    assert large.sent["model"] == small.sent["model"] > 0


@pytest.mark.parametrize(("method", "kept"), [("lead", 29), ("random", 25)])
def test_bytes_a_sample(method: str, kept: int) -> None:
    """What every rank keeps on its device for a sample, and what a checkpoint holds of it, as docs/SCALE.md counts."""
    samples = 100_000
    places = torch.zeros(samples, dtype=torch.int64)
    utility, difficulty, alone = torch.ones(3, samples)
    state = PoolState(utility, difficulty, alone, places, places, places > 0, ["all"], 2)
    selector = Selector(
        state,
        places + 16,
        places + 8,
        method=method,
        layout=Layout(2, 4, 5, 80),
        seed=0,
        device="cpu",
    )
    tensors = [
        x for owner in (selector.samples, selector.method) for x in vars(owner).values() if isinstance(x, torch.Tensor)
    ]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert round(sum(storages.values()) / samples) == kept
    assert round(sum(x.nbytes for x in selector.state_dict().values()) / samples) == 9
