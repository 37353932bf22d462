"""SIGTERM, SIGUSR1 and Ctrl-C: a run that is told to stop leaves a checkpoint, and resumed it is the run that was never
stopped.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from runs import OPTIONS, assert_same_run, lines, wait_for_steps

pytestmark = pytest.mark.slow

Reach = Sequence[int] | None


CASES: dict[str, tuple[int, signal.Signals, Reach, list[str]]] = {
    "a plain process, SIGTERM": (0, signal.SIGTERM, None, []),
    "a plain process, Ctrl-C": (0, signal.SIGINT, None, []),
    "one of two, SIGTERM": (2, signal.SIGTERM, [1], []),
    "both, SIGUSR1": (2, signal.SIGUSR1, None, ["--checkpoint-every", "3"]),
}
"""Ranks, signal, who gets it, options."""


@pytest.fixture(scope="module")
def whole(make_pool, make_model, run_ranks, tmp_path_factory):
    """whole(ranks, options) -> (arguments, folder) of a run that nothing stopped."""
    pool, model, made = make_pool(samples=160), make_model("llama"), {}

    def make(ranks: int, options: list[str]) -> tuple[list, Path]:
        arguments = ["train", "--pool", pool, "--model", model, *OPTIONS]
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp("whole") / "run"
            run_ranks(*arguments, "--out", made[ranks], ranks=ranks)
        return [*arguments, *options], made[ranks]

    return make


@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(200)
def test_stopped_and_resumed_is_the_uninterrupted_one(case: str, whole, start_ranks, run_ranks, tmp_path: Path) -> None:
    ranks, number, reach, options = CASES[case]
    arguments, expected = whole(ranks, options)
    out = tmp_path / "run"
    group = start_ranks(*arguments, "--out", out, ranks=ranks)
    wait_for_steps(group, out, 6)
    group.signal(number, reach)
    assert group.wait() == [128 + number] * max(1, ranks), group.output()
    done = lines(out / "metrics.jsonl")
    told = group.output(0)
    assert (
        f"stopped by {number.name} after step {len(done)} (round {done[-1]['round'] + 1}): a checkpoint is written"
        in told
    )
    assert "Traceback" not in group.output()
    assert (out / "checkpoints" / f"step-{len(done):08d}" / "COMPLETE").exists()
    assert len(done) < len(lines(expected / "metrics.jsonl"))
    run_ranks(*arguments, "--out", out, "--resume", ranks=ranks)
    assert_same_run(expected, out)


def test_a_second_signal_ends_at_once_but_not_the_same_one_passed_on(whole, start_ranks, tmp_path: Path) -> None:
    """Rank 1 is stopped, so rank 0 waits for it in the middle of a round and cannot come to its end."""
    arguments, _ = whole(2, [])
    group = start_ranks(*arguments, "--out", tmp_path / "run", ranks=2)
    wait_for_steps(group, tmp_path / "run", 4)
    group.signal(signal.SIGSTOP, [1])
    group.signal(signal.SIGTERM, [0])
    time.sleep(0.1)
    group.signal(signal.SIGTERM, [0])
    group.processes[0].join(1.0)
    assert group.processes[0].exitcode is None, "the second, a moment later, is the same one passed on by torchrun"
    time.sleep(1.5)
    group.signal(signal.SIGTERM, [0])
    group.processes[0].join(5)
    assert group.processes[0].exitcode == 128 + signal.SIGTERM
    assert "another signal ends the run at once" in group.output(0)
    group.signal(signal.SIGKILL)


def test_a_signal_before_the_first_round_trains_nothing(whole, start_ranks, run_ranks, tmp_path: Path) -> None:
    arguments, expected = whole(0, [])
    out = tmp_path / "run"
    group = start_ranks(*arguments, "--out", out, ranks=0)
    deadline = time.monotonic() + 60
    while "chosen" not in group.output():  # the first screen: handlers are there, no step is
        assert time.monotonic() < deadline
        time.sleep(0.001)
    group.signal(signal.SIGTERM)
    assert group.wait() == [143]
    assert "stopped by SIGTERM after step" in group.output()
    run_ranks(*arguments, "--out", out, "--resume", ranks=0)
    assert_same_run(expected, out)
