"""Every rank has its own selector and its own micro-batches' statistics; all selectors stay equal, bit for bit.

Ranks are forked from this process, which has imported everything. They use gloo on the CPU, whatever the machine has.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lead_engine.pool.state import PoolState
from lead_engine.selection import counter_rng
from lead_engine.selection.methods.lead import LeadOptions
from lead_engine.selection.plan import Layout
from lead_engine.selection.replicas import check_replicas, gather_statistics
from lead_engine.selection.selector import Selector
from lead_engine.training.rounds import read_header

SAMPLES = 400
LAYOUT = Layout(steps=2, micro_batches=8, slots=5, capacity=64)
BUDGET = 3300
"""Tokens: it ends inside a step, so that ranks have nothing to do in the last ones."""
MIXTURE = {"draw": "mixture", "ranking": "soft", "unseen": "drift"}
PAPER = LeadOptions.recipe("paper")
SELECTIONS = {"paper": ("lead", PAPER), "mixture, soft, drift": ("lead", MIXTURE), "random": ("random", {})}


def make_selector(method: str, options: dict) -> Selector:
    generator = torch.Generator().manual_seed(0)
    state = PoolState(
        utility=torch.rand(SAMPLES, generator=generator) * 4,
        difficulty=torch.rand(SAMPLES, generator=generator),
        answer_nll=torch.ones(SAMPLES),
        cluster=torch.randint(0, 3, (SAMPLES,), generator=generator),
        task=torch.randint(0, 4, (SAMPLES,), generator=generator),
        dropped=torch.rand(SAMPLES, generator=generator) < 0.1,
        task_names=list("abcd"),
        num_clusters=3,
    )
    lengths = torch.randint(4, 40, (SAMPLES,), generator=generator)
    return Selector(
        state,
        lengths,
        lengths // 2,
        method=method,
        options=options,
        layout=LAYOUT,
        seed=7,
        device="cpu",
    )


def made_up(ids: torch.Tensor, round: int) -> torch.Tensor:
    """(loss, change) fp32 [2, ...], functions of sample and round as a model's would be; one loss in sixteen is nan."""
    chance = [counter_rng.uniform(stream, torch.tensor(round), ids) for stream in range(3)]
    loss = torch.where(chance[2] < 1 / 16, torch.nan, 4 * chance[0])
    return torch.where(ids < SAMPLES, torch.stack([loss, -0.3 * chance[1]]), 0.0)


def rounds(rank: int, world: int, method: str, options: dict) -> dict[str, list]:
    """Train the budget on made-up statistics: fingerprints after every round, and tokens of each rank in every step."""
    selector = make_selector(method, options)
    accumulation = LAYOUT.micro_batches // world
    mine = slice(rank * accumulation, (rank + 1) * accumulation)
    found: dict[str, list] = {"fingerprints": [], "tokens": []}
    spent = number = 0
    while sum((header := read_header(plan := selector.plan(number, BUDGET - spent), selector)).tokens):
        for step, tokens in enumerate(header.tokens):
            if tokens:
                ids = plan.sample_ids[step]
                selector.observe(ids, *gather_statistics(made_up(ids[mine], number), world))
                found["tokens"].append(plan.tokens[step].tolist())
        selector.learn(plan)
        found["fingerprints"].append(int(selector.fingerprint()))
        spent, number = spent + sum(header.tokens), number + 1
    return found


def in_ranks(world: int, folder: Path, work: Callable[[int, int], object]) -> list:
    """work(rank, world) in forked processes that are a gloo group: what each returned."""
    folder.mkdir()

    def one(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        (folder / f"{rank}.json").write_text(json.dumps(work(rank, world)))
        dist.destroy_process_group()

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=one, args=(rank,)) for rank in range(world)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(60)
    codes = [each.exitcode for each in ranks]
    for each in ranks:
        each.kill()
    assert codes == [0] * world
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selectors_agree_over_ranks_and_numbers_of_ranks(selection: str, tmp_path: Path) -> None:
    method, options = SELECTIONS[selection]
    expected = rounds(0, 1, method, options)
    assert len(expected["fingerprints"]) >= 4
    assert len(set(expected["fingerprints"])) == len(expected["fingerprints"])
    for world in (2, 4):
        share = LAYOUT.micro_batches // world
        of_rank = [[sum(step[r * share : (r + 1) * share]) for r in range(world)] for step in expected["tokens"]]
        assert any(0 in step for step in of_rank), "no rank ever came away empty: choose another budget"
        found = in_ranks(world, tmp_path / str(world), lambda rank, world: rounds(rank, world, method, options))
        assert found == [expected] * world


def test_ranks_that_differ_are_told(tmp_path: Path) -> None:
    """One bit of one rank's state is another: all ranks stop."""

    def differ(rank: int, world: int) -> list[str]:
        selector, said = make_selector("lead", PAPER), []
        check_replicas(selector, world, 3)
        if rank == 1:
            selector.samples.visits[17] ^= 1
        try:
            check_replicas(selector, world, 4)
        except RuntimeError as error:
            said.append(str(error))
        return said

    found = in_ranks(3, tmp_path / "three", differ)
    assert found[0] == found[1] == found[2]
    assert "of ranks 1 differs from rank 0's after step 4" in found[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["mixture, soft, drift", "random"])
@pytest.mark.timeout(200)
def test_two_real_ranks_agree(selection: str, make_pool, make_model, tmp_path: Path) -> None:
    """A run stops unless its ranks' fingerprints are the same, at every checkpoint and at its end."""
    method, options = SELECTIONS[selection]
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "lead_engine",
        "train",
    ]
    line += [
        "--pool",
        make_pool(samples=300),
        "--model",
        make_model("llama"),
        "--out",
        tmp_path / "run",
        "--method",
        method,
    ]
    line += ["--budget", "0.4", "--batch.capacity", "64", "--batch.micro-batches", "8", "--selection.round-steps", "2"]
    line += ["--lead.sketch-dim", "8"] if method == "lead" else []
    line += ["--runtime.precision", "fp32", "--checkpoint-every", "1"]
    line += [part for name, value in options.items() for part in (f"--lead.{name}", value)]
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["rounds"] >= 3
    assert len(summary["fingerprint"]) == 16
