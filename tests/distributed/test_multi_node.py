"""Two torchrun agents, as on two machines, train one run in a shared folder: bit for bit as two ranks on one machine.

Each agent is a process of its own with a worker of its own (LOCAL_RANK 0 on both). They meet by a c10d rendezvous on
loopback.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

import runs
from ranks import free_port

pytestmark = pytest.mark.slow

OPTIONS = [*runs.OPTIONS, "--budget", "0.6", "--checkpoint-every", "2"]
TIMES = ("seconds", "second", "time", "eta", "mfu", "memory")
"""Parts of the names of what differs from run to run."""
LIMIT = 100
ENVIRONMENT = {
    "COLUMNS": "120",
    # Without it, workers restarted on several nodes meet in the store that still has the dead ones' addresses; see
    # docs/SCALE.md.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


class Agents:
    """One torchrun on each of two "nodes", for one command line."""

    def __init__(self, arguments: list[str], folder: Path, restarts: int = 0) -> None:
        port, name = free_port(), f"test-{os.getpid()}"
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--nproc-per-node",
            "1",
            "--rdzv-backend",
            "c10d",
        ]
        torchrun += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", name]
        torchrun += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
        folder.mkdir()
        self.logs = [(folder / f"node{node}.out", folder / f"node{node}.err") for node in range(2)]
        self.processes = []
        for out, err in self.logs:
            with out.open("w") as out_file, err.open("w") as err_file:
                line = [*torchrun, "-m", "lead_engine", *arguments]
                self.processes.append(
                    subprocess.Popen(line, stdout=out_file, stderr=err_file, env={**os.environ, **ENVIRONMENT})
                )

    def workers(self) -> dict[int, psutil.Process]:
        """RANK -> the worker process; those that live."""
        found = {}
        for agent in self.processes:
            for child in psutil.Process(agent.pid).children():
                try:
                    environment = child.environ()
                except psutil.Error:  # it ended meanwhile
                    continue
                if "RANK" in environment:
                    assert environment["LOCAL_RANK"] == "0"
                    found[int(environment["RANK"])] = child
        return found

    def wait(self) -> list[int]:
        return [process.wait(LIMIT) for process in self.processes]

    def output(self) -> str:
        return "".join(path.read_text() for pair in self.logs for path in pair)

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    each.kill()
                process.wait()


@pytest.fixture
def start_agents() -> Iterator[Callable[..., Agents]]:
    started = []

    def start(*arguments: Any, folder: Path, restarts: int = 0) -> Agents:
        started.append(Agents([str(argument) for argument in arguments], folder, restarts))
        return started[-1]

    yield start
    for agents in started:
        agents.kill()


def lines(path: Path) -> list[dict[str, Any]]:
    """A log's lines without what the clock says."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(word in k for word in TIMES)} for line in found]


def assert_same_run(one: Path, two: Path) -> None:
    """Losses, choices, utilities and weights, bit for bit; every step and round logged once."""
    for name in ("metrics.jsonl", "selection.jsonl"):
        assert lines(one / name) == lines(two / name), name
    steps = [line["step"] for line in lines(two / "metrics.jsonl")]
    assert steps == list(range(len(steps)))
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with np.load(one / "utility.npz") as a, np.load(two / "utility.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert summaries[0]["fingerprint"] == summaries[1]["fingerprint"]
    assert summaries[0]["world_size"] == summaries[1]["world_size"] == 2


@pytest.fixture(scope="module")
def one_node(
    make_pool: Any, make_model: Any, run_ranks: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Any]]:
    """(the run of two ranks on one node, its arguments without --out)."""
    out = tmp_path_factory.mktemp("one-node") / "run"
    arguments = ["train", "--pool", make_pool(samples=300), "--model", make_model("llama"), *OPTIONS]
    run_ranks(*arguments, "--out", out, ranks=2, timeout=LIMIT)
    return out, arguments


@pytest.mark.timeout(300)
def test_two_nodes_train_what_one_does(one_node: tuple[Path, list[Any]], start_agents: Any, tmp_path: Path) -> None:
    expected, arguments = one_node
    agents = start_agents(*arguments, "--out", tmp_path / "run", "--resume", folder=tmp_path / "logs")
    assert agents.wait() == [0, 0], agents.output()[-5000:]
    assert_same_run(expected, tmp_path / "run")
    # Rank 0 speaks, and nobody else: which of the agents has it, the rendezvous decides.
    spoken = sorted(out.read_text() for out, _ in agents.logs)
    assert spoken[0] == ""
    assert "tokens in" in spoken[1]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


@pytest.mark.timeout(300)
def test_a_killed_worker_is_restarted_and_the_run_goes_on(
    one_node: tuple[Path, list[Any]], start_agents: Any, tmp_path: Path
) -> None:
    """--max-restarts 1 and --resume: torchrun starts all workers anew, and they go on from the last checkpoint.

    Rank 0 dies: the one that writes the logs and keeps the workers' store.
    """
    expected, arguments = one_node
    out = tmp_path / "run"
    agents = start_agents(*arguments, "--out", out, "--resume", folder=tmp_path / "logs", restarts=1)
    deadline = time.monotonic() + LIMIT
    while not list(out.glob("checkpoints/step-*/COMPLETE")):
        assert time.monotonic() < deadline, agents.output()[-5000:]
        assert all(process.poll() is None for process in agents.processes), agents.output()[-5000:]
        time.sleep(0.01)
    first = agents.workers()
    first[0].send_signal(signal.SIGKILL)
    assert not (out / "summary.json").exists(), "the run was over before a worker was killed; make it longer"
    assert agents.wait() == [0, 0], agents.output()[-5000:]
    assert_same_run(expected, out)
    assert not any(worker.is_running() for worker in first.values())


@pytest.mark.timeout(300)
def test_a_restart_in_the_store_of_the_first_attempt(
    one_node: tuple[Path, list[Any]], start_ranks: Any, tmp_path: Path
) -> None:
    """As torch 2.13's torchrun restarts the workers of one node: the store still has the dead ones' addresses."""
    expected, arguments = one_node
    out = tmp_path / "run"
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1"}
    first = start_ranks(
        *arguments, "--out", out, "--resume", ranks=2, env={**torchrun, "TORCHELASTIC_RESTART_COUNT": "0"}
    )
    deadline = time.monotonic() + LIMIT
    while not list(out.glob("checkpoints/step-*/COMPLETE")):
        assert time.monotonic() < deadline, first.output()[-5000:]
        time.sleep(0.01)
    first.signal(signal.SIGKILL)
    assert first.wait() == [-signal.SIGKILL] * 2
    second = start_ranks(
        *arguments, "--out", out, "--resume", ranks=2, env={**torchrun, "TORCHELASTIC_RESTART_COUNT": "1"}
    )
    assert second.wait(LIMIT) == [0, 0], second.output()[-5000:]
    assert_same_run(expected, out)
