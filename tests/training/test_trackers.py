"""TensorBoard, W&B (offline) and MLflow (a local store) for real: what they hold after a run that was killed and
resumed.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lead_engine.base.errors import UserError
from lead_engine.config import TrainConfig
from lead_engine.training.run_folder import ROUND_SCALARS, STEP_SCALARS, RunFolder
from lead_engine.training.trackers import Trackers

pytestmark = pytest.mark.slow

OPTIONS = ["--budget", "0.9", "--batch.capacity", "64", "--runtime.precision", "fp32", "--checkpoint-every", "3"]
TRACKERS = ["--wandb", "proj", "--mlflow", "exp"]
TASKS = ["plain", "100 % odd: (a/../b)"]
"""Of held-out records; MLflow takes no such name as the second."""


def environment(folder: Path) -> dict[str, str]:
    store = f"file:{folder / 'mlruns'}"
    return {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": store,
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wandb_history(folder: Path) -> Iterator[dict]:
    """Every logged row in the offline files of one run, in the order of logging."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for data in leveldb_records(file.read_bytes()[7:]):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                yield {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format, behind W&B's header of 7 bytes: blocks of 32 KiB of (crc, length, kind: whole, first, mid,
    last; data).
    """
    place, parts, header = 0, b"", 7
    while place + 7 <= len(data):
        left = 32768 - (place + header) % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part = data[place + 7 : place + 7 + length]
        if len(part) < length or kind == 0:
            return  # cut off where the process was killed
        parts = part if kind in (1, 2) else parts + part
        if kind in (1, 4):
            yield parts
        place += 7 + length


@pytest.fixture(scope="module")
def run(make_pool, make_model, start_ranks, run_ranks, tmp_path_factory) -> Path:
    """The folder of a run with all trackers, killed after its second checkpoint and resumed."""
    out = tmp_path_factory.mktemp("tracked") / "my run"
    data = out.parent / "heldout.jsonl"
    data.write_text("".join(json.dumps({"dataset": task, "prompt": "p", "completion": task}) + "\n" for task in TASKS))
    line = [
        "train",
        "--pool",
        make_pool(samples=200),
        "--model",
        make_model("llama"),
        "--out",
        out,
        *OPTIONS,
        *TRACKERS,
    ]
    line += ["--eval-data", data, "--eval-every", "10"]
    first = start_ranks(*line, ranks=0, env=environment(out.parent))
    deadline = time.monotonic() + 60
    while len(list(out.glob("checkpoints/step-*/COMPLETE"))) < 2:
        assert time.monotonic() < deadline, first.output()
        assert first.processes[0].exitcode is None, first.output()
        time.sleep(0.01)
    first.signal(signal.SIGKILL)
    first.wait()
    assert not (out / "summary.json").exists()
    run_ranks(*line, "--resume", ranks=0, env=environment(out.parent))
    return out


def test_tensorboard_has_every_line(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    metrics = lines(run / "metrics.jsonl")
    assert len(metrics) > 20
    for name in ("loss", "lr", "tokens_per_second", "memory_bytes"):
        seen = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert seen == pytest.approx({line["step"]: line[name] for line in metrics}, rel=1e-6)
    evaluations = {line["step"]: line["loss"] for line in lines(run / "heldout.jsonl")}
    assert len(evaluations) > 3
    for name in TASKS:
        seen = {event.step: event.value for event in events.Scalars(f"eval/task/{name}")}
        assert seen == pytest.approx(
            {step: loss["tasks"][name]["loss"] for step, loss in evaluations.items()}, rel=1e-6
        )
    assert "train/mfu" not in events.Tags()["scalars"]  # no peak is known of a CPU


def test_mlflow_goes_on_in_the_same_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    for name, value in environment(run.parent).items():
        monkeypatch.setenv(name, value)
    client = MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("exp").experiment_id])
    assert (found.info.run_name, found.info.status) == ("my run", "FINISHED")
    assert found.data.params["batch.capacity"] == "64"
    assert found.data.params["method"] == "lead"
    metrics = lines(run / "metrics.jsonl")
    # What the killed process had not sent yet may be missing: a round or two. What was sent twice is the same twice.
    losses = {(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, "train/loss")}
    expected = {(line["step"], line["loss"]) for line in metrics}
    assert losses <= expected
    assert len(losses) >= len(expected) - 8
    rewards = {
        (metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, "selection/reward")
    }
    expected = {(line["round"], line["reward"]) for line in lines(run / "selection.jsonl")}
    assert rewards <= expected
    assert len(rewards) >= len(expected) - 2
    evaluations = lines(run / "heldout.jsonl")
    for metric, name in (("eval/task/plain", TASKS[0]), ("eval/task/100 _ odd_ _a/_/b_", TASKS[1])):
        seen = {(each.step, each.value) for each in client.get_metric_history(found.info.run_id, metric)}
        assert seen == {(line["step"], line["loss"]["tasks"][name]["loss"]) for line in evaluations}


def test_wandb_goes_on_in_the_same_run(run: Path) -> None:
    folders = list((run / "wandb").glob("offline-run-*"))
    own = json.loads((run / "trackers.json").read_text())["wandb"]
    assert len(folders) == 2
    assert all(folder.name.endswith(own) for folder in folders)
    rows = list(wandb_history(run))
    steps = {row["train/step"]: row["train/loss"] for row in rows if "train/step" in row}
    # What a killed process had not handed over is lost to W&B, and only that.
    expected = {line["step"]: line["loss"] for line in lines(run / "metrics.jsonl")}
    assert steps.items() <= expected.items()
    assert len(steps) >= len(expected) // 2
    assert max(steps) == max(expected)
    assert {"selection/round", "selection/reward"} <= {name for row in rows for name in row}
    evaluations = {line["step"]: line["loss"]["overall"] for line in lines(run / "heldout.jsonl")}
    assert {row["eval/step"]: row["eval/loss"] for row in rows if "eval/step" in row}.items() <= evaluations.items()


def test_one_that_fails_is_dropped_with_one_warning(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "run"
    out.mkdir()
    trackers = Trackers(TrainConfig(pool=tmp_path, model="m", out=out, mlflow="exp"), 0)
    trackers.log("train", 0, {"loss": 1.0, "mfu": None, "grad_norm": float("nan")})
    trackers.flush()
    shutil.rmtree(tmp_path / "mlruns")
    warnings, steps = "", 1
    while "warning: mlflow failed" not in warnings:  # it is found out a few rounds later, by the thread that sends
        assert steps < 400
        trackers.log("train", steps, {"loss": 1.0 + steps})
        trackers.flush()
        time.sleep(0.05)
        warnings, steps = warnings + capsys.readouterr().err, steps + 1
    trackers.log("train", steps, {"loss": 1.0 + steps})
    trackers.flush()
    trackers.close(True)
    assert (warnings + capsys.readouterr().err).count("failed") == 1
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [1.0 + step for step in range(steps + 1)]
    assert events.Tags()["scalars"] == ["train/loss"]


def test_one_that_cannot_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    folder = RunFolder(TrainConfig(pool=tmp_path, model="m", out=tmp_path / "run", mlflow="exp"), writes=True)
    with pytest.raises(UserError, match=r"--mlflow exp: cannot start .*nonsense"):
        folder.open(0, 0)
    folder.close()
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(("option", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_missing_package(option: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, option, None)  # as Python says that there is no such module
    config = TrainConfig(pool=tmp_path, model="m", out=tmp_path / "run", **{option: "name"})
    with pytest.raises(UserError, match=f"--{option} name: {option} is not installed; pip install {package}"):
        RunFolder(config, writes=False)


def test_scalars_are_fields_of_the_lines(run: Path) -> None:
    assert set(STEP_SCALARS) <= set(lines(run / "metrics.jsonl")[0])
    assert set(ROUND_SCALARS) <= set(lines(run / "selection.jsonl")[0])
