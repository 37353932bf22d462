"""Lines of metrics.jsonl, the progress they feed, and memory by count, from real rounds of a real engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lead_engine.config import BatchConfig, LoraConfig, OptimizerConfig, RuntimeConfig, SelectionConfig, TrainConfig
from lead_engine.training.build import build
from lead_engine.training.distributed import process_group
from lead_engine.training.flops import ModelFlops, Peak
from lead_engine.training.host_copy import HostCopy
from lead_engine.training.memory import estimate, peak_bytes, size, used_bytes
from lead_engine.training.records import Meter, bar_info, round_line, step_lines
from lead_engine.training.rounds import Progress

PEAK = Peak(0.5, "given")


@pytest.fixture(scope="module")
def rounds(make_pool, make_model) -> tuple:
    """(engine, its meter, three finished rounds, the pool's state)."""
    config = TrainConfig(
        pool=make_pool(samples=120),
        model=str(make_model("llama")),
        out=Path("unused"),
        batch=BatchConfig(capacity=64, micro_batches=2),
        selection=SelectionConfig(round_steps=2),
        options={"sketch_dim": 8},
        runtime=RuntimeConfig(precision="fp32"),
    )
    with process_group() as ranks:
        session = build(config, ranks)
        meter = Meter.of(session.trainer.store, ModelFlops.of(session.trainer.model), PEAK, 2)
        session.trainer.budget = 1 << 40
        running = session.trainer.rounds(Progress())
        return session.trainer, meter, [next(running) for _ in range(3)], session.state


def test_flops_are_those_of_the_trained_samples(rounds: tuple) -> None:
    trainer, meter, finished, _ = rounds
    for one in finished:
        values = one.values.read()
        lines = step_lines(one, values, meter)
        assert len(lines) == 2
        for line, step in zip(lines, values.plan.sample_ids, strict=True):
            ids = [i for i in step.flatten().tolist() if i < 120]
            assert len(ids) == line["step_samples"] > 1
            per_pair = sum(each for _, each in meter.flops.attention)
            expected = 0
            for i in ids:
                length, rows = int(trainer.store.lengths[i]), int(trainer.store.response_rows[i])
                expected += (
                    length * meter.flops.per_token + rows * meter.flops.per_row + length * (length + 1) // 2 * per_pair
                )
            assert line["flops"] == expected
            assert line["mfu"] == pytest.approx(expected / (line["step_seconds"] * 2 * 0.5e12))
            assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(line["step_tokens"])


def test_run_flops_are_the_sum_of_the_steps(rounds: tuple) -> None:
    trainer, meter, finished, _ = rounds
    lines = [line for one in finished for line in step_lines(one, one.values.read(), meter)]
    assert meter.run_flops(trainer.selector.samples.visits[:-1]) == sum(line["flops"] for line in lines) > 0


def test_memory_is_the_process_s(rounds: tuple) -> None:
    _, meter, finished, _ = rounds
    [line, _] = step_lines(finished[0], finished[0].values.read(), meter)
    assert line["memory_bytes"] == pytest.approx(used_bytes(torch.device("cpu")), rel=0.05)
    assert peak_bytes(torch.device("cpu")) >= 0.95 * line["memory_bytes"]


def test_a_skipped_step_leaves_valid_json(rounds: tuple) -> None:
    _, meter, finished, state = rounds
    values = finished[0].values.read()
    broken = values.steps[0]._replace(
        loss=torch.tensor(torch.nan), grad_norm=torch.tensor(torch.inf), skipped=torch.tensor(1.0)
    )
    one = replace(finished[0], values=HostCopy(values._replace(steps=[broken, values.steps[1]])))
    lines = step_lines(one, one.values.read(), meter)
    assert [line["skipped"] for line in lines] == [True, False]
    assert (lines[0]["loss"], lines[0]["grad_norm"]) == (None, None)
    assert lines[1]["loss"] > 0
    json.dumps(lines, allow_nan=False)
    json.dumps(round_line(one, one.values.read(), "lead", state, [str(i) for i in range(120)], 64), allow_nan=False)


def test_what_progress_shows(rounds: tuple) -> None:
    _, meter, finished, _ = rounds
    lines = step_lines(finished[1], finished[1].values.read(), meter)
    tokens, seconds = sum(line["step_tokens"] for line in lines), sum(line["step_seconds"] for line in lines)
    info = bar_info(lines, 3)
    assert list(info) == ["loss", "tok/s", "MFU", "memory", "skipped"]
    assert info["tok/s"] == round(tokens / seconds)
    assert info["MFU"] == f"{sum(line['flops'] for line in lines) / (seconds * 1e12):.1%}"
    assert info["skipped"] == 3
    unknown = replace(meter, peak=Peak(None, "none"))
    assert list(bar_info(step_lines(finished[1], finished[1].values.read(), unknown), 0)) == ["loss", "tok/s", "memory"]


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("lora", [0, 4])
def test_memory_by_count_is_what_training_holds(kind: str, lora: int, make_pool, make_model) -> None:
    config = TrainConfig(
        pool=make_pool(samples=60),
        model=str(make_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)),
        out=Path("unused"),
        method="random",
        batch=BatchConfig(capacity=64),
        selection=SelectionConfig(round_steps=1),
        optimizer=OptimizerConfig(kind=kind),
        lora=LoraConfig(rank=lora),
        runtime=RuntimeConfig(precision="fp32"),
    )
    with process_group() as ranks:
        trainer = build(config, ranks).trainer
        trainer.budget = 1 << 40
        next(trainer.rounds(Progress()))
        counted = estimate(trainer.model, kind)
        assert counted.parameters == sum(4 * p.numel() for p in trainer.model.parameters())
        assert counted.gradients == sum(4 * p.numel() for p in trainer.model.parameters() if p.requires_grad)
        state = [
            getattr(t, "_local_tensor", t)
            for each in trainer.optimizer.state.values()
            for t in each.values()
            if torch.is_tensor(t)
        ]
        held = sum(t.numel() * t.element_size() for t in state if t.numel() > 1)
        assert counted.optimizer == pytest.approx(held, rel=0.02)


def test_sizes_for_people() -> None:
    assert [size(n) for n in (3 << 30, 1536 << 20, 12 << 20)] == ["3.0 GiB", "1.5 GiB", "12 MiB"]
