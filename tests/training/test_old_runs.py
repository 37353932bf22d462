"""Runs whose config.yaml was written before methods had options of their own: resumed, compared and reported as they
are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lead_engine.config import TrainConfig
from lead_engine.config.old_names import under_new_names
from lead_engine.report.runs import read_run
from lead_engine.training.run_folder import changed_options

OLD = """
pool: p
model: m
out: o
method: lead
recipe: default
budget: 0.05
epochs: 1
seed: 3
resume: false
batch: {capacity: 64, micro_batches: 2, slots: 0}
selection:
  loss_change: inner
  inner_form: sketch
  sketch_dim: 8
  calibrate_every: 3
  smoothing: 0.2
  bandit: exp3
  gamma: 0.3
  exp3s_alpha: 0.01
  draw: mixture
  prior: size
  ranking: soft
  soft_power: 2.0
  rank_by: density
  unseen: drift
  optimism: 1.0
  drop_misaligned: true
  use_tasks: true
  task_power: 1.0
  max_visits: 2
  round_steps: 5
  epochs: 3
  candidates: 3.0
  decay: 0.1
  match: null
"""
"""As the version before wrote it, every option of the selection in it."""
TODAY: dict[str, Any] = {
    "budget": 0.05,
    "seed": 3,
    "batch": {"capacity": 64, "micro_batches": 2},
    "selection": {"round_steps": 5},
}
LEAD = {
    "sketch_dim": 8,
    "calibrate_every": 3,
    "smoothing": 0.2,
    "gamma": 0.3,
    "unseen": "drift",
    "drop_misaligned": True,
    "task_quotas": "proportional",
    "max_visits": 2,
}


def differences(folder: Path, old: dict[str, Any], **today: Any) -> list[tuple[str, Any, Any]]:
    """What `--resume` and `compare` would say."""
    (folder / "config.yaml").write_text(yaml.safe_dump(old))
    return changed_options(folder / "config.yaml", TrainConfig("p", "m", "o", **{**TODAY, **today}), ("resume",))


def changed(**selection: Any) -> dict[str, Any]:
    old = yaml.safe_load(OLD)
    return {**old, "selection": {**old["selection"], **selection}}


def test_the_same_options_under_old_names_are_the_same_run(tmp_path: Path) -> None:
    assert differences(tmp_path, changed(), options=LEAD) == []
    assert differences(tmp_path, changed(), options={**LEAD, "gamma": 0.2}) == [("lead.gamma", 0.3, 0.2)]
    exact = changed(inner_form="exact")
    assert differences(tmp_path, exact, options={**LEAD, "sketch_dim": 0}) == []
    assert differences(tmp_path, exact, options=LEAD) == [("lead.sketch_dim", 0, 8)]
    for old, quotas in [({"use_tasks": False}, "none"), ({"task_power": 0.5}, "sqrt"), ({"task_power": 0.0}, "equal")]:
        assert differences(tmp_path, changed(**old), options={**LEAD, "task_quotas": quotas}) == []


@pytest.mark.parametrize(
    ("old", "told"),
    [
        ({"soft_power": 4.0}, ("selection.soft_power", 4.0)),
        ({"rank_by": "utility"}, ("selection.rank_by", "utility")),
        ({"prior": "uniform"}, ("selection.prior", "uniform")),
        ({"bandit": "exp3s", "exp3s_alpha": 0.1}, ("selection.exp3s_alpha", 0.1)),
        ({"unseen": "estimate", "optimism": 0.0}, ("selection.optimism", 0.0)),
    ],
)
def test_a_value_that_cannot_be_had_any_more_is_named(
    tmp_path: Path, old: dict[str, Any], told: tuple[str, Any]
) -> None:
    now = {**LEAD, **{name: value for name, value in old.items() if name in ("bandit", "unseen")}}
    assert differences(tmp_path, changed(**old), options=now) == [(*told, "gone from this version")]
    unread = {"exp3s_alpha": 0.1, "optimism": 5.0}  # with exp3 and drift nobody read these
    assert differences(tmp_path, changed(**unread), options=LEAD) == []


def test_other_methods(tmp_path: Path) -> None:
    old = changed()
    for method, chosen in {
        "rescore": {
            name: value for name, value in LEAD.items() if name not in ("sketch_dim", "calibrate_every", "unseen")
        },
        "iterit": {"epochs": 3},
        "random": {},
        "full": {"epochs": 1},
    }.items():
        budget = {"budget": TrainConfig.budget} if method == "full" else {}
        assert differences(tmp_path, {**old, "method": method, **budget}, method=method, options=chosen, **budget) == []
    full = {**old, "method": "full", "epochs": 4, "budget": TrainConfig.budget}
    found = differences(tmp_path, full, method="full", options={"epochs": 2}, budget=TrainConfig.budget)
    assert found == [("full.epochs", 4, 2)]
    matched = {**changed(match="runs/a"), "method": "random-matched"}
    assert differences(tmp_path, matched, method="random-matched", options={"match": "runs/a"}) == []
    assert under_new_names(matched)["random-matched"] == {"match": "runs/a"}


def test_options_of_other_groups_that_are_gone(tmp_path: Path) -> None:
    old = changed()
    before = {"optimizer": {"eps": 1e-8, "final_lr": 0.1}, "runtime": {"head_chunk_mib": 8, "peak_tflops": 2.0}}
    assert differences(tmp_path, {**old, **before}, options=LEAD) == []
    before["optimizer"]["final_lr"] = 0.5
    found = differences(tmp_path, {**old, **before}, options=LEAD)
    assert found == [("optimizer.final_lr", 0.5, "gone from this version")]


def test_what_is_written_today_is_left_as_it_is() -> None:
    today = {"method": "lead", "selection": {"round_steps": 4}, "lead": {"gamma": 0.1}}
    assert under_new_names(today) == today


def test_a_report_reads_an_old_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(OLD)
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_run(tmp_path).config["selection"]["gamma"] == 0.3
