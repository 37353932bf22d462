"""Arguments of Python callers as text, paths, lists and mappings: converted if the meaning is clear, else UserError."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lead_engine as engine
from lead_engine import Layout, PoolState, PrepareConfig, Selector, TokenStore, TrainConfig, UserError
from lead_engine.integrations import lead
from lead_engine.pool.records import read_records


def selector(**changed: Any) -> Selector:
    lengths = torch.full((8,), 9)
    layout = Layout(steps=1, micro_batches=1, slots=2, capacity=32)
    options = {"method": "random", "layout": layout, "seed": 0, "device": "cpu"} | changed
    return Selector(PoolState.unscored(8), lengths, lengths - 4, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: engine.train("RUN"), r"train\(config\) 'RUN': must be a TrainConfig, or a mapping of its options"),
        (lambda: engine.train({"pool": "p"}), r"train\(config\) .*TrainConfig needs: model, out missing"),
        (
            lambda: engine.train({"pool": "p", "model": "m", "out": "o", "budgt": 1}),
            r"train\(config\) .*has no 'budgt'",
        ),
        (lambda: engine.prepare_pool(TrainConfig(pool="p", model="m", out="o")), r"prepare_pool\(config\)"),
        (lambda: engine.evaluate(None), r"evaluate\(config\) None: must be a EvalConfig"),
        (lambda: engine.Session(3), r"Session\(config\) 3"),
        (lambda: TokenStore.open(3), r"TokenStore.open\(folder\) 3: must be a path"),
        (lambda: TokenStore.open("none", "cpu"), r"TokenStore.open\(placement\) 'cpu': must be one of auto, device"),
        (lambda: TokenStore.open("none", "auto", "gpu"), r"TokenStore.open\(device\) 'gpu': must be a device"),
        (lambda: TokenStore.open("none/store"), r"none/store"),
        (lambda: PoolState.load(None), r"PoolState.load\(folder\) None: must be a path"),
        (lambda: read_records(3, skip_bad=False), r"read_records\(sources\)\[?0?\]? ?3: must be text"),
        (lambda: read_records("none.jsonl", skip_bad=False), "--pool none.jsonl"),
        (lambda: lead(budget="much"), r"lead\(budget=...\) 'much': must be a number"),
        (lambda: lead(budget=math.nan), r"lead\(budget=...\) nan: must be above 0 and at most 1000"),
        (lambda: lead(method=None), r"lead\(method=...\) None: must be text"),
        (lambda: lead(seed=-1), r"lead\(seed=...\) -1: must be between 0 and"),
        (lambda: lead(options=3), r"lead\(options=...\) 3: must be a LeadOptions"),
        (lambda: lead(3), r"lead\(pool=...\) 3: must be a path"),
        (lambda: lead("none"), "none/store"),
        (lambda: selector(method="leed"), r"Selector\(method\) 'leed': must be one of lead, iterit, .*"),
        (lambda: selector(seed=2**64), r"Selector\(seed\) 18446744073709551616: must be between"),
        (lambda: selector(device="gpu"), r"Selector\(device\) 'gpu': must be a device"),
        (lambda: selector(layout=(1, 1, 2, 32)), r"Selector\(layout\) .*: must be a Layout"),
        (lambda: Layout(0, 1, 2, 32), "Layout.steps 0: must be at least 1"),
        (
            lambda: engine.make_loss_change("inner", "x", 1, "cpu", 0),
            r"make_loss_change\(hidden_size\) 'x': must be a whole number",
        ),
        (lambda: engine.make_loss_change("inner", 8, 1, "cpu", -1), r"make_loss_change\(seed\) -1: must be between"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_name(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}|^.*{message}$") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_text_for_paths_and_paths_for_text_through_whole_runs(make_model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model()
    lines = [json.dumps({"instruction": f"say {i}", "output": f"{i} and {i}"}) + "\n" for i in range(24)]
    Path("pool.jsonl").write_text("".join(lines))
    assert (
        len(read_records("pool.jsonl", skip_bad=False)[0])
        == len(read_records([Path("pool.jsonl")], skip_bad=False)[0])
        == 24
    )
    engine.prepare_pool(
        PrepareConfig(
            pool=Path("pool.jsonl"),
            model=model,
            out="P",
            scoring="ngram",
            clusters=1,
            max_length=64,
            batch={"capacity": 64},
        )
    )
    assert TokenStore.open("P/store").num_samples == TokenStore.open(Path("P") / "store", "mmap").num_samples == 24
    assert PoolState.exists("P")
    options = {"pool": "P", "model": model, "budget": "0.3", "method": "random", "batch": {"capacity": 64}}
    with engine.Session(options | {"out": "unused"}) as session:
        assert sum(len(report.losses) for report in session.rounds()) > 1
        session.save("SAVED/model")
    loss = engine.evaluate(
        {"model": Path("SAVED/model"), "data": "pool.jsonl", "max_length": 64.0, "batch": {"capacity": 64}}
    )
    assert loss["loss"]["overall"] > 0
    assert not Path("unused").exists()
