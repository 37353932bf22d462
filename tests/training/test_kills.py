"""Fifty times in one run, at random moments, one rank or all are killed; resumed each time, it ends as the run that
nobody touched.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from runs import OPTIONS, assert_same_run

pytestmark = pytest.mark.slow

KILLS, AT_THE_END = 50, 6
SLOW_FORWARD = 0.02  # seconds: the longest random delay once an attempt trains


def phase(group, out: Path, started: float) -> str:
    """What an attempt that began at `started` (seconds of the wall clock) is doing, by its first screen and what lies
    on the disk.
    """

    def new(path: Path) -> bool:
        try:
            return path.stat().st_mtime > started  # what the last attempt left unfinished is still there
        except FileNotFoundError:
            return False

    if "chosen" not in group.output(0):
        return "start-up"
    if new(out / "model.writing") or new(out / "model"):
        return "final save"
    if any(new(path) and not (path / "COMPLETE").exists() for path in out.glob("checkpoints/step-*")):
        return "checkpoint"
    return "training"


def moment(kind: str, chance: random.Random, group, out: Path, started: float) -> None:
    """Wait for a moment of that kind, or until the run is over."""

    def steps() -> int:
        metrics = out / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def reached() -> bool:
        return steps() >= wanted if kind == "training" else phase(group, out, started) == kind

    deadline, wanted = time.monotonic() + 60, steps() + chance.randint(1, 4)
    if kind == "start-up":
        deadline = time.monotonic() + chance.uniform(0, 1)
    else:
        while "chosen" not in group.output(0) and time.monotonic() < deadline and alive(group):
            time.sleep(0.002)
    while time.monotonic() < deadline and alive(group) and not reached():
        time.sleep(0.001)
    if kind in ("training", "checkpoint"):
        time.sleep(chance.uniform(0, SLOW_FORWARD))


def alive(group) -> bool:
    return all(process.exitcode is None for process in group.processes)


@pytest.mark.timeout(900)
def test_fifty_kills_change_nothing(
    make_pool, make_model, start_ranks, run_ranks, tmp_path: Path, record_property
) -> None:
    arguments = [
        "train",
        "--pool",
        make_pool(samples=700),
        "--model",
        make_model("llama"),
        *OPTIONS,
        "--checkpoint-every",
        "1",
    ]
    whole, out = tmp_path / "whole", tmp_path / "run"
    run_ranks(*arguments, "--out", whole, ranks=2)
    chance = random.Random(11)
    kinds = ["start-up"] * 12 + ["training"] * 16 + ["checkpoint"] * (KILLS - AT_THE_END - 28)
    chance.shuffle(kinds)
    phases: Counter[str] = Counter()
    for kind in kinds + ["final save"] * AT_THE_END:
        started = time.time()
        group = start_ranks(*arguments, "--out", out, "--resume", ranks=2)
        moment(kind, chance, group, out, started)
        assert not (out / "summary.json").exists(), (
            f"the run was over after {sum(phases.values())} kills; make it longer"
        )
        assert alive(group), group.output()
        found = phase(group, out, started)
        victims = None if kind == "final save" else chance.choice([None, [0], [1]])
        group.signal(signal.SIGKILL, victims)
        phases[f"{found}, {'all' if victims is None else 'one'}"] += 1
        if victims is not None and found != "start-up":  # before that, the other may be waiting for the one to come
            other = 1 - victims[0]
            group.processes[other].join(30)
            assert group.processes[other].exitcode == 2, group.output(other)
            assert "lost the connection to another rank" in group.output(other)
            assert "Traceback" not in group.output(other)
        group.signal(signal.SIGKILL)  # as torchrun does
        for process in group.processes:
            process.join()
    print(dict(phases))
    record_property("kills", dict(phases))
    run_ranks(*arguments, "--out", out, "--resume", ranks=2)
    assert_same_run(whole, out)
    assert sum(phases.values()) == KILLS
    for name in ("start-up", "training", "checkpoint", "final save"):
        assert sum(count for found, count in phases.items() if found.startswith(name)) >= 3, phases
