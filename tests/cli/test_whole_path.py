"""The whole way through the real command line with tiny settings: pool, base model, preparation, training, evaluation,
report, merge; what each leaves on disk; and that bad input destroys nothing that is there.

What must succeed runs as processes of its own. The many mistakes go through `main` in this process: a fresh one would
spend seconds importing torch for each.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from lead_engine.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TINY = ["--batch.capacity", "256"]
SAMPLES = 200
UMASK = 0o027
"""Of this module; other tests have the usual 022."""

Refused = Callable[[list[str]], str]


@pytest.fixture(scope="module")
def world(run_cli, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data/, base/, prepared/ and run/, each made by its command."""
    place = tmp_path_factory.mktemp("world")

    def must(*arguments: str | Path) -> None:
        result = run_cli(*arguments, cwd=place)
        assert result.returncode == 0, (arguments, result.stdout, result.stderr)
        assert "Traceback" not in result.stderr

    before = os.umask(UMASK)
    must("make-pool", "--out", "data", "--samples", str(SAMPLES))
    text = (place / "data" / "text.txt").read_text().splitlines()[:150]
    (place / "data" / "short.txt").write_text("\n".join(text))
    must("pretrain", "--text", "data/short.txt", "--out", "base", "--vocab-size", "400", "--block", "128", *TINY)
    must(
        "prepare",
        "--pool",
        "data/pool.jsonl",
        "--model",
        "base/model",
        "--out",
        "prepared",
        "--max-length",
        "256",
        *TINY,
    )
    lora = ["--lora.rank", "2", "--selection.round-steps", "2", "--budget", "0.2", "--checkpoint-every", "1"]
    must("train", "--pool", "prepared", "--model", "base/model", "--out", "run", *lora, *TINY)
    must("eval", "--model", "run", "--data", "data/heldout.jsonl", "--max-length", "256", *TINY)
    yield place
    os.umask(before)


@pytest.fixture
def refused(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused(arguments) -> the error's text; fails unless the command ends with status 2 and one error."""
    (world / "broken.jsonl").write_text('{"instruction": "a", "output": ')
    monkeypatch.chdir(world)

    def run(arguments: list[str]) -> str:
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.count("error: ") == 1, said
        return said[said.index("error: ") :]

    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_pool_is_as_long_as_asked(world: Path) -> None:
    assert len(lines(world / "data" / "pool.jsonl")) == SAMPLES


def test_prepared_folder(world: Path) -> None:
    names = {path.name for path in (world / "prepared").iterdir()}
    assert {"store", "tokenizer", "records.parquet", "state.safetensors", "state.json", "summary.json"} <= names
    assert json.loads((world / "prepared" / "summary.json").read_text())["samples"] == SAMPLES


def test_run_folder(world: Path) -> None:
    run = world / "run"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["method"], config["budget"], config["lora"]["rank"]) == ("lead", 0.2, 2)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (run / "model").iterdir()}
    assert any((run / "tensorboard").iterdir())
    assert any((run / "checkpoints").iterdir())


def config_of(world: Path) -> tuple[int, int]:
    """(capacity, micro-batches a step) of the run."""
    batch = yaml.safe_load((world / "run" / "config.yaml").read_text())["batch"]
    return batch["capacity"], batch["micro_batches"]


def test_metrics_and_selection_agree(world: Path) -> None:
    steps, rounds = lines(world / "run" / "metrics.jsonl"), lines(world / "run" / "selection.jsonl")
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert [line["step"] for line in steps] == list(range(len(steps)))
    assert [line["round"] for line in rounds] == list(range(len(rounds)))
    assert sum(line["step_tokens"] for line in steps) == steps[-1]["tokens"] == summary["tokens_trained"]
    assert sum(line["step_samples"] for line in steps) == sum(line["samples"] for line in rounds)
    for line in rounds:
        assert sum(line["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert sum(line["samples_per_task"].values()) == line["samples"] == len(line["ids"])
    capacity, micro_batches = config_of(world)
    for line in rounds:
        mine = [step["step_tokens"] for step in steps if step["round"] == line["round"]]
        assert line["waste"] == pytest.approx(1 - sum(mine) / (len(mine) * micro_batches * capacity), abs=1e-6)
    visits = np.load(world / "run" / "utility.npz")["visits"]
    assert visits.sum() == sum(line["samples"] for line in rounds)


def test_budget_is_kept(world: Path) -> None:
    summary = json.loads((world / "run" / "summary.json").read_text())
    budget = 0.2 * summary["pool_tokens"]
    assert 0.9 * budget <= summary["tokens_trained"] <= budget


def test_evaluation(world: Path) -> None:
    loss = json.loads((world / "run" / "eval" / "eval.json").read_text())["loss"]
    tasks = loss["tasks"].values()
    tokens = sum(task["tokens"] for task in tasks)
    assert loss["overall"] == pytest.approx(sum(task["loss"] * task["tokens"] for task in tasks) / tokens, rel=1e-4)
    assert loss["macro"] == pytest.approx(sum(task["loss"] for task in tasks) / len(tasks), rel=1e-4)
    assert sum(task["samples"] for task in tasks) == len(lines(world / "data" / "heldout.jsonl"))


def test_report_is_one_page(run_cli, world: Path) -> None:
    result = run_cli("report", "run", "--out", "report", cwd=world)
    assert result.returncode == 0, result.stderr
    page = (world / "report" / "index.html").read_text()
    assert "<html" in page
    assert 'src="http' not in page


def test_merge_gives_a_plain_model_and_all_files_have_their_modes(run_cli, world: Path) -> None:
    result = run_cli("merge", "run", "--out", "merged", cwd=world)
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (world / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "adapter_config.json" not in names
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in world.rglob("*") if not path.is_symlink()}
    assert {path: mode for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~UMASK} == {}
    assert {"safetensors", "npz", "parquet", "distcp"} <= {path.name.rsplit(".")[-1] for path in modes}


def test_doctor(run_cli, world: Path) -> None:
    result = run_cli("doctor", cwd=world)
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "--pool", "prepared", "--model", "base/model", "--out", "run", *TINY], "run"),
        (
            ["train", "--pool", "prepared", "--model", "base/model", "--out", "run", "--resume", "--seed", "1", *TINY],
            "run",
        ),
        (["prepare", "--pool", "data/none.jsonl", "--model", "base/model", "--out", "prepared", *TINY], "prepared"),
        (["pretrain", "--text", "data/pool.jsonl", "--out", "base", *TINY], "base"),
        (["merge", "run", "--out", "base"], "base"),
        (["report", "data", "--out", "run"], "run"),
        (["eval", "--model", "run", "--data", "broken.jsonl", *TINY], "run"),
    ],
)
def test_a_refused_command_changes_nothing(refused, world: Path, arguments: list[str], part: str) -> None:
    before = fingerprint(world / part)
    refused(arguments)
    assert fingerprint(world / part) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--pool", "none", "--model", "base/model", "--out", "new"], "none"),
        (["train", "--pool", "data", "--model", "base/model", "--out", "new"], "--pool data"),
        (["train", "--pool", "prepared", "--model", "scratch:nosuch", "--out", "new"], "scratch:nosuch"),
        (["train", "--pool", "prepared", "--model", "no/folder/here", "--out", "new"], "no/folder/here"),
        (["prepare", "--pool", "none.jsonl", "--model", "base/model", "--out", "new"], "none.jsonl"),
        (["prepare", "--pool", "data/pool.jsonl", "--model", "data", "--out", "new"], "data"),
        (["prepare", "--pool", "broken.jsonl", "--model", "base/model", "--out", "new"], "broken.jsonl:1"),
        (["pretrain", "--text", "none.txt", "--out", "new"], "none.txt"),
        (["pretrain", "--text", "data", "--out", "new"], "data"),
        (["eval", "--model", "none", "--data", "data/heldout.jsonl"], "none"),
        (["eval", "--model", "run", "--data", "none.jsonl"], "none.jsonl"),
        (["compare", "--config", "none.yaml", "--out", "new"], "none.yaml"),
        (["report", "none", "--out", "new"], "none"),
        (["merge", "none", "--out", "new"], "none"),
        (["merge", "base", "--out", "new"], "base"),
    ],
)
def test_mistakes_are_named(refused, arguments: list[str], named: str) -> None:
    assert named in refused(arguments)


def test_out_below_a_file_is_named(refused) -> None:
    assert "data/pool.jsonl" in refused(["make-pool", "--out", "data/pool.jsonl/sub"])
