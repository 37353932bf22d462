"""Running the engine's own commands as processes, with their output in a log file."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from lead_engine.errors import UserError
from lead_engine.evaluation.study import child_environment

SHOWN_LINES = 15
GRACE_SECONDS = 20.0


def run_logged(command: list[str], log: Path, what: str) -> None:
    """Run a command to its end; its output is added to `log`.

    Raises UserError with the log's last lines if it fails. If this process is interrupted, the child is ended first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        started = output.tell()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=child_environment())
        try:
            status = child.wait()
        except BaseException:
            _end(child)
            raise
    if status != 0:
        how = f"exit status {status}" if status > 0 else f"signal {-status}"
        raise UserError(f"{what} failed ({how}); what is complete is kept. {log} ends:\n{_tail(log, started)}")


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _tail(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-SHOWN_LINES:]) or "  (no output)"
