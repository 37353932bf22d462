"""Starting the engine's own commands as processes, with their output in a log file.

A command of one rank is forked from a server process that has imported the engine once: importing torch and transformers
takes seconds of processor time, which short runs would pay twice each. Commands under torchrun are started afresh.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from lead_engine.base.errors import UserError

SHOWN_LINES = 15
GRACE_SECONDS = 20.0
PRELOADED = [
    "lead_engine.cli",
    "lead_engine.config.from_yaml",
    "lead_engine.training.train",
    "lead_engine.evaluation.evaluate",
    "pandas",
    "pyarrow.dataset",
    "torch.utils.tensorboard",
    "tyro",
]
"""What `train` and `eval` import. Nothing of it may start threads or touch a GPU on import: neither survives a fork. (The thread
of pyarrow's allocator does: jemalloc starts it anew.)"""
ENGINE = ["-m", "lead_engine"]


@dataclass
class Child:
    """A command that was started."""

    what: str
    log: Path
    start: int
    """Where its own output begins in the log."""
    process: subprocess.Popen[bytes] | BaseProcess

    def finished(self) -> bool:
        """Whether it has ended. Raises UserError with the log's last lines if it failed."""
        status = self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode
        if status is None:
            return False
        if status != 0:
            how = f"exit status {status}" if status > 0 else f"signal {-status}"
            raise UserError(
                f"{self.what} failed ({how}); what is complete is kept. {self.log} ends:\n{_tail(self.log, self.start)}"
            )
        return True

    def wait(self, seconds: float) -> bool:
        """Wait so long for the end, however it ends; whether it came."""
        if isinstance(self.process, subprocess.Popen):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
            return self.process.poll() is not None
        self.process.join(seconds)
        return self.process.exitcode is not None


def start(command: list[str], log: Path, what: str, threads: int | None = None) -> Child:
    """Start a command; its output is added to `log`. `threads`: most that it may compute with; None leaves that to torch.

    The server that forks is started by the first command and keeps that one's environment and number of threads.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        begin = output.tell()
        environment = child_environment(threads)
        if command[1:3] == ENGINE:
            return Child(what, log, begin, _fork(command[3:], log, environment))
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        return Child(what, log, begin, process)


def end(children: Iterable[Child]) -> None:
    """End children that are still running: politely, and after some seconds by force."""
    children = list(children)
    for child in children:
        child.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        if not child.wait(max(0.0, deadline - time.monotonic())):
            child.process.kill()
            child.wait(GRACE_SECONDS)


def threads_of(jobs: int, ranks: int) -> int | None:
    """Threads for each of `jobs` x `ranks` processes at a time, so that they share the cores; None: one job may use them as it likes."""
    if jobs == 1:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (jobs * ranks))


def child_environment(threads: int | None) -> dict[str, str]:
    """This process's environment without what a launcher may have put there for it; children start afresh."""
    launcher = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    dropped = {name for name in os.environ if name in launcher or name.startswith("TORCHELASTIC")}
    kept = {name: os.environ[name] for name in os.environ.keys() - dropped} | {"PYTHONUNBUFFERED": "1"}
    if threads is not None:
        told = kept.get("OMP_NUM_THREADS", "")
        kept["OMP_NUM_THREADS"] = str(min(threads, int(told)) if told.isdigit() else threads)
    return kept


def _fork(arguments: list[str], log: Path, environment: dict[str, str]) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run_command, args=(arguments, str(log)))
    with _environment(
        environment
    ):  # the server inherits it when the first process starts it: before torch is imported there
        process.start()
    return process


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: dict[str, str]) -> None:
    for name in os.environ.keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


def _run_command(arguments: list[str], log: str) -> None:
    """In the forked process: one command of the engine, which ends the process with its exit status."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, encoding="utf-8", closefd=False) for stream in (1, 2))  # noqa: SIM115
    sys.argv = ["lead-engine", *arguments]
    runpy.run_module("lead_engine", run_name="__main__", alter_sys=True)


def _tail(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-SHOWN_LINES:]) or "  (no output)"
