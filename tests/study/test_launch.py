from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lead_engine.base.errors import UserError
from lead_engine.study.launch import child_environment, end, start, threads_of


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def run_logged(command: list[str], log: Path, what: str) -> None:
    child = start(command, log, what)
    while not child.finished():
        time.sleep(0.005)


def test_output_is_kept_and_added_to_what_was_there(tmp_path: Path) -> None:
    log = tmp_path / "runs" / "a.log"
    run_logged(python("import sys; print('out'); print('err', file=sys.stderr)"), log, "first")
    run_logged(python("print('second')"), log, "second")
    lines = log.read_text().splitlines()
    assert [line for line in lines if not line.startswith("$ ")] == ["out", "err", "second"]
    assert lines[0].startswith(f"$ {sys.executable}")


def test_a_failure_shows_the_end_of_its_own_output(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    run_logged(python("print('of the run before')"), log, "first")
    code = "import sys; [print('line', i) for i in range(40)]; sys.exit(2)"
    with pytest.raises(UserError) as caught:
        run_logged(python(code), log, "training lead-5pct-s0")
    message = str(caught.value)
    assert "training lead-5pct-s0 failed (exit status 2)" in message
    assert str(log) in message
    assert "line 39" in message
    assert "line 25\n" in message
    assert "line 24\n" not in message
    with pytest.raises(UserError, match=r"(?s)signal 9.*\(no output\)"):
        run_logged(python("import os; os.kill(os.getpid(), 9)"), log, "x")


def test_children_do_not_believe_that_a_launcher_started_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "yes")
    run_logged(python("import os; print(sorted(os.environ))"), tmp_path / "a.log", "x")
    names = (tmp_path / "a.log").read_text().splitlines()[1]
    assert "'KEPT'" in names
    assert not any(f"'{name}'" in names for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"))


def test_an_interrupt_ends_the_child(tmp_path: Path) -> None:
    """Ctrl-C in `compare` must not leave a training run behind."""
    pid_file = tmp_path / "pid"
    # It writes late, so that its parent has gone on from starting it to waiting for it.
    child = f"import os, time; time.sleep(1); open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = (
        "from pathlib import Path; from lead_engine.study.launch import start; "
        "from lead_engine.study.jobs import Task, run_tasks; import sys; "
        f"steps = iter([start([sys.executable, '-S', '-c', {child!r}], Path({str(tmp_path / 'a.log')!r}), 'x')]); "
        "run_tasks([Task('a', steps)], 1, print)"
    )
    # A suite that runs in the background of a shell inherits SIGINT as ignored.
    listens = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.DEVNULL, preexec_fn=listens)
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(30)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


@pytest.mark.slow
def test_forked_commands_write_to_their_log_and_their_status_decides(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    run_logged([sys.executable, "-m", "lead_engine", "--version"], log, "first")
    assert "lead-engine" in log.read_text().splitlines()[1]
    with pytest.raises(UserError, match=r"(?s)second failed \(exit status 2\).*--config nowhere\.yaml"):
        run_logged([sys.executable, "-m", "lead_engine", "train", "--config", "nowhere.yaml"], log, "second")


def test_forked_commands_can_be_ended(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lead_engine",
        "make-pool",
        "--out",
        str(tmp_path / "pool"),
        "--samples",
        "100000000",
    ]
    children = [start(command, tmp_path / f"{i}.log", "x") for i in range(2)]
    assert not any(child.finished() for child in children)
    end(children)
    assert [child.process.exitcode for child in children] == [-signal.SIGTERM] * 2


def test_jobs_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert [threads_of(jobs, 1) for jobs in (1, 2, 3, 32)] == [None, 8, 5, 1]
    assert threads_of(2, 4) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert child_environment(8)["OMP_NUM_THREADS"] == "3"
    assert child_environment(2)["OMP_NUM_THREADS"] == "2"
    assert child_environment(None)["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert child_environment(8)["OMP_NUM_THREADS"] == "8"
    assert "OMP_NUM_THREADS" not in child_environment(None)
