"""Ranks that hang or die: the others end by themselves, and say who, where and what to do."""

from __future__ import annotations

import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from lead_engine.training import heartbeat, watchdog
from lead_engine.training.heartbeat import Phase
from lead_engine.training.watchdog import EXIT_HANG, Watchdog
from runs import OPTIONS, wait_for_steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def arguments(make_pool, make_model) -> list:
    return ["train", "--pool", make_pool(samples=400), "--model", make_model("llama"), *OPTIONS]


@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.timeout(100)
def test_a_rank_that_hangs_is_named(stopped: int, arguments: list, start_ranks, tmp_path: Path) -> None:
    """Also rank 0, in whose process the ranks' store lives when there is no torchrun."""
    out, other = tmp_path / "run", 1 - stopped
    group = start_ranks(*arguments, "--out", out, "--runtime.timeout", "4", ranks=2)
    wait_for_steps(group, out, 4)
    group.signal(signal.SIGSTOP, [stopped])
    at = time.monotonic()
    group.processes[other].join(20)
    assert group.processes[other].exitcode == EXIT_HANG, group.output()
    assert 3 < time.monotonic() - at < 15
    told = group.output(other)
    assert f"rank {stopped} did not arrive and is not heard of" in told
    assert re.search(r"for [4-9] s the ranks waited for each other in round \d+(, step \d+)? \((\w| )+", told), told
    assert "--runtime.timeout" in told
    assert "--resume" in told
    assert "Traceback" not in told
    group.signal(signal.SIGKILL)


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.timeout(100)
def test_a_rank_that_is_killed_ends_the_other(killed: int, arguments: list, start_ranks, tmp_path: Path) -> None:
    out, other = tmp_path / "run", 1 - killed
    group = start_ranks(*arguments, "--out", out, ranks=2)
    wait_for_steps(group, out, 4)
    group.signal(signal.SIGKILL, [killed])
    group.processes[other].join(20)
    told = group.output(other)
    assert group.processes[other].exitcode == 2, told
    assert re.search(r"error: lost the connection to another rank in round \d+(, step \d+)? \((\w| )+", told), told
    assert "--resume" in told
    assert "Traceback" not in told


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, capsys):
    """ranks(phase of rank 0, phase of rank 1, silent=[...]) -> (whether rank 0's watchdog ended it within two
    time-outs, what it said).

    Real stores and clocks; rank 1 is a thread that tells a phase, as its watchdog would.
    """
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(watchdog, "SILENCE", 0.0)
    ended = threading.Event()

    def run(mine: Phase, other: Phase, *, silent: bool = False, timeout: float = 1.0) -> tuple[bool, str]:
        store, over = dist.HashStore(), threading.Event()

        def tell() -> None:
            beat = 0
            while beat == 0 or not (silent or over.wait(0.1)):
                beat += 1
                store.set("lead_engine/phase/1", watchdog.json.dumps([beat, *other]))

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        monkeypatch.setattr(heartbeat, "_phase", mine)
        monkeypatch.setattr(heartbeat, "_since", time.monotonic())
        dog = Watchdog(store, 0, 2, timeout)
        dog.start()
        happened = ended.wait(2 * timeout)
        over.set(), dog.stop(), thread.join()
        return happened, capsys.readouterr().err

    return run


TRAINING, NEXT, START = Phase(7, "backward", 3, 5, True), Phase(8, "gathering", 3, 5, True), Phase(1, "starting up")


def test_a_rank_that_is_alive_but_behind_is_named(ranks) -> None:
    happened, told = ranks(NEXT, TRAINING)
    assert happened
    assert "waited for each other in round 3, step 5 (gathering)" in told
    assert "rank 1 did not arrive: it is alive, but still in round 3, step 5 (backward)" in told


def test_all_in_the_same_phase_is_the_networks_fault(ranks) -> None:
    happened, told = ranks(TRAINING, TRAINING)
    assert happened
    assert "All ranks are alive and in this place" in told


def test_where_nobody_knows_how_long_it_takes_they_wait(ranks) -> None:
    """Rank 0 tokenises, the others wait at a barrier."""
    assert ranks(START, START) == (False, "")


def test_but_not_for_one_that_is_silent(ranks) -> None:
    happened, told = ranks(START, START, silent=True)
    assert happened
    assert "rank 1 did not arrive and is not heard of; it was last heard of in starting up" in told
