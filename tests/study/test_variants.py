from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lead_engine.base.errors import UserError
from lead_engine.config import MethodOptions
from lead_engine.study.plan import StudyRun, plan_runs
from lead_engine.study.variants import read_study


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """As much of a prepared pool as planning looks at."""
    return make_pool(tmp_path / "pool")


def make_pool(folder: Path) -> Path:
    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    (folder / "prepare.json").write_text(json.dumps({"max_length": 128}))
    return folder


def plan(pool: Path, **more: object) -> dict[str, StudyRun]:
    path = pool.parent / "study.yaml"
    path.write_text(
        yaml.safe_dump({"pool": str(pool), "model": "m", "heldout": ["h"], "seeds": [0]} | more, sort_keys=False)
    )
    return {run.name: run for run in plan_runs(read_study(path), pool.parent / "out")}


def test_a_variant_is_the_study_with_changes(pool: Path) -> None:
    variants = {"v": {"method": "loss", "selection": {"round_steps": 2}, "optimizer": {"lr": 1e-3}}}
    runs = plan(
        pool,
        methods=["lead"],
        variants=variants,
        selection={"round_steps": 7},
        lead={"max_visits": 3},
        lora={"rank": 4},
    )
    plain, changed = runs["lead-2.5pct-s0"].train, runs["v-2.5pct-s0"].train
    assert (changed.method, changed.selection.round_steps, changed.optimizer.lr) == ("loss", 2, 1e-3)
    assert changed.options == MethodOptions()  # the study's own is for those that read it
    assert changed.lora.rank == plain.lora.rank == 4
    assert (plain.method, plain.options.max_visits, plain.optimizer.lr) == ("lead", 3, 2e-4)


def test_standard_input_cannot_be_the_held_out_records(pool: Path) -> None:
    with pytest.raises(UserError, match=r"study\.yaml: heldout: every run reads"):
        plan(pool, heldout=["x.jsonl", "-"])


def test_a_recipe_comes_under_what_the_study_and_the_variant_say(pool: Path) -> None:
    variants = {"paper": {"recipe": "paper"}, "mine": {"recipe": "paper", "lead": {"smoothing": 0.3}}}
    runs = plan(pool, variants=variants, lead={"gamma": 0.5, "bandit": "exp3s"})
    assert list(runs) == ["paper-2.5pct-s0", "mine-2.5pct-s0"]  # no methods beside variants unless they are named
    paper, mine = (run.train.options for run in runs.values())
    assert (paper.loss_change, paper.gamma, paper.bandit, paper.smoothing) == ("paper", 0.5, "exp3s", 0.1)
    assert (mine.loss_change, mine.smoothing) == ("paper", 0.3)
    assert all(run.train.recipe == "paper" for run in runs.values())


def test_own_pool_budgets_and_seeds_all_of_one_seed_together(pool: Path, tmp_path: Path) -> None:
    other = make_pool(tmp_path / "other")
    variants = {
        "a": {},
        "b": {"pool": str(other), "budgets": [0.1], "seeds": [5, 0]},
        "whole": {"method": "full", "full": {"epochs": 2}},
    }
    runs = plan(pool, variants=variants, budgets=[0.01, 0.02], seeds=[0, 1])
    assert list(runs) == [
        "a-1pct-s0",
        "a-2pct-s0",
        "b-10pct-s0",
        "whole-200pct-s0",
        "a-1pct-s1",
        "a-2pct-s1",
        "whole-200pct-s1",
        "b-10pct-s5",
    ]
    assert runs["b-10pct-s0"].train.pool == other
    assert runs["a-1pct-s0"].train.pool == pool
    assert runs["whole-200pct-s1"].train.options.epochs == 2


def test_random_matched_imitates_the_run_of_the_same_budget_and_seed(pool: Path) -> None:
    variants = {"soft": {"lead": {"ranking": "soft"}}, "control": {"method": "random-matched", "match": "soft"}}
    runs = plan(pool, methods=["random-matched", "lead"], variants=variants, budgets=[0.01, 0.02], seeds=[3, 4])
    assert runs["control-2pct-s4"].train.match == runs["soft-2pct-s4"].folder
    assert runs["random-matched-1pct-s3"].train.match == runs["lead-1pct-s3"].folder
    assert runs["control-1pct-s3"].after == "soft-1pct-s3"
    assert runs["soft-1pct-s3"].after is None


LEAD = {"methods": ["lead"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": {"a/b": {}}}, r"variants\.a/b: 'a/b' cannot be part of a folder's name"),
        ({"variants": {3: {}}}, r"variants: expected names, found 3"),
        ({"variants": ["a"]}, r"variants: expected a mapping"),
        ({"variants": {"a": None}}, r"variants\.a: expected a mapping of options, found nothing"),
        ({"variants": {"a": {"metod": "lead"}}}, r"variants\.a: metod: unknown key; did you mean method\?"),
        ({"variants": {"a": {"out": "x"}}}, r"variants\.a: out: unknown key"),
        (
            {"variants": {"a": {"lead": {"bandid": "none"}}}},
            r"variants\.a: lead\.bandid: unknown key; did you mean bandit",
        ),
        ({"variants": {"a": {"lead": {"bandit": "best"}}}}, r"variants\.a: lead\.bandit: expected one of"),
        ({"variants": {"a": {"batch": {"capacity": 2}}}}, r"variants\.a: batch\.capacity 2: must be at least 16"),
        ({"variants": {"a": {"budgets": [2.0]}}}, r"variants\.a: budgets \(2.0,\): must be shares"),
        ({"variants": {"a": {"budgets": []}}}, r"budgets: name at least one share"),
        ({"variants": {"a": {"seeds": [1, 1]}}}, r"variants\.a: seeds"),
        ({"variants": {"a": {"method": "full", "budgets": [0.1]}}}, r"variants\.a: budgets: full takes the whole pool"),
        ({"variants": {"a": {"match": "lead"}}}, r"variants\.a: match: only the method random-matched"),
        (
            {"variants": {"a": {"method": "random-matched", "random-matched": {"match": "x"}}}},
            r"variants\.a: random-matched\.match: the study fills it in",
        ),
        (LEAD | {"variants": {"lead": {}}}, r"methods, variants: lead is there twice"),
        ({"methods": []}, r"methods \(\): must be at least one method"),
        ({"jobs": 0}, r"jobs 0: must be at least 1"),
        (LEAD | {"reference": "random"}, r"reference: random: no such variant; the study has lead"),
        (LEAD | {"contrasts": [["lead", "rando"]]}, r"contrasts\[0\]: rando: no such variant"),
        (LEAD | {"contrasts": [["lead", "lead"]]}, r"contrasts\[0\]: lead cannot be compared with itself"),
        (LEAD | {"contrasts": [["lead"]]}, r"contrasts\[0\]: expected 2 values, found 1"),
        ({"methods": ["random-matched"]}, r"random-matched: match: lead: no such variant"),
        (
            {"variants": {"a": {"method": "random-matched", "match": "b"}, "b": {"budgets": [0.5]}}},
            r"variants\.a: match: b has no run with budget 0\.025",
        ),
        (
            {"variants": {"a": {"method": "random-matched", "match": "b"}, "b": {"seeds": [1]}}},
            r"match: b has no run with seed 0",
        ),
        (
            {"variants": {"a": {"method": "random-matched", "match": "b"}, "b": {"method": "full"}}},
            r"b has no run with budget",
        ),
        ({"variants": {"a": {"method": "random-matched", "match": "a"}}}, r"match: a is random-matched itself"),
        (
            {"variants": {"a": {"method": "random-matched", "match": "b"}, "b": {"pool": "elsewhere"}}},
            r"match: b selects from another pool, elsewhere",
        ),
        ({"variants": {"a": {"pool": "elsewhere"}}}, r"elsewhere: not a prepared pool"),
    ],
)
def test_mistakes_name_the_variant_and_the_key(pool: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan(pool, **change)
    assert "study.yaml" in str(caught.value) or "not a prepared pool" in str(caught.value)
