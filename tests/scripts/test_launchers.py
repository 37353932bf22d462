"""The launchers for several machines and for Slurm, with the real engine on the CPU.

Of Slurm, `srun` and `scontrol` are stand-ins for one node: what is tested is these scripts and the engine, not Slurm.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from ranks import free_port

pytestmark = pytest.mark.slow

SCRIPTS = ["multi_node.sh", "slurm.sbatch"]
OPTIONS = [
    "--budget",
    "0.9",
    "--seed",
    "3",
    "--batch.capacity",
    "64",
    "--batch.micro-batches",
    "2",
    "--selection.round-steps",
    "2",
    "--lead.sketch-dim",
    "8",
    "--optimizer.lr",
    "1e-3",
    "--runtime.precision",
    "fp32",
]
JOB = "4711"
LIMIT = 100

SRUN = """#!/usr/bin/env bash
# One node's task; signals are passed on to it, as srun does.
printf '%s\\n' "$*" >>"$RECORD/srun"
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=0 "$@" &
task=$!
trap 'kill -USR1 $task' USR1
trap 'kill -TERM $task' TERM
status=0
wait $task || status=$?
while kill -0 $task 2>/dev/null; do status=0; wait $task || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") echo localhost ;;
    *) printf '%s\\n' "$*" >>"$RECORD/scontrol" ;;
esac
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_shell_can_read_it(name: str, repository: Path) -> None:
    script = repository / "scripts" / name
    assert os.access(script, os.X_OK)
    checker = shutil.which("shellcheck")
    line = [checker, "--severity=warning", "--shell=bash"] if checker else ["bash", "-n"]
    done = subprocess.run([*line, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({}, [], "no command given"),
        ({}, ["--pool", "x"], "--pool: the engine's command comes first"),
        ({"NODES": "two"}, ["train"], "NODES=two: must be a whole number of at least 1"),
        ({"NODES": "2"}, ["train"], "HOST: must name one of the 2 machines"),
        ({"GPUS": "0"}, ["train"], "GPUS=0: must be"),
        ({"PORT": ""}, ["train", "--out", "x"], None),
        ({"NODE_RANK": "first"}, ["train"], "NODE_RANK=first: must be"),
        ({"RESTARTS": "1"}, ["train", "--out", "x"], "go on only with --resume"),
        ({"PYTHON": "/nowhere/python"}, ["train"], "PYTHON=/nowhere/python: not found"),
    ],
)
def test_mistakes_are_named(
    environment: dict[str, str], arguments: list[str], message: str | None, repository: Path, tmp_path: Path
) -> None:
    """Before anything is started. An empty variable counts as absent."""
    started = tmp_path / "python"
    started.write_text('#!/usr/bin/env bash\necho "started: $*"\n')
    started.chmod(0o755)
    given = {**os.environ, "PYTHON": str(started), "GPUS": "1", **environment}
    done = subprocess.run(
        [repository / "scripts" / "multi_node.sh", *arguments], env=given, capture_output=True, text=True, check=False
    )
    if message is None:
        assert done.returncode == 0, done.stderr
        assert "started: -m torch.distributed.run --nnodes 1 --nproc-per-node 1" in done.stdout
        assert "--rdzv-endpoint 127.0.0.1:29400" in done.stdout
    else:
        assert done.returncode == 2
        assert message in done.stderr
        assert "started" not in done.stdout


def test_the_line_of_a_machine_among_several(repository: Path, tmp_path: Path) -> None:
    """What torchrun is given, word for word."""
    started, record = tmp_path / "python", tmp_path / "record"
    started.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" >"$RECORD"\n')
    started.chmod(0o755)
    given = {
        "NODES": "4",
        "HOST": "first",
        "PORT": "5000",
        "GPUS": "8",
        "RUN_ID": "a b",
        "NODE_RANK": "0",
        "ADDRESS": "10.0.0.1",
    }
    given |= {"RESTARTS": "2", "PYTHON": str(started), "RECORD": str(record)}
    arguments = ["train", "--out", "with space", "--resume", "--runtime.replicate", "4"]
    line = [repository / "scripts" / "multi_node.sh", *arguments]
    subprocess.run(line, env={**os.environ, **given}, check=True, capture_output=True)
    expected = ["-m", "torch.distributed.run", "--nnodes", "4", "--nproc-per-node", "8", "--rdzv-backend", "c10d"]
    expected += [
        "--rdzv-endpoint",
        "first:5000",
        "--rdzv-id",
        "a b",
        "--rdzv-conf",
        "is_host=1",
        "--local-addr",
        "10.0.0.1",
    ]
    expected += ["--max-restarts", "2", "-m", "lead_engine", *arguments, "1"]
    assert record.read_text().splitlines() == expected


class Slurm:
    """Stand-ins for one node; every start is Slurm's next start of the same job."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.repository, self.folder, self.starts = repository, folder, 0
        self.started: list[subprocess.Popen] = []
        (folder / "bin").mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def start(self, *arguments: Any, **environment: str) -> subprocess.Popen:
        place = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "RECORD": str(self.folder),
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_RESTART_COUNT": str(self.starts),
            "SLURM_SUBMIT_DIR": str(self.repository),
            "LEAD_ENGINE_ROOT": "",  # scripts/test.sh has set it
            "SLURM_GPUS_ON_NODE": "1",
            "PORT": str(free_port()),
            "PYTHON": sys.executable,
        }
        script = self.folder / "slurm_script"  # a copy, as Slurm makes one
        shutil.copy(self.repository / "scripts" / "slurm.sbatch", script)
        self.starts += 1
        with self.log.open("w") as log:
            line = ["bash", str(script), *map(str, arguments)]
            process = subprocess.Popen(
                line, env={**os.environ, **place, **environment}, stdout=log, stderr=subprocess.STDOUT
            )
        self.started.append(process)
        return process

    @property
    def log(self) -> Path:
        return self.folder / f"start-{self.starts}.log"

    def record(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    job = Slurm(repository, tmp_path_factory.mktemp("slurm"))
    yield job
    for process in job.started:
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)


def has_trained(out: Path) -> bool:
    metrics = out / "metrics.jsonl"
    return metrics.exists() and len(metrics.read_bytes()) > 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.timeout(300)
def test_a_job_gives_way_and_goes_on(
    number: signal.Signals, slurm: Slurm, make_pool: Any, make_model: Any, run_ranks: Any, tmp_path: Path
) -> None:
    """First start, signal -> checkpoint -> queued again; second start -> the run that was never stopped, bit for
    bit.
    """
    out = tmp_path / "run"
    arguments = ["--pool", make_pool(samples=500), "--model", make_model("llama"), *OPTIONS]
    # torchrun may start workers again, but not those that have stopped for the signal.
    first = slurm.start(*arguments, "--out", out, RESTARTS="1")
    wait_until(lambda: has_trained(out), first, slurm.log)
    first.send_signal(number)
    assert first.wait(LIMIT) == 0, slurm.log.read_text()[-3000:]
    assert slurm.record("scontrol") == [f"requeue {JOB}"]
    assert not (out / "summary.json").exists(), "the run was over before it was stopped; make it longer"
    assert len(list(out.glob("checkpoints/step-*/COMPLETE"))) == 1
    assert "attempts" not in slurm.log.read_text()
    assert not [p for p in psutil.process_iter() if str(out) in " ".join(quiet_line(p))], (
        "something of the first start still runs"
    )

    if number == signal.SIGTERM:
        return  # what follows does not depend on the signal
    second = slurm.start(*arguments, f"--out={out}")
    assert second.wait(LIMIT) == 0, slurm.log.read_text()[-3000:]
    assert slurm.record("scontrol") == [f"requeue {JOB}"], "a complete run was queued again"
    assert f"{out} is complete" in slurm.log.read_text()
    assert [line.split()[:2] for line in slurm.record("srun")] == [["--ntasks-per-node=1", "--kill-on-bad-exit=0"]] * 2

    run_ranks("train", *arguments, "--out", tmp_path / "whole", ranks=1, timeout=LIMIT)
    assert_same(tmp_path / "whole", out)


def quiet_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def assert_same(one: Path, two: Path) -> None:
    steps = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, two)
    ]
    assert [(line["step"], line["loss"]) for line in steps[0]] == [(line["step"], line["loss"]) for line in steps[1]]
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.timeout(200)
def test_a_run_that_fails_is_not_queued_again(slurm: Slurm, make_model: Any, tmp_path: Path) -> None:
    process = slurm.start("--pool", tmp_path / "nowhere", "--model", make_model("llama"), "--out", tmp_path / "run")
    assert process.wait(LIMIT) != 0
    said = slurm.log.read_text()
    assert "nowhere" in said
    assert "failed by itself" in said
    assert slurm.record("scontrol") == []


def test_job_mistakes_are_named(slurm: Slurm, tmp_path: Path) -> None:
    for arguments, environment, message in (
        ([], {}, "--out RUN: must be given"),
        (
            ["--out", "x"],
            {"SLURM_SUBMIT_DIR": str(tmp_path)},
            "submit from the repository's root or set LEAD_ENGINE_ROOT",
        ),
        (["--out", "x"], {"SLURM_JOB_ID": ""}, "submit this with sbatch"),
    ):
        process = slurm.start(*arguments, **environment)
        assert process.wait(LIMIT) == 2
        assert message in slurm.log.read_text()
    assert slurm.record("srun") == []
