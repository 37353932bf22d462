from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lead_engine.errors import UserError
from lead_engine.evaluation.launch import run_logged


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


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
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = (
        "import sys; from pathlib import Path; from lead_engine.evaluation.launch import run_logged; "
        f"run_logged([sys.executable, '-S', '-c', {child!r}], Path({str(tmp_path / 'a.log')!r}), 'x')"
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
