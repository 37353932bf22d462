"""Child processes that run the engine's own commands, with their output in a log file.

A command of one rank is forked from a server process that has imported the engine once, because importing torch and
transformers takes seconds of processor time, which a short run would pay twice (train, eval). Commands under torchrun
are new processes.
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
"""Of a failed command's log, in the error message."""
GRACE_SECONDS = 20.0
"""Between the request to end and the use of force."""
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
"""What `train` and `eval` import. None of these modules may start threads or touch a GPU on import, because neither
survives a fork. (The thread of pyarrow's allocator does: jemalloc starts it again.)"""
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
        """Whether the process has ended. Raises UserError with the log's last lines if it failed."""
        status = self._status()
        if status is None:
            return False
        if status != 0:
            how = f"exit status {status}" if status > 0 else f"signal {-status}"
            raise UserError(
                f"{self.what} failed ({how}); what is complete is kept. {self.log} ends:\n{_tail(self.log, self.start)}"
            )
        return True

    def wait(self, seconds: float) -> bool:
        """Wait at most so long for the process to end. Returns whether it has."""
        if isinstance(self.process, subprocess.Popen):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        else:
            self.process.join(seconds)
        return self._status() is not None

    def _status(self) -> int | None:
        """The exit status; minus the signal's number if one ended it; None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode


def start(command: list[str], log: Path, what: str, threads: int | None = None) -> Child:
    """Start a command whose output is appended to `log`.

    what: the command in the words of an error message. threads: the most that it may compute with; None leaves that to
    torch. The first command starts the server that forks, which keeps that command's environment and threads.
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
    """Ask the children that still run to end; kill those that have not after `GRACE_SECONDS`."""
    children = list(children)
    for child in children:
        child.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        if not child.wait(max(0.0, deadline - time.monotonic())):
            child.process.kill()
            child.wait(GRACE_SECONDS)


def threads_of(jobs: int, ranks: int) -> int | None:
    """Threads for each of `jobs` x `ranks` processes that share the cores; None for one job, which torch may decide."""
    if jobs == 1:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (jobs * ranks))


def child_environment(threads: int | None) -> dict[str, str]:
    """This process's environment without a launcher's variables, so that a child is not taken for one of its ranks."""
    launcher = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    dropped = {name for name in os.environ if name in launcher or name.startswith("TORCHELASTIC")}
    kept = {name: os.environ[name] for name in os.environ.keys() - dropped} | {"PYTHONUNBUFFERED": "1"}
    if threads is not None:
        set_by_user = kept.get("OMP_NUM_THREADS", "")
        kept["OMP_NUM_THREADS"] = str(min(threads, int(set_by_user)) if set_by_user.isdigit() else threads)
    return kept


def _fork(arguments: list[str], log: Path, environment: dict[str, str]) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run_command, args=(arguments, str(log)))
    # The first start also starts the server, which inherits the environment before it imports torch.
    with _environment(environment):
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
    """Run one command of the engine in the forked process, which ends with the command's exit status."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115  open until the process ends
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = ["lead-engine", *arguments]
    runpy.run_module("lead_engine", run_name="__main__", alter_sys=True)


def _tail(log: Path, start: int) -> str:
    """The log's last lines, of those that the command itself wrote."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-SHOWN_LINES:]) or "  (no output)"
