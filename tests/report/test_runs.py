from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lead_engine.base.errors import UserError
from lead_engine.report.runs import read_collection, read_run, smooth


def test_smoothing_is_a_weighted_mean_that_does_not_shift_a_line() -> None:
    steps = np.arange(200, dtype=float)
    assert smooth(3 + 0.5 * steps, np.ones(200)) == pytest.approx(3 + 0.5 * steps)
    values, weights = np.random.default_rng(0).normal(size=(2, 200))
    weights = np.abs(weights)
    smoothed = smooth(values, weights)
    assert smoothed[100] == pytest.approx(np.average(values[95:106], weights=weights[95:106]))
    assert smoothed[2] == pytest.approx(np.average(values[0:5], weights=weights[0:5]))
    assert smoothed[0] == values[0]


def test_smoothing_leaves_out_what_was_not_measured() -> None:
    values = np.array([1.0, np.nan, 3.0] * 20)
    smoothed = smooth(values, np.ones(60))
    assert smoothed[1] == 2.0
    assert np.isfinite(smoothed).all()


def test_a_line_that_was_cut_while_it_was_written_does_not_count(synthetic: ModuleType, tmp_path: Path) -> None:
    run = synthetic.make_run(tmp_path / "run")
    steps = len(read_run(run).metrics)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "lo')
    assert len(read_run(run).metrics) == steps


def test_repeated_steps_of_a_resumed_run_count_once_and_the_last_stands(synthetic: ModuleType, tmp_path: Path) -> None:
    run = synthetic.make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text()
    again = lines.splitlines()[3].replace('"loss": ', '"loss": 100')
    (run / "metrics.jsonl").write_text(f"{lines}{again}\n")
    before, after = lines.count("\n"), read_run(run).metrics
    assert len(after) == before
    assert after[3]["loss"] > 100
    assert [line["step"] for line in after] == list(range(before))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 0}\nnonsense\n{"step": 1}\n', "metrics.jsonl:2: damaged"),
        ("metrics.jsonl", '{"loss": 0}\n', "metrics.jsonl: a line has no step"),
        ("selection.jsonl", "[1]\n", "selection.jsonl:1: expected an object"),
        ("summary.json", "{", "summary.json: damaged"),
        ("utility.npz", "PK", "utility.npz: damaged"),
        ("eval/eval.json", "{}", "eval.json: not a result of"),
        ("config.yaml", "a: 1\n", "config.yaml: no method, seed, budget"),
    ],
)
def test_damaged_files_are_named(synthetic: ModuleType, tmp_path: Path, file: str, text: str, message: str) -> None:
    run = synthetic.make_run(tmp_path / "run")
    (run / file).write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(run)


def test_folders_that_are_no_runs_are_refused(synthetic: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run folder"):
        read_collection([tmp_path])
    with pytest.raises(UserError, match="neither a run folder"):
        read_collection([tmp_path / "absent"])
    (tmp_path / "config.yaml").write_text("method: lead\n")
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read_collection([tmp_path])
    run = synthetic.make_run(tmp_path / "run")
    with pytest.raises(UserError, match="more than once"):
        read_collection([run, tmp_path / "run" / ".." / "run"])


def test_a_compare_folder_stands_for_its_runs(synthetic: ModuleType, tmp_path: Path) -> None:
    study = synthetic.make_study(tmp_path / "study", seeds=2, budgets=(0.05,))
    collection = read_collection([study])
    assert [run.name for run in collection.runs] == [
        "full-100pct-s0",
        "full-100pct-s1",
        "lead-5pct-s0",
        "lead-5pct-s1",
        "random-5pct-s0",
        "random-5pct-s1",
    ]
    assert list(collection.groups) == [("lead", 0.05), ("random", 0.05), ("full", None)]
    assert [run.seed for run in collection.groups["lead", 0.05]] == [0, 1]
    assert collection.base is not None
    assert len(collection.verdicts) == 1


def test_runs_of_the_same_folder_name_are_told_apart(synthetic: ModuleType, tmp_path: Path) -> None:
    runs = [synthetic.make_run(tmp_path / where / "run") for where in ("a", "b")]
    assert [run.name for run in read_collection(runs).runs] == ["a/run", "b/run"]


def test_evaluation_alone_is_no_run(synthetic: ModuleType, tmp_path: Path) -> None:
    synthetic.make_evaluation(tmp_path / "run" / "eval", 0.1)
    with pytest.raises(UserError, match="neither a run folder"):
        read_collection([tmp_path / "run"])


def test_evaluations_on_other_held_out_records_are_told(synthetic: ModuleType, tmp_path: Path) -> None:
    runs = [synthetic.make_run(tmp_path / name) for name in "abc"]
    for run, digest in zip(runs, "xyx", strict=True):
        path = run / "eval" / "eval.json"
        sources = [{"name": "heldout.jsonl", "bytes": 9, "digest": digest}]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": {"sources": sources}}))
    (told,) = read_collection(runs).warnings
    why = "heldout.jsonl has other contents (9 bytes for a, 9 here)"
    assert told.startswith(f"b: evaluated on other held-out records than a ({why}")


def test_evaluations_of_other_tokens_of_the_same_records_are_told(synthetic: ModuleType, tmp_path: Path) -> None:
    """--max-length cut them, or the tokenizer is another one."""
    runs = [synthetic.make_run(tmp_path / name) for name in "ab"]
    assert not read_collection(runs).warnings
    path = runs[1] / "eval" / "eval.json"
    result = json.loads(path.read_text())
    tasks = result["loss"]["tasks"].values()
    samples, tokens = (sum(task[key] for task in tasks) for key in ("samples", "tokens"))
    next(iter(tasks))["tokens"] -= 1
    path.write_text(json.dumps(result))
    (told,) = read_collection(runs).warnings
    assert f"{samples:,} and {tokens:,} for a, {samples:,} and {tokens - 1:,} here); losses do not compare" in told
