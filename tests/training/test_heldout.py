"""Held-out loss while a run trains: nothing of the run changes, it is what `eval` says, keeps the best, stops early."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lead_engine.base.console import Bar
from lead_engine.base.errors import UserError
from lead_engine.base.files import publish
from lead_engine.config import (
    BatchConfig,
    EvalConfig,
    LoraConfig,
    OptimizerConfig,
    RuntimeConfig,
    SelectionConfig,
    TrainConfig,
)
from lead_engine.evaluation.evaluate import evaluate
from lead_engine.model.load import load_tokenizer
from lead_engine.pool.heldout import write_heldout
from lead_engine.training.build import build
from lead_engine.training.checkpoint import Checkpoints
from lead_engine.training.distributed import process_group
from lead_engine.training.heldout import HeldOut, _tidy
from lead_engine.training.heldout_data import open_heldout
from lead_engine.training.rounds import Progress
from lead_engine.training.run_folder import RunFolder
from lead_engine.training.train import run as train
from runs import OPTIONS, assert_same_run, kill_after_checkpoint, lines

pytestmark = pytest.mark.slow

FP32 = RuntimeConfig(precision="fp32")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def write_records(path: Path, count: int = 9, tasks: int = 3) -> Path:
    """Questions whose answers are of many lengths, in tasks of different sizes."""
    records = [
        {
            "id": f"h{i}",
            "dataset": f"task{min(i % 5, tasks - 1)}",
            "prompt": f"say {i}",
            "completion": " ".join(WORDS[: 1 + i % 7]),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def heldout(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("heldout") / "heldout.jsonl")


@pytest.fixture
def config(make_pool, make_model, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        pool=make_pool(samples=150),
        model=str(make_model("llama")),
        out=tmp_path / "run",
        budget=0.6,
        batch=BatchConfig(capacity=64, micro_batches=2),
        selection=SelectionConfig(round_steps=2),
        options={"calibrate_every": 3, "sketch_dim": 8},
        optimizer=OptimizerConfig(lr=1e-3),
        runtime=FP32,
    )


def watched(config: TrainConfig, heldout: Path, **more: Any) -> TrainConfig:
    return replace(config, eval_data=(str(heldout),), **{"eval_every": 3, **more})


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines(out / "heldout.jsonl")]


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4), LoraConfig(rank=4, dropout=0.1)], ids=str)
def test_the_run_is_the_same_with_and_without_it(
    lora: LoraConfig, config: TrainConfig, heldout: Path, tmp_path: Path
) -> None:
    """Bit for bit: weights, losses, selection, utilities; and torch's generator stands where it stood."""
    config = replace(config, lora=lora)
    torch.manual_seed(5)
    train(config)
    drawn = torch.get_rng_state()
    torch.manual_seed(5)
    train(watched(replace(config, out=tmp_path / "watched"), heldout))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_same_run(config.out, tmp_path / "watched")
    one, two = summary(config.out), summary(tmp_path / "watched")
    assert one["fingerprint"] == two["fingerprint"]
    assert two["evaluation_seconds"] > 0
    assert "evaluation_seconds" not in one


def test_the_numbers_are_those_of_eval(config: TrainConfig, heldout: Path) -> None:
    """The first of the base, the last of RUN/model, the lowest of RUN/best; and at each multiple of --eval-every."""
    config = watched(config, heldout)
    train(config)
    found, done = evaluations(config.out), summary(config.out)
    steps = [line["step"] for line in found]
    ends = [*(line["step"] for line in lines(config.out / "selection.jsonl")[1:]), done["steps"]]  # of the rounds
    due = [next(end for end in ends if end >= multiple) for multiple in range(3, done["steps"], 3)]
    assert steps == sorted({0, *due, done["steps"]})
    assert [line["tokens"] for line in found] == [
        0,
        *(lines(config.out / "metrics.jsonl")[step - 1]["tokens"] for step in steps[1:]),
    ]

    best = min(found[1:], key=lambda line: line["loss"]["overall"])
    assert done["best_step"] == best["step"]
    assert done["best_heldout_loss"] == best["loss"]["overall"] < found[0]["loss"]["overall"]
    for folder, line in ((config.model, found[0]), (config.out / "model", found[-1]), (config.out / "best", best)):
        options = EvalConfig(model=str(folder), data=(str(heldout),), max_length=64, batch=config.batch, runtime=FP32)
        told = evaluate(options)["loss"]
        assert line["loss"]["tasks"].keys() == told["tasks"].keys()
        for name, task in told["tasks"].items():
            assert line["loss"]["tasks"][name] == {**task, "loss": pytest.approx(task["loss"], abs=1e-6)}
        assert {key: line["loss"][key] for key in ("overall", "macro")} == pytest.approx(
            {key: told[key] for key in ("overall", "macro")}, abs=1e-6
        )
    assert done["evaluated_tokens"] % len(found) == 0

    events = EventAccumulator(str(config.out / "tensorboard")).Reload()
    for name, value in (("loss", "overall"), ("macro", "macro")):
        seen = {event.step: event.value for event in events.Scalars(f"eval/{name}")}
        assert seen == pytest.approx({line["step"]: line["loss"][value] for line in found}, rel=1e-6)
    assert [event.step for event in events.Scalars("eval/task/task1")] == steps


def test_patience(config: TrainConfig, heldout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate that spoils the model: the lowest loss is before training, the run ends at the second worse."""
    config = watched(
        config, heldout, eval_every=2, patience=2, optimizer=OptimizerConfig(lr=0.5, warmup=0.0, schedule="constant")
    )
    train(config)
    found, done = evaluations(config.out), summary(config.out)
    assert [line["step"] for line in found] == [0, 2, 4]
    assert [line["lowest"] for line in found] == [True, False, False]
    assert (done["stopped_early"], done["steps"], done["best_step"]) == (True, 4, 0)
    assert done["best_heldout_loss"] == found[0]["loss"]["overall"]
    assert not (config.out / "best").exists()
    assert (config.out / "model" / "config.json").exists()
    told = capsys.readouterr().out
    assert "--patience 2: 2 evaluations in a row without a lower held-out loss" in told
    assert "no eligible sample is left" not in told
    train(replace(config, resume=True))
    assert f"{config.out}: already complete (stopped early after step 4)" in capsys.readouterr().out


def test_killed_and_resumed_on_two_ranks(
    make_pool, make_model, start_ranks, run_ranks, heldout: Path, tmp_path: Path
) -> None:
    """Evaluations, best model and early end are those of a run never killed, its steps those of one without any."""
    line = [
        "train",
        "--pool",
        make_pool(samples=260),
        "--model",
        make_model("llama"),
        *OPTIONS,
        "--checkpoint-every",
        "2",
    ]
    watch = ["--eval-data", heldout, "--eval-every", "3", "--patience", "3"]
    plain, whole, parted = (tmp_path / name for name in ("plain", "whole", "parted"))
    run_ranks(*line, "--out", plain, ranks=2)
    run_ranks(*line, *watch, "--out", whole, ranks=2)
    kill_after_checkpoint(start_ranks(*line, *watch, "--out", parted, ranks=2), parted)
    run_ranks(*line, *watch, "--out", parted, "--resume", ranks=2)

    assert_same_run(whole, parted)
    assert evaluations(whole) == evaluations(parted)
    best = [load_file(out / "best" / "model.safetensors") for out in (whole, parted)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    one, two, steps = summary(whole), summary(parted), lines(whole / "metrics.jsonl")
    for key in ("steps", "best_step", "best_heldout_loss", "stopped_early", "evaluated_tokens"):
        assert one[key] == two[key], key
    assert one["stopped_early"]
    assert 0 < one["best_step"] < one["steps"] == len(steps) < summary(plain)["steps"]
    assert steps == lines(plain / "metrics.jsonl")[: len(steps)]


def test_a_rank_without_a_share(make_pool, make_model, run_ranks, tmp_path: Path) -> None:
    """One record is one micro-batch, on three ranks; the options that move parameters about see the same loss."""
    data, pool, model = write_records(tmp_path / "one.jsonl", 1), make_pool(samples=60), make_model("llama")
    line = [
        "train",
        "--pool",
        pool,
        "--model",
        model,
        "--budget",
        "0.9",
        "--batch.capacity",
        "64",
        "--batch.micro-batches",
        "6",
    ]
    line += ["--selection.round-steps", "1"]
    line += ["--runtime.precision", "fp32", "--eval-data", data, "--eval-every", "1"]
    losses = {}
    for ranks, more in (
        (1, []),
        (3, []),
        (2, ["--runtime.replicate", "2", "--runtime.offload", "--runtime.checkpointing", "full"]),
    ):
        run_ranks(*line, *more, "--out", tmp_path / f"{ranks}", ranks=ranks)
        losses[ranks] = [entry["loss"]["overall"] for entry in evaluations(tmp_path / f"{ranks}")]
    assert len(losses[1]) > 2
    for ranks in (2, 3):
        assert losses[ranks][0] == pytest.approx(losses[1][0], abs=1e-6)  # later the weights differ, too, by rounding
        assert losses[ranks] == pytest.approx(losses[1], abs=1e-4)


def test_what_a_resumed_run_goes_on_with(config: TrainConfig, heldout: Path, tmp_path: Path, capsys) -> None:
    """The records that the run has read: files that changed are refused, and files that are gone are not missed."""
    data = tmp_path / "mine.jsonl"
    data.write_text(heldout.read_text())
    config, tokenizer = watched(config, data, budget=0.05), load_tokenizer(Path(config.model))
    train(config)
    again = replace(config, resume=True)
    with process_group() as ranks:
        kept = open_heldout(again, ranks, tokenizer).store.tokens
        data.write_text(heldout.read_text().replace("say 3", "say 33"))
        changed = r"--resume: --eval-data has changed since the run began \(mine\.jsonl has other contents"
        with pytest.raises(UserError, match=changed):
            open_heldout(again, ranks, tokenizer)
        data.unlink()
        assert torch.equal(open_heldout(again, ranks, tokenizer).store.tokens, kept)
        assert "not all of it is there any more" in capsys.readouterr().out
    data.write_text(heldout.read_text().replace("say 3", "say 33"))
    with pytest.raises(UserError, match=changed):  # of a complete run, too: its losses are of the other file
        train(again)


def test_records_that_are_in_the_pool_are_counted(tmp_path: Path, make_model) -> None:
    tokenizer = load_tokenizer(make_model("llama"))
    folder = tmp_path / "pool"
    write_heldout(folder, [str(write_records(tmp_path / "a.jsonl", 12))], tokenizer, max_length=64, skip_bad=False)
    # Of which 10 and 11 are there.
    other = write_records(tmp_path / "b.jsonl", 15).read_text().splitlines(keepends=True)[10:]
    (tmp_path / "b.jsonl").write_text("".join(other))
    marker = write_heldout(
        tmp_path / "b", [str(tmp_path / "b.jsonl")], tokenizer, max_length=64, skip_bad=False, pool=folder
    )
    assert (marker["samples"], marker["in_pool"]) == (5, 2)


def test_mistakes_are_refused_before_anything_is_trained(
    config: TrainConfig, heldout: Path, tmp_path: Path, capsys
) -> None:
    for options, flag in (
        ({"eval_every": 4}, "--eval-every 4"),
        ({"patience": 2}, "--patience 2"),
        ({"skip_bad": True}, "--skip-bad True"),
        ({"eval_data": ("x.jsonl",), "patience": 2}, "--patience 2"),
    ):
        with pytest.raises(UserError, match=f"{flag}: must be left out without --eval-"):
            replace(config, **options)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(heldout.read_text() + '{"prompt": "no answer"}\n{"prompt": 3, "completion": "x"}\n')
    with pytest.raises(UserError, match=r"(?s)2 record\(s\) cannot be used.*bad\.jsonl:10.*bad\.jsonl:11.*--skip-bad"):
        train(watched(config, bad))
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file"):
        train(watched(config, tmp_path / "nowhere.jsonl"))
    assert not (config.out / "config.yaml").exists()
    assert not (config.out / "heldout").exists()
    train(watched(config, bad, skip_bad=True, budget=0.05))
    told = capsys.readouterr().out
    assert "1 held-out records: no_response, named in" in told
    assert len((config.out / "heldout" / "problems.jsonl").read_text().splitlines()) == 2
    assert evaluations(config.out)[0]["loss"]["tasks"]["task0"]["samples"] == 2


def test_a_best_model_that_cannot_be_written_leaves_the_one_before(config: TrainConfig, heldout: Path, capsys) -> None:
    config = watched(config, heldout)
    with process_group() as ranks:
        session = build(config, ranks, evaluates=True)
        folder = RunFolder(config, writes=True)
        folder.open(0, 0)
        watch = HeldOut(session, ranks, folder, Checkpoints(config.out / "checkpoints", ranks, 1))
        watch.look(Progress(), Bar())
        for step, obstacle in ((3, False), (6, True), (9, False)):
            in_the_way = config.out / "best.new.writing"
            if obstacle:
                in_the_way.write_text("a file is in the way")
            with torch.no_grad():
                for parameter in session.trainer.model.parameters():
                    # Towards the uniform distribution, which is better than a random model of large weights.
                    parameter.mul_(0.8)
            watch.look(Progress(step, step, 10 * step), Bar())
            note = json.loads((config.out / "best" / "heldout.json").read_text())
            assert note["step"] == (3 if obstacle else step)
            if obstacle:
                in_the_way.unlink()
        folder.close()
    assert [line["lowest"] for line in evaluations(config.out)] == [True] * 4
    told = capsys.readouterr().err
    assert (
        told.count(
            "the best model so far could not be written (File exists); the one of step 3 stays, and training goes on"
        )
        == 1
    )
    assert sorted(path.name for path in config.out.glob("best*")) == ["best"]


def test_what_a_killed_run_left_is_put_in_order(tmp_path: Path) -> None:
    """A model that was being replaced comes back, one that was being written goes."""
    for name in ("best.old", "best.new", "best.new.writing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    _tidy(tmp_path / "best")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "which").read_text() == "best.old"
    (tmp_path / "next").mkdir()
    publish(tmp_path / "next", tmp_path / "best")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert not list((tmp_path / "best").iterdir())
