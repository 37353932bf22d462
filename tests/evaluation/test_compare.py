from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lead_engine import cli
from lead_engine.config import BatchConfig, CompareConfig, PrepareConfig, RuntimeConfig
from lead_engine.errors import UserError
from lead_engine.evaluation import compare
from lead_engine.evaluation.comparison_table import columns_of, markdown, table_rows
from lead_engine.evaluation.results import verdict
from lead_engine.evaluation.stats import paired_interval
from lead_engine.evaluation.study import check_unchanged, eval_command, plan_runs, train_command
from lead_engine.pool.procedural import make_pool

CAPACITY = 256


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared pool with its own scratch model, and held-out records beside it."""
    from lead_engine.prepare import run as prepare

    folder = tmp_path_factory.mktemp("pool")
    make_pool(folder, samples=100, heldout=14, text_kib=1)
    prepare(
        PrepareConfig(
            pool=(str(folder / "pool.jsonl"),),
            model="scratch:mini",
            out=folder / "prepared",
            max_length=128,
            clusters=3,
            vocab_size=400,
            batch=BatchConfig(capacity=CAPACITY),
            runtime=RuntimeConfig(precision="fp32"),
        )
    )
    return folder


def write_study(path: Path, folder: Path, **more: object) -> Path:
    values = {
        "pool": str(folder / "prepared"),
        "model": "scratch:mini",
        "heldout": [str(folder / "heldout.jsonl")],
        "methods": ["lead", "random"],
        "budgets": [0.2],
        "seeds": [0, 1],
        "batch": {"capacity": CAPACITY},
        "selection": {"round_steps": 2},
        "optimizer": {"lr": 1e-3},
        "runtime": {"precision": "fp32"},
    }
    path.write_text(yaml.safe_dump(values | more))
    return path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs the engine's command lines in this process, where torch is imported already; gives what was run."""
    calls: list[str] = []

    def run(command: list[str], log: Path, what: str) -> None:
        assert command[1:3] == ["-m", "lead_engine"]
        calls.append(f"{what}{' --resume' if '--resume' in command else ''}")
        if cli.main(command[3:]) != 0:
            raise UserError(f"{what} failed")

    monkeypatch.setattr(compare, "run_logged", run)
    monkeypatch.setattr(compare.report, "run", lambda config: calls.append(f"report {config.out.name}"))
    return calls


def test_a_study_from_yaml_to_verdict_and_once_more(
    pool: Path, tmp_path: Path, in_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = CompareConfig(config=write_study(tmp_path / "study.yaml", pool), out=tmp_path / "out")
    compare.run(config)
    names = [f"{method}-20pct-s{seed}" for seed in (0, 1) for method in ("lead", "random")]
    expected = [f"{verb} {name}" for name in names for verb in ("training", "evaluating")]
    assert in_process == ["evaluating the base", *expected, "report report"]

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    losses = {run["name"]: run["overall"] for run in results["runs"]}
    assert list(losses) == names
    assert losses["random-20pct-s0"] != losses["random-20pct-s1"] != losses["lead-20pct-s1"]
    assert all(loss < results["base"]["loss"]["overall"] for loss in losses.values())
    lead, random = results["groups"]
    assert (lead["method"], random["method"]) == ("lead", "random")
    assert random["difference"] is None
    mine, theirs = ([losses[f"{method}-20pct-s{seed}"] for seed in (0, 1)] for method in ("lead", "random"))
    assert lead["difference"]["overall"] == paired_interval(mine, theirs).to_json()
    assert lead["difference"]["over_samples"]["mean"] == pytest.approx(lead["difference"]["overall"]["mean"], abs=1e-9)
    (sentence,) = results["verdicts"]
    assert sentence.startswith("LEAD at 20 % of the pool: ")
    assert sentence in capsys.readouterr().out

    table = (tmp_path / "out" / "results.md").read_text()
    assert sentence in table
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| method", "| untrained", "| lead", "| random"]
    assert f"{lead['overall']['mean']:.4f} [{lead['overall']['low']:.4f}, " in rows[2][3]

    # The same command again has nothing to train. A run that was killed is gone on with; a lost evaluation is made again.
    in_process.clear()
    compare.run(config)
    assert in_process == ["report report"]
    (tmp_path / "out/runs/lead-20pct-s1/summary.json").unlink()
    (tmp_path / "out/runs/lead-20pct-s1/eval/eval.json").unlink()
    (tmp_path / "out/runs/random-20pct-s0/eval/eval.json").unlink()
    in_process.clear()
    compare.run(config)
    assert in_process == [
        "evaluating random-20pct-s0",
        "training lead-20pct-s1 --resume",
        "evaluating lead-20pct-s1",
        "report report",
    ]
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {run["name"]: run["overall"] for run in again["runs"]} == pytest.approx(losses, rel=1e-6)

    # Other held-out files: every model is evaluated again, none is trained again. Other training options: refused.
    in_process.clear()
    other = shutil.copy(pool / "heldout.jsonl", tmp_path / "other.jsonl")
    write_study(tmp_path / "study.yaml", pool, heldout=[str(other)])
    compare.run(config)
    assert [call.partition(" ")[0] for call in in_process] == ["evaluating"] * 5 + ["report"]
    write_study(tmp_path / "study.yaml", pool, optimizer={"lr": 5e-4})
    with pytest.raises(UserError, match=r"lead-20pct-s0/config\.yaml.*optimizer\.lr = 0\.001.*0\.0005"):
        compare.run(config)


def test_command_lines_are_understood_and_mean_what_was_planned(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = compare.read_study(
        write_study(tmp_path / "study.yaml", pool, methods=["lead", "full"], epochs=2, ranks=2, generate=3, seeds=[7])
    )
    seen: list[object] = []
    monkeypatch.setattr("lead_engine.training.train.run", seen.append)
    monkeypatch.setattr("lead_engine.evaluation.evaluate.run", seen.append)
    for run in plan_runs(study, tmp_path / "out"):
        compare.write_text(run_file(run.config_file), compare.config_text(run.train))
        command = train_command(run, study.ranks)
        assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        assert command[5] == "2"
        assert cli.main(command[command.index("lead_engine") + 1 :]) == 0
        assert cli.main(eval_command(run.evaluate)[3:]) == 0
        assert seen == [run.train, run.evaluate]
        seen.clear()


def run_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_full_is_run_once_per_seed(pool: Path, tmp_path: Path) -> None:
    study = compare.read_study(write_study(tmp_path / "s.yaml", pool, methods=["lead", "random", "full"], budgets=[0.025, 0.1]))
    runs = plan_runs(study, tmp_path / "out")
    assert [run.name for run in runs if run.seed == 1] == [
        "lead-2.5pct-s1",
        "lead-10pct-s1",
        "random-2.5pct-s1",
        "random-10pct-s1",
        "full-100pct-s1",
    ]
    assert {run.train.budget for run in runs if run.method == "random"} == {0.025, 0.1}
    assert all(run.train.seed == run.seed for run in runs)
    assert all(run.evaluate.max_length == 128 for run in runs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metods": ["lead"]}, r"study\.yaml: metods: unknown key"),
        ({"batch": {"capcity": 1}}, r"study\.yaml: batch\.capcity"),
        ({"methods": ["leed"]}, r"study\.yaml: methods\[0\]"),
        ({"budgets": [2.0]}, r"study\.yaml: budgets"),
        ({"seeds": [1, 1]}, r"study\.yaml: seeds"),
        ({"heldout": []}, r"study\.yaml: heldout: name at least one"),
        ({"budgets": []}, r"study\.yaml: budgets: name at least one"),
        ({"budgets": [0.1, 0.1]}, r"lead-10pct-s0, .*twice"),
        ({"methods": ["lead", "lead"]}, r"twice"),
        ({"pool": "nowhere"}, r"nowhere: not a prepared pool"),
    ],
)
def test_mistakes_in_the_study_are_named(pool: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = write_study(tmp_path / "study.yaml", pool, **change)
    with pytest.raises(UserError, match=message):
        compare.run(CompareConfig(config=path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_run_that_ends_without_a_summary_is_no_result(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: list[str]
) -> None:
    path = write_study(tmp_path / "study.yaml", pool)
    original: Callable[..., None] = compare.run_logged

    def run(command: list[str], log: Path, what: str) -> None:
        if not what.startswith("training"):
            original(command, log, what)

    monkeypatch.setattr(compare, "run_logged", run)
    with pytest.raises(UserError, match=r"training lead-20pct-s0 ended without .*summary\.json"):
        compare.run(CompareConfig(config=path, out=tmp_path / "out"))


def test_differences_that_are_no_difference_in_the_result_do_not_matter(pool: Path, tmp_path: Path) -> None:
    study = compare.read_study(write_study(tmp_path / "study.yaml", pool))
    run = plan_runs(study, tmp_path / "out")[0]
    run.folder.mkdir(parents=True)
    values = yaml.safe_load(compare.config_text(run.train))
    (run.folder / "config.yaml").write_text(yaml.safe_dump(values | {"checkpoint_every": 5, "out": "elsewhere"}))
    check_unchanged(run)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(values | {"seed": 5}))
    with pytest.raises(UserError, match="seed = 5"):
        check_unchanged(run)


# --- tables and verdicts ---


def result(*, generated: bool) -> dict[str, object]:
    share = {"mean": 0.25, "low": 0.1, "high": 0.4, "n": 3} if generated else None
    interval = {"mean": 2.0, "low": 1.9, "high": 2.1, "n": 3}
    common = {"tokens_trained": 12345.0, "seconds": 150.0, "overall": interval, "macro": interval, "whole": share}
    lead = common | group(-0.05, -0.08, -0.02) | {"final": share}
    full = common | {"method": "full", "budget": None, "difference": None, "final": None}
    study = {"pool": "p", "model": "m", "heldout": ["h"], "seeds": [0], "epochs": 2}
    return {"study": study, "base": None, "groups": [lead, full], "verdicts": ["v"], "warnings": ["w"]}


def test_the_table_has_exact_match_only_where_something_was_generated() -> None:
    rows = table_rows(result(generated=True))
    assert dict(zip(columns_of(rows), rows[0], strict=True)) == {
        "method": "lead",
        "budget": "2.5 %",
        "tokens trained": "12,345",
        "overall loss": "2.0000 [1.9000, 2.1000]",
        "macro loss": "2.0000 [1.9000, 2.1000]",
        "difference to random": "-0.0500 [-0.0800, -0.0200]",
        "exact match": "25.0 % / 25.0 %",
        "time": "2.5 min",
    }
    assert rows[1][1] == "200 %"  # full training of two epochs
    assert rows[1][6] == "25.0 % / -"
    rows = table_rows(result(generated=False))
    assert columns_of(rows)[-2:] == ["difference to random", "time"]
    assert rows[0][-1] == "2.5 min"
    text = markdown(result(generated=False))
    assert "\n- v\n- w\n" in text
    assert "- lead, 2.5 %: -0.0500 [-0.0600, -0.0400]" in text


def group(mean: float, low: float | None, high: float | None) -> dict[str, object]:
    seeds = {"mean": mean, "low": low, "high": high, "n": 1 if low is None else 3}
    samples = {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "n": 100}
    return {"method": "lead", "budget": 0.025, "difference": {"overall": seeds, "macro": seeds, "over_samples": samples}}


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [
        ((-0.05, -0.08, -0.02), "better"),
        ((0.05, 0.02, 0.08), "worse"),
        ((-0.05, -0.12, 0.02), "no difference shown"),
        ((0.01, -0.02, 0.04), "no difference shown"),
        ((-0.05, None, None), "no verdict from one seed"),
    ],
)
def test_the_paired_interval_over_seeds_decides(interval: tuple, outcome: str) -> None:
    sentence = verdict(group(*interval))
    assert sentence.startswith(f"LEAD at 2.5 % of the pool: {outcome} (")
    assert f"{interval[0]:+.4f}" in sentence
    if interval[1] is not None:
        assert f"[{interval[1]:+.4f}, {interval[2]:+.4f}]" in sentence
