from __future__ import annotations

import contextlib
import io
import sys

import pytest

from lead_engine.base import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_output_has_no_control_codes_and_keeps_brackets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.say("[bold]run[/bold] [/x] " + "long " * 60)
    console.warn("budget [2.5 %]")
    console.table("Runs [all]", ["method", "loss"], [["lead[0]", 2.34567], ["random", None]])
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert out.startswith("[bold]run[/bold] [/x] " + "long " * 59)
    assert err == "warning: budget [2.5 %]\n"
    assert "| lead[0] | 2.346 |" in out
    assert "| random  |     - |" in out


def test_lines_of_progress_come_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress(1000, "scoring") as bar:
        for i in range(1000):
            bar.advance(loss=i / 100)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("scoring: 100/1,000 (10 %), ")
    assert lines[-1].startswith("scoring: 1,000/1,000 (100 %), ")
    assert lines[-1].endswith("loss 9.99")


def test_lines_of_progress_come_by_time_where_no_total_is_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress(None, "reading") as bar:
        for _ in range(40):
            now += 1.0
            bar.advance(5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["reading: 75", "reading: 150", "reading: 200"]


def test_time_left_is_by_the_speed_of_this_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run begins in the middle; what was done before it says nothing about its speed."""
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress(1000, "training", done=600) as bar:
        for _ in range(4):
            now += 10.0
            bar.advance(100)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training: 700/1,000 (70 %), 10.0 s, 30.0 s left"
    assert lines[-1] == "training: 1,000/1,000 (100 %), 40.0 s"


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    console.say("x")
    console.warn("x")
    console.table("x", ["a"], [[1]])
    with console.progress(2, "x") as bar:
        bar.advance(2, loss=1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [True, False])
def test_nested_and_failing_blocks(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress(2, "runs") as outer:
        with contextlib.suppress(RuntimeError), console.progress(4, "steps") as inner:
            inner.advance(loss=1.0)
            console.say("said inside")
            raise RuntimeError
        outer.advance()
        with console.progress(4, "steps") as inner:
            inner.advance(4)
        outer.advance()
    with console.progress(1, "after") as bar:
        bar.advance()
    text = stream.getvalue()
    assert "said inside" in text
    assert "after" in text
    assert ("\x1b" in text) == terminal


def test_a_row_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells under 1 columns"):
        console.table("t", ["a"], [[1, 2]])
