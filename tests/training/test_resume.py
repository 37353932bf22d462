"""A run that is killed and resumed is the run that was never killed, bit for bit."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

OPTIONS = [
    "--budget", "0.9", "--seed", "3", "--batch.capacity", "64", "--batch.micro-batches", "2", "--selection.round-steps", "2",
    "--selection.calibrate-every", "3", "--selection.sketch-dim", "8", "--optimizer.lr", "1e-3", "--runtime.precision", "fp32",
    "--checkpoint-every", "2",
]  # fmt: skip
TIMES = ("step_seconds", "tokens_per_second", "selection_seconds", "scoring_seconds", "memory_bytes", "mfu")


def command(pool: Path, model: Path, out: Path, *extra: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    arguments = ["train", "--pool", str(pool), "--model", str(model), "--out", str(out), *OPTIONS, *extra]
    return [sys.executable, *launcher, "-m", "lead_engine", *arguments]


def lines(path: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in path.read_text().splitlines()]


def run(line: list[str]) -> None:
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def kill_after_checkpoint(line: list[str], out: Path) -> None:
    """Start a run and SIGKILL it, launcher and ranks, as soon as a second checkpoint is complete."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while len(list(out.glob("checkpoints/step-*/COMPLETE"))) < 2:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.01)
    # torchrun gives each rank a session of its own: a process group's signal would leave them training on.
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in everyone:
        each.kill()
    process.wait()
    psutil.wait_procs(everyone, timeout=30)
    assert not (out / "summary.json").exists(), "the run was over before it was killed; make it longer"


MIXTURE = ["--selection.draw", "mixture", "--selection.ranking", "soft", "--selection.unseen", "drift"]
PAPER = ["--recipe", "paper"]
RUNS = {
    "paper": (1, 900, PAPER),
    "lead on two ranks": (2, 900, []),
    "mixture, soft, drift": (1, 600, MIXTURE),
    "rescore": (1, 150, ["--method", "rescore"]),
}
"""Ranks, samples, options."""


@pytest.mark.parametrize("which", RUNS)
@pytest.mark.timeout(300)
def test_resumed_run_is_the_uninterrupted_one(which: str, make_pool, make_model, tmp_path: Path) -> None:
    ranks, samples, options = RUNS[which]
    pool, model = make_pool(samples=samples), make_model("llama")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(command(pool, model, whole, *options, ranks=ranks))
    kill_after_checkpoint(command(pool, model, parted, *options, ranks=ranks), parted)
    run(command(pool, model, parted, *options, "--resume", ranks=ranks))

    expected, resumed = (load_file(folder / "model" / "model.safetensors") for folder in (whole, parted))
    assert expected.keys() == resumed.keys()
    for name in expected:
        assert torch.equal(expected[name], resumed[name]), name
    assert lines(whole / "metrics.jsonl") == lines(parted / "metrics.jsonl")
    assert lines(whole / "selection.jsonl") == lines(parted / "selection.jsonl")
    with np.load(whole / "utility.npz") as a, np.load(parted / "utility.npz") as b:
        for name in a.files:
            assert np.array_equal(a[name], b[name]), name
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (whole, parted))
    assert one["fingerprint"] == two["fingerprint"]
    assert one["rounds"] == two["rounds"] > 4
    assert (one["scoring_seconds"] > 0) == (two["scoring_seconds"] > 0) == (which == "rescore")


@pytest.mark.timeout(300)
def test_checkpoint_of_two_ranks_goes_on_with_one(make_pool, make_model, tmp_path: Path) -> None:
    pool, model = make_pool(samples=900), make_model("llama")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(command(pool, model, whole))
    kill_after_checkpoint(command(pool, model, parted, ranks=2), parted)
    run(command(pool, model, parted, "--resume"))
    one, two = lines(whole / "metrics.jsonl"), lines(parted / "metrics.jsonl")
    assert [line["tokens"] for line in one] == [line["tokens"] for line in two]
    assert [line["ids"] for line in lines(whole / "selection.jsonl")] == [line["ids"] for line in lines(parted / "selection.jsonl")]
    np.testing.assert_allclose([line["loss"] for line in one], [line["loss"] for line in two], rtol=2e-5)


def test_a_run_is_not_overwritten_and_not_resumed_under_other_options(make_pool, make_model, run_cli, tmp_path: Path) -> None:
    pool, model, out = make_pool(samples=60), make_model("llama"), tmp_path / "run"
    arguments = ["train", "--pool", pool, "--model", model, "--out", out, "--budget", "0.2", "--batch.capacity", "64"]
    arguments += ["--optimizer.lr", "1e-3"]
    first = run_cli(*arguments)
    assert first.returncode == 0, first.stderr
    before = (out / "metrics.jsonl").read_bytes()
    again = run_cli(*arguments)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    (out / "summary.json").unlink()
    other = run_cli(*arguments[:-1], "1e-2", "--resume")
    assert other.returncode == 2
    assert "optimizer" in other.stderr
    assert (out / "metrics.jsonl").read_bytes() == before
