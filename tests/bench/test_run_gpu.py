"""bench/run_gpu.sh without a GPU: every part runs dry, a part keeps to its time, and a failure loses nothing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import launches
import pytest
import run_gpu
import torch

pytestmark = pytest.mark.slow

ROOT = run_gpu.ROOT


@pytest.mark.timeout(300)
def test_every_step_runs_dry(tmp_path: Path) -> None:
    """Real processes at tiny sizes: what the flags of every benchmark and command mean is checked by using them."""
    command = [
        ROOT / "bench" / "run_gpu.sh",
        "--part",
        *"ABCDEF",
        "--dry",
        "--results",
        tmp_path / "results",
        "--work",
        tmp_path / "work",
    ]
    run = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    for part in run_gpu.PARTS:
        summary = json.loads((tmp_path / "results" / f"summary-{part}.json").read_text())
        assert set(summary["steps"].values()) == {"done"}
        assert "absent" not in summary, summary
        with tarfile.open(tmp_path / "results" / f"logs-{part}.tar.gz") as archive:
            assert len(archive.getnames()) == len(summary["steps"])
        wanted = [name for step in run_gpu.PARTS[part](flags(tmp_path), tmp_path / "work") for name in step.results]
        assert len(wanted) + 2 <= run_gpu.MOST_FILES


def test_launches_are_counted_and_failures_are_results(tmp_path: Path, make_pool, make_model, monkeypatch) -> None:
    """On a CPU operators can be counted, and nothing can be captured; a part that fails leaves the parts after it."""
    out = tmp_path / "launches.json"
    folders = ["--pool", make_pool(samples=60), "--model", make_model("llama")]
    sizes = ["--capacity", "256", "--round-steps", "2"]
    monkeypatch.setattr("sys.argv", list(map(str, ["launches.py", *folders, *sizes, "--out", out])))
    count = launches.count_round

    def count_round(flags, ranks, compiled):
        if compiled:
            raise MemoryError("no room")
        return count(flags, ranks, compiled)

    monkeypatch.setattr(launches, "count_round", count_round)
    launches.main()
    result = json.loads(out.read_text())["result"]
    assert 20 < result["eager"]["operators of a round's selection"] < 1000
    assert result["eager"]["operators a step"] > 100
    assert result["compiled"] == {"not counted": "MemoryError: no room"}
    if not torch.cuda.is_available():
        assert result["eager"]["launches a step"] is result["eager"]["taken from the device in a round"] is None
        for name in ("selection, graph", "micro-batch, graph", "micro-batch under FSDP, graph"):
            assert result[name] == {"not captured": "RuntimeError: no CUDA device"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_run(tmp_path: Path, capsys) -> None:
    assert run_gpu.main(["--part", "A", "--results", str(tmp_path), "--work", str(tmp_path / "work")]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def flags(tmp_path: Path, seconds: int = 40) -> argparse.Namespace:
    return run_gpu.parse(["--dry", "--seconds", str(seconds), "--results", str(tmp_path), "--work", str(tmp_path)])


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_failure_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    """Steps: one writes half its results and fails, one misses its file, one is too large to copy, one is fine."""
    work, results = tmp_path / "work", tmp_path / "results"
    (work / "logs").mkdir(parents=True)
    results.mkdir()
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_bytes(b'1' * int(sys.argv[2]))"
    steps = [
        run_gpu.Step(
            "half",
            20,
            [*python(write + "; print('the reason'); sys.exit(3)"), str(work / "gpu-a.json"), "5"],
            ["gpu-a.json"],
        ),
        run_gpu.Step("none", 20, python("pass"), ["gpu-b.json"]),
        run_gpu.Step(
            "large", 20, [*python(write), str(work / "gpu-c.json"), str(run_gpu.MOST_BYTES + 1)], ["gpu-c.json"]
        ),
        run_gpu.Step("fine", 20, [*python(write), str(work / "gpu-d.json"), "5"], ["gpu-d.json"]),
    ]
    monkeypatch.setitem(run_gpu.PARTS, "A", lambda *_: steps)
    outcome = run_gpu.run_part(
        "A", argparse.Namespace(seconds=60, results=results, dry=True), work, dict(os.environ), ["x: not installed"]
    )
    assert [text.split(" after")[0] for text in outcome.values()] == ["exit status 3", "done", "done", "done"]
    assert sorted(path.name for path in results.iterdir()) == [
        "gpu-a.json",
        "gpu-d.json",
        "logs-A.tar.gz",
        "summary-A.json",
    ]
    summary = json.loads((results / "summary-A.json").read_text())
    assert summary["absent"] == ["gpu-b.json"]
    assert summary["too_large"][0].startswith("gpu-c.json")
    with tarfile.open(results / "logs-A.tar.gz") as archive:
        assert b"the reason" in archive.extractfile("A-half.log").read()


def test_a_part_keeps_to_its_time(tmp_path: Path, monkeypatch) -> None:
    """A step that hangs is ended with all that it started; what no time is left for is named."""
    (tmp_path / "logs").mkdir()
    marker = tmp_path / "child"
    write_later = f"import time; time.sleep(9); open('{marker}', 'w')"
    hang = f'import subprocess, sys, time; subprocess.Popen([sys.executable, "-c", "{write_later}"])'
    steps = [run_gpu.Step("hangs", 20, python(hang + "; time.sleep(60)")), run_gpu.Step("late", 20, python("pass"))]
    monkeypatch.setitem(run_gpu.PARTS, "A", lambda *_: steps)
    monkeypatch.setattr(run_gpu, "RESERVE_SECONDS", 1)
    started = time.monotonic()
    outcome = run_gpu.run_part(
        "A", argparse.Namespace(seconds=8, results=tmp_path, dry=True), tmp_path, dict(os.environ), []
    )
    assert time.monotonic() - started < 12
    assert outcome == {"hangs": "stopped after 6 s", "late": "not started: the part's time was up"}
    time.sleep(4)
    assert not marker.exists()  # what the step had started was ended too
