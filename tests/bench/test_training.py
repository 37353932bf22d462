"""bench/training.py: all contenders train the same samples, its sums are right, its check for host waits can fail."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import round_profile
import torch
import training
import training_data
import training_report
import training_turns
from torch.profiler import ProfilerActivity, profile, record_function

from lead_engine.pool.store import TokenStore

pytestmark = pytest.mark.slow

SETTING = training_data.Setting("tiny", 512, 2, 1, 2, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(training_data.SHAPES, "tiny", (32, 64, 2, 4, 2, 512, False))
        patch.setattr(training_data, "SAMPLES", 300)
        return folder, training_data.make_data(folder, SETTING)


def test_steps_hold_the_same_samples_in_both_forms(data: tuple[Path, dict]) -> None:
    steps, store = torch.load(data[0] / "steps.pt"), TokenStore.open(data[0] / "pool" / "store")
    used, grouped = (steps[name][steps[name] < store.num_samples] for name in ("ids", "grouped"))
    assert len(used) == len(used.unique()) > 100
    assert sorted(used.tolist()) == sorted(grouped.tolist())
    lengths = torch.cat([store.lengths, torch.zeros(1, dtype=torch.long)])
    assert torch.equal(lengths[steps["ids"]].sum(-1), steps["tokens"])
    assert int(steps["tokens"].max()) <= SETTING.capacity
    # Grouped ones have about as many tokens, and hardly any padding.
    tokens = lengths[steps["grouped"]].sum(-1)
    assert float((tokens - steps["tokens"].double().mean()).abs().max()) <= int(store.lengths.max())
    places = [(ids < store.num_samples).sum(-1) * lengths[ids].amax(-1) for ids in (steps["ids"], steps["grouped"])]
    assert int(places[1].sum()) < 1.35 * int(tokens.sum()) < int(places[0].sum())
    assert data[1]["tokens_per_step"] == pytest.approx(float(steps["tokens"].sum()) / len(steps["tokens"]))


@pytest.mark.timeout(200)
def test_contenders_train_the_same(data: tuple[Path, dict]) -> None:
    """Real processes of the engine, Trainer and SFTTrainer; in fp32 their losses over the first two steps agree."""
    specs = [
        s
        for s in training.contenders(SETTING, data[0], "fp32")
        if s.kind in ("random", "sft") or s.name == "Trainer, packed"
    ]
    specs = [replace(spec, grouped=False) for spec in specs]
    broken = replace(specs[0], name="broken", precision="no such")
    told: list[list[str]] = []
    raw = training_turns.in_turns(
        [*specs, broken], SETTING, argparse.Namespace(contender_seconds=150), lambda raw: told.append(list(raw))
    )
    rows = {name: training.summary(raw[name], raw[training.ENGINE], data[1], 1.0) for name in raw}
    assert "no such" in rows.pop("broken")["failed"]  # and costs the others nothing
    assert list(rows) == [training.ENGINE, "Trainer, packed", "SFTTrainer, padded, by length"]
    assert len(told) == SETTING.turns + 1
    of_steps = torch.load(data[0] / "steps.pt")["tokens"].sum(-1)
    for name, row in rows.items():
        count = 2 * SETTING.round_steps if name == training.ENGINE else max(1, SETTING.steps // 2)
        measured = torch.arange(count, 2 * count) % len(of_steps)  # those of the first turn after the warm-up
        assert row["tokens_per_step"][0] == pytest.approx(float(of_steps[measured].double().mean())), name
        assert row["first_loss"] == pytest.approx(rows[training.ENGINE]["first_loss"], abs=2e-4), name
        assert row["tokens_per_second"] == pytest.approx(row["tokens_per_step"][0] / row["seconds_per_step"][0])
        assert (
            row["peak_bytes"] > row["peak_bytes_beyond_start"] >= 0
        )  # so small a model may fit into what importing took
    assert rows[training.ENGINE]["speed_relative_to_engine"] == 1


def test_summary() -> None:
    engine = {"seconds_per_step": [1.0, 2.0, 1.0], "tokens_per_step": [100, 100, 100], "peak": 30, "before": 10}
    # A batch that takes twice as long because it has twice the tokens is not slower.
    other = {"seconds_per_step": [2.0, 8.0, 4.0], "tokens_per_step": [100, 100, 200], "peak": 50, "before": 10}
    row = training.summary(other, engine, {"tokens_per_step": 100, "flops_per_step": 4e12}, 4.0)
    assert row["tokens_per_second"] == 50
    assert row["speed_relative_to_engine"] == 0.5
    assert row["share_of_a_product"] == 0.5
    assert row["peak_bytes_beyond_start"] == 40
    assert training.summary(training_turns.fresh() | {"failed": "x"}, engine, {}, 1.0) == {"failed": "x"}
    # One that failed on the way keeps what it had measured; an engine that failed leaves the others their own figures.
    cut = training.summary(
        training_turns.fresh() | {"seconds_per_step": [2.0], "tokens_per_step": [100], "before": 1, "failed": "x"},
        training_turns.fresh(),
        {"tokens_per_step": 100, "flops_per_step": 4e12},
        4.0,
    )
    assert (cut["tokens_per_second"], cut["speed_relative_to_engine"], cut["peak_bytes"], cut["failed"]) == (
        50,
        None,
        None,
        "x",
    )
    training_report.show(
        {"model": "m", "parameters": 1, "tokens_per_step": 1.0, "flops_per_step": 1.0, "contenders": {"cut": cut}}
    )


def test_a_contender_that_hangs_is_ended(data: tuple[Path, dict]) -> None:
    spec = training.contenders(SETTING, data[0], "fp32")[0]
    raw = {spec.name: training_turns.fresh()}
    worker = training_turns.Worker(spec, 0.01)
    assert not training_turns.attempt(worker, raw, lambda w: w.answer())
    assert "took too long" in raw[spec.name]["failed"]
    assert worker.process.wait(20) != 0


def event(name: str, ts: float) -> dict:
    return {"name": name, "ts": ts}


def test_waits_inside_a_round_are_found() -> None:
    begin, end = round_profile.MARKS
    events = [
        event("cudaStreamSynchronize", 0),
        event(begin, 1),
        event("aten::mm", 2),
        event(end, 5),
        event("aten::item", 6),
    ]
    assert round_profile.synchronisations(events) == []
    events += [event("cudaStreamSynchronize", 3), event("aten::item", 4)]
    assert round_profile.synchronisations(events) == ["cudaStreamSynchronize", "aten::item"]
    for broken in ([], [event(begin, 1)], [event(end, 1), event(begin, 2)]):
        with pytest.raises(ValueError, match="the trace has"):
            round_profile.synchronisations(broken)


def test_a_real_trace_is_read(tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(3).sum().item()
        with record_function(round_profile.MARKS[0]):
            pass
        (torch.ones(3) @ torch.ones(3)).item()
        with record_function(round_profile.MARKS[1]):
            pass
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    found = round_profile.synchronisations(json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
    assert found == ["aten::item", "aten::_local_scalar_dense"]
