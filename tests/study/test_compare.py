from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml

from lead_engine.base.errors import UserError
from lead_engine.base.files import write_text
from lead_engine.base.statistics import paired_interval
from lead_engine.cli import command_line as cli
from lead_engine.cli import compare
from lead_engine.config import BatchConfig, CompareConfig, PrepareConfig, RuntimeConfig
from lead_engine.evaluation.outputs import read_samples
from lead_engine.pool.procedural import make_pool
from lead_engine.study import compare as study_compare
from lead_engine.study.launch import start
from lead_engine.study.outcome import Outcome
from lead_engine.study.plan import check_unchanged, config_text, eval_command, plan_runs, train_command
from lead_engine.study.tables import group_rows, markdown
from lead_engine.study.variants import read_study

pytestmark = pytest.mark.slow

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


class Ended:
    """A child that has ended well."""

    def finished(self) -> bool:
        return True


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs the engine's command lines in this process, where torch is imported already; gives what was run."""
    calls: list[str] = []

    def run(command: list[str], log: Path, what: str, threads: int | None) -> Ended:
        assert command[1:3] == ["-m", "lead_engine"]
        calls.append(f"{what}{' --resume' if '--resume' in command else ''}")
        if cli.main(command[3:]) != 0:
            raise UserError(f"{what} failed")
        return Ended()

    monkeypatch.setattr(study_compare, "start", run)
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
    assert [(group["variant"], group["budget"]) for group in results["groups"]] == [("lead", 0.2), ("random", 0.2)]
    (difference,) = results["comparisons"]
    assert (difference["a"], difference["b"], difference["seeds"]) == ("lead", "random", [0, 1])
    mine, theirs = ([losses[f"{method}-20pct-s{seed}"] for seed in (0, 1)] for method in ("lead", "random"))
    assert difference["overall"] == paired_interval(mine, theirs).to_json()
    assert difference["over_samples"]["mean"] == pytest.approx(difference["overall"]["mean"], abs=1e-9)
    samples = [read_samples(tmp_path / "out" / "runs" / name / "eval") for name in names]
    assert [run["per_sample"] for run in results["runs"]] == [pytest.approx(each.nll.mean()) for each in samples]
    printed = capsys.readouterr().out
    assert f"{difference['overall']['mean']:+.4f} {difference['verdicts']['overall']}" in printed

    table = (tmp_path / "out" / "results.md").read_text()
    assert results["verdicts"][0] in table
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[:4]] == ["| variant", "| untrained", "| lead", "| random"]
    lead = results["groups"][0]
    assert f"{lead['overall']['mean']:.4f} [{lead['overall']['low']:.4f}, " in rows[2][5]

    # The same command again has nothing to train. A killed run is resumed; a lost evaluation is repeated.
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

    # Held-out records under another name are the same. Others under the same name: every model is evaluated again, none
    # is trained again.
    in_process.clear()
    other = Path(shutil.copy(pool / "heldout.jsonl", tmp_path / "other.jsonl"))
    write_study(tmp_path / "study.yaml", pool, heldout=[str(other)])
    compare.run(config)
    assert in_process == ["report report"]
    in_process.clear()
    capsys.readouterr()
    lines = other.read_text().splitlines(keepends=True)
    other.write_text("".join([*lines[1:], lines[0].replace("a", "b", 1)]))
    compare.run(config)
    assert [call.partition(" ")[0] for call in in_process] == ["evaluating"] * 5 + ["report"]
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "evaluating again: other.jsonl (then: heldout.jsonl) has other contents" in printed
    _refuses_another_pool_or_base(config, pool)
    # Other training options are refused.
    write_study(tmp_path / "study.yaml", pool, optimizer={"lr": 5e-4})
    with pytest.raises(UserError, match=r"lead-20pct-s0/config\.yaml.*optimizer\.lr = 0\.001.*0\.0005"):
        compare.run(config)


def _refuses_another_pool_or_base(config: CompareConfig, pool: Path) -> None:
    """A study's pool or base with other contents under the same name: the runs that are there were not made from it."""
    for changed in (pool / "prepared/state.safetensors", pool / "prepared/model/model.safetensors"):
        kept = changed.read_bytes()
        changed.write_bytes(kept[:-4] + bytes(byte ^ 1 for byte in kept[-4:]))
        try:
            what = "scores of the pool" if "state" in changed.name else "weights of the model differ"
            message = f"lead-20pct-s0: made from something else: {what}.*delete the run's folder"
            with pytest.raises(UserError, match=message):
                compare.run(config)
        finally:
            changed.write_bytes(kept)


def test_command_lines_are_understood_and_mean_what_was_planned(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_study(
        write_study(tmp_path / "study.yaml", pool, methods=["lead", "full"], epochs=2, ranks=2, generate=3, seeds=[7])
    )
    seen: list[object] = []
    monkeypatch.setattr("lead_engine.training.train.run", seen.append)
    monkeypatch.setattr("lead_engine.evaluation.evaluate.run", seen.append)
    for run in plan_runs(study, tmp_path / "out"):
        write_text(run_file(run.config_file), config_text(run.train))
        command = train_command(run, study.options.ranks)
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
    study = read_study(write_study(tmp_path / "s.yaml", pool, methods=["lead", "random", "full"], budgets=[0.025, 0.1]))
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
    original = study_compare.start

    def run(command: list[str], log: Path, what: str, threads: int | None) -> Ended:
        return Ended() if what.startswith("training") else original(command, log, what, threads)

    monkeypatch.setattr(study_compare, "start", run)
    with pytest.raises(UserError, match=r"training lead-20pct-s0 ended without .*summary\.json"):
        compare.run(CompareConfig(config=path, out=tmp_path / "out"))


def test_variants_two_at_a_time_in_real_processes_one_of_them_killed_before(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(
        tmp_path / "study.yaml",
        pool,
        methods=["random"],
        variants={"slow": {"method": "random", "optimizer": {"lr": 1e-5}}},
        contrasts=[["slow", "random"]],
        jobs=2,
    )
    monkeypatch.setattr(compare.report, "run", lambda config: None)
    killed = plan_runs(read_study(path), tmp_path / "out")[1]
    write_text(run_file(killed.config_file), config_text(killed.train))
    child = start(train_command(killed, 1), killed.log, "training", threads=1)
    while not killed.started and not child.finished():
        time.sleep(0.005)
    child.process.kill()
    child.wait(60)
    with pytest.raises(UserError, match="signal 9"):
        child.finished()
    assert not killed.trained

    compare.run(CompareConfig(config=path, out=tmp_path / "out"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {run["name"] for run in results["runs"]} == {
        f"{name}-20pct-s{seed}" for name in ("random", "slow") for seed in (0, 1)
    }
    assert all(run["overall"] < results["base"]["loss"]["overall"] for run in results["runs"])
    (difference,) = results["comparisons"]  # a contrast with the reference is there once
    assert difference["verdicts"]["overall"] == "worse"
    assert "train --config" in killed.log.read_text()
    assert f"train --config {killed.config_file} --resume" in killed.log.read_text()
    assert "held-out loss" in killed.log.read_text()  # what the process said stands in the log


def test_differences_that_are_no_difference_in_the_result_do_not_matter(pool: Path, tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path / "study.yaml", pool))
    run = plan_runs(study, tmp_path / "out")[0]
    run.folder.mkdir(parents=True)
    values = yaml.safe_load(config_text(run.train))
    (run.folder / "config.yaml").write_text(yaml.safe_dump(values | {"checkpoint_every": 5, "out": "elsewhere"}))
    check_unchanged([run])
    (run.folder / "config.yaml").write_text(yaml.safe_dump(values | {"seed": 5}))
    with pytest.raises(UserError, match="seed = 5"):
        check_unchanged([run])
    del values["recipe"], values["selection"]["round_steps"]  # as if written by a version that did not know them
    (run.folder / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"selection\.round_steps = 4, the study now says 2"):
        check_unchanged([run])
    values["selection"]["round_steps"] = 2
    (run.folder / "config.yaml").write_text(yaml.safe_dump(values))
    check_unchanged([run])


# --- tables ---


def result(*, generated: bool) -> dict[str, object]:
    share = {"mean": 0.25, "low": 0.1, "high": 0.4, "n": 3} if generated else None
    interval = {"mean": 2.0, "low": 1.9, "high": 2.1, "n": 3}
    difference = {"mean": -0.05, "low": -0.08, "high": -0.02, "n": 3}
    losses = {"overall": interval, "macro": interval, "per_sample": interval}
    costs = {"tokens_trained": 12345.0, "response_tokens_trained": None, "samples_trained": 50.0}
    times = {"seconds": 150.0, "training_seconds": 100.0, "selection_seconds": 45.0, "scoring_seconds": 5.0}
    common = costs | times | losses | {"whole": share}
    lead = common | {"variant": "lead", "budget": 0.025, "epochs": 1, "final": share}
    full = common | {"variant": "full", "budget": None, "epochs": 2, "final": None, "selection_seconds": None}
    words = {"overall": "better", "macro": "better", "per_sample": "better"}
    pair = {
        "a": "lead",
        "b": "random",
        "budgets": [0.025],
        "pooled": False,
        "seeds": [0, 1, 2],
        "over_samples": interval,
    }
    pair |= dict.fromkeys(losses, difference) | {"verdicts": words, "sentence": "v"}
    study = {"pool": "p", "model": "m", "heldout": ["h"], "seeds": [0], "epochs": 2}
    return {
        "study": study,
        "reference": "random",
        "base": None,
        "groups": [lead, full],
        "comparisons": [pair],
        "verdicts": ["v"],
        "warnings": ["w"],
    }


def test_the_table_has_exact_match_only_where_something_was_generated() -> None:
    lead, full = group_rows(result(generated=True), compact=False)
    assert lead == {
        "variant": "lead",
        "budget": "2.5 %",
        "tokens trained": "12,345",
        "answer tokens": "-",
        "samples": "50",
        "overall": "2.0000 [1.9000, 2.1000]",
        "macro": "2.0000 [1.9000, 2.1000]",
        "mean over samples": "2.0000 [1.9000, 2.1000]",
        "difference to random": "-0.0500 [-0.0800, -0.0200]",
        "exact match": "25.0 % / 25.0 %",
        "time": "2.5 min",
        "training": "100 s",
        "selection": "45 s",
        "scoring": "5.00 s",
    }
    assert full["budget"] == "200 %"  # full training of two epochs
    assert full["exact match"] == "25.0 % / -"
    assert full["selection"] == full["difference to random"] == "-"
    assert "exact match" not in group_rows(result(generated=False), compact=False)[0]
    compact = group_rows(result(generated=False), compact=True)[0]
    assert compact["overall"] == "2.0000"
    assert "tokens trained" not in compact


def test_markdown_holds_verdicts_warnings_and_the_number_of_looks() -> None:
    text = markdown(result(generated=False))
    assert "\n- v\n" in text
    assert "\n- w\n" in text
    assert "| lead | random | 2.5 % | -0.0500 [-0.0800, -0.0200] better |" in text
    assert "There are 3 intervals here" in text
    assert "- lead against random, 2.5 %: +2.0000 [+1.9000, +2.1000]" in text


def test_training_seconds_are_what_selection_and_scoring_leave() -> None:
    def outcome(**summary: float) -> Outcome:
        return Outcome(None, summary, {}, None)

    costs = outcome(seconds=10.0, selection_seconds=2.0, scoring_seconds=3.0, tokens_trained=5).costs
    assert costs["training_seconds"] == 5.0
    assert costs["response_tokens_trained"] is None
    assert outcome(seconds=10.0).costs["training_seconds"] is None
