"""The table of what is read only with what (lead_engine/config/reads.py), against what methods and estimators really read."""

from __future__ import annotations

import dataclasses
import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lead_engine.base.errors import UserError
from lead_engine.cli import command_line as cli
from lead_engine.config import RECIPES, SelectionConfig, TrainConfig
from lead_engine.config.reads import SELECTION, TRAIN, leaves, unread, why_unread, without_unread
from lead_engine.selection.loss_change import make_loss_change
from lead_engine.selection.methods import METHODS

pytestmark = pytest.mark.slow

PAPER = RECIPES["paper"]["selection"]
BASES: list[tuple[str, dict[str, Any]]] = [
    ("lead", {}),
    ("lead", PAPER),
    ("lead", {"bandit": "exp3s", "unseen": "estimate"}),
    ("lead", {"bandit": "none"}),
    ("lead", {"bandit": "uniform", "draw": "cluster", "ranking": "random"}),
    ("lead", {"ranking": "hard", "use_tasks": False}),
    ("lead", {"loss_change": "none", "unseen": "drift"}),
    ("lead", {"inner_form": "exact", "rank_by": "utility"}),
    ("rescore", {}),
    ("rescore", {"draw": "cluster", "bandit": "exp3s"}),
    ("random", {}),
    ("loss", {}),
    ("ifd", {}),
    ("full", {}),
]
OTHER: dict[str, list[Any]] = {
    "loss_change": ["none", "paper"],
    "inner_form": ["exact", "sketch"],
    "sketch_dim": [5],
    "calibrate_every": [3],
    "smoothing": [0.6],
    "bandit": ["uniform", "none", "exp3s"],
    "gamma": [0.7],
    "exp3s_alpha": [0.5],
    "draw": ["cluster", "mixture"],
    "prior": ["uniform", "size"],
    "ranking": ["hard", "random", "soft"],
    "soft_power": [7.0],
    "rank_by": ["answers", "utility"],
    "unseen": ["drift", "estimate"],
    "optimism": [9.0],
    "drop_misaligned": [True, False],
    "use_tasks": [False, True],
    "task_power": [0.0, 1.0],
    "max_visits": [1],
    "epochs": [7],
    "candidates": [9.0],
    "decay": [0.7],
}


def seen(make_selector: Any, method: str, options: dict[str, Any]) -> tuple[Any, ...]:
    """Six rounds' plans and rewards, and the estimator that goes with them."""
    config = SelectionConfig(**options)
    used = config if METHODS[method].uses_loss_change else dataclasses.replace(config, loss_change="none")
    every_option = {name: value for name, value in vars(used).items() if name != "match"}
    selector = make_selector(90, method=method, **every_option)
    rounds = []
    for number in range(6):
        plan = selector.plan(number, 150)
        for step in range(2):
            loss = ((plan.sample_ids[step] * 37 + number * 11) % 101).float() / 25
            selector.observe(plan.sample_ids[step], loss, torch.full_like(loss, -0.1))
        stats = selector.learn(plan)
        rounds.append((int(plan.cluster), plan.sample_ids.tolist(), float(stats.reward)))
    estimator = make_loss_change(used, 6, selector.method.num_arms, "cpu", 0)
    shapes = {name: tuple(value.shape) for name, value in estimator.state_dict().items()}
    sketch = None if estimator.signature is None else tuple(estimator.signature[0].shape)
    return rounds, type(estimator), shapes, sketch, estimator.wants_hidden, getattr(estimator, "calibrate_every", None)


def test_what_the_table_calls_unread_changes_nothing_and_what_it_calls_read_something(make_selector: Any) -> None:
    matters = set()
    for method, options in BASES:
        whole = SimpleNamespace(method=method, selection=SelectionConfig(**options))
        expected = seen(make_selector, method, options)
        for name, values in OTHER.items():
            reason = why_unread(f"selection.{name}", whole, SELECTION)
            for value in values:
                if value == getattr(whole.selection, name) or (name in matters and not reason):
                    continue
                changed = {**options, name: value}
                if changed.get("loss_change") == "paper" and changed.get("draw") != "cluster":
                    changed |= {"draw": "cluster"} if reason is None else {"loss_change": "none"}
                found = seen(make_selector, method, changed)
                if reason:
                    assert found == expected, (method, options, name, value, reason)
                elif found != expected:
                    matters.add(name)
    assert matters == set(OTHER) - {"epochs", "candidates", "decay"}  # iterit's


def test_the_table_has_every_option_of_the_selection() -> None:
    names = {f.name for f in dataclasses.fields(SelectionConfig)}
    assert set(SELECTION) == {f"selection.{name}" for name in names}
    assert set(OTHER) == names - {"round_steps", "match"}
    own = {
        "iterit": {"epochs", "candidates", "decay"},
        "random-matched": {"match"},
        "random": set(),
        "full": set(),
        "loss": set(),
    }
    for method, options in own.items():
        source = inspect.getsource(inspect.getmodule(METHODS[method]))
        assert set(re.findall(r"config\.([a-z]\w+)", source)) - {"import"} - {"SelectionConfig"} == options
        config = TrainConfig("p", "m", "o", method=method)
        read = {name for name in names if f"selection.{name}" not in unread(config, TRAIN)}
        assert read == options | {"round_steps"}


def test_every_need_is_of_an_option_that_is_there() -> None:
    there = set(leaves(TrainConfig("p", "m", "o")))
    for option, needs in TRAIN.items():
        assert option in there or any(name.startswith(f"{option}.") for name in there)
        assert set(needs) <= there


LINE = {
    "train": ["--pool", "p", "--model", "m", "--out", "no-such-folder/o"],
    "prepare": ["--pool", "p", "--model", "m", "--out", "no-such-folder/o"],
    "pretrain": ["--text", "t", "--model", "m", "--out", "no-such-folder/o"],
    "eval": ["--model", "m", "--data", "d"],
}


@pytest.mark.parametrize(
    ("command", "flags", "told"),
    [
        ("train", "--epochs 3", "--epochs 3: is read only with --method full, not lead; leave it out"),
        ("train", "--epochs 1", "--epochs 1: is read only with --method full"),  # the default, but it was asked for
        (
            "train",
            "--method full --budget 0.1",
            "--budget 0.1: is read only with --method that chooses among the samples, not full",
        ),
        (
            "train",
            "--selection.candidates 2",
            "--selection.candidates 2.0: is read only with --method iterit, not lead",
        ),
        ("train", "--method iterit --selection.epochs 1 --selection.candidates 2", "--selection.epochs above 1, not 1"),
        ("train", "--selection.match r", "--selection.match r: is read only with --method random-matched"),
        (
            "train",
            "--method random --selection.gamma 0.1",
            "--selection.gamma 0.1: is read only with --method lead or rescore, not random",
        ),
        ("train", "--method rescore --selection.sketch-dim 8", "is read only with --method lead, not rescore"),
        (
            "train",
            "--selection.loss-change none --selection.calibrate-every 2",
            "--selection.loss-change inner, not none",
        ),
        ("train", "--selection.exp3s-alpha 0.1", "--selection.bandit exp3s, not exp3"),
        ("train", "--selection.optimism 2", "--selection.unseen estimate, not initial"),
        ("train", "--selection.no-use-tasks --selection.task-power 1", "--selection.use-tasks True, not False"),
        (
            "train",
            "--method loss --selection.no-use-tasks",
            "--selection.use-tasks False: is read only with --method lead or rescore",
        ),
        ("train", "--lora.alpha 8", "--lora.alpha 8.0: is read only with --lora.rank above 0"),
        ("train", "--recipe paper --method random", "--recipe paper: is read only with --method lead or rescore"),
        (
            "train",
            "--optimizer.schedule constant --optimizer.final-lr 0.2",
            "--optimizer.schedule cosine or linear, not constant",
        ),
        (
            "prepare",
            "--scoring ngram --warmup-share 0.1",
            "--warmup-share 0.1: is read only with --scoring model, not ngram",
        ),
        (
            "prepare",
            "--warmup-share 0 --optimizer.lr 1",
            "--optimizer.lr 1.0: is read only with --warmup-share above 0",
        ),
        ("prepare", "--vocab-size 500", "--vocab-size 500: is read only with --model scratch:NAME, not m"),
        ("pretrain", "--vocab-size 500", "--vocab-size 500: is read only with --model scratch:NAME, not m"),
        ("eval", "--max-new-tokens 9", "--max-new-tokens 9: is read only with --generate above 0"),
    ],
)
def test_options_that_nothing_reads_are_refused(
    command: str, flags: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, *LINE[command], *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --")
    assert told in error


def test_recipes_and_python_callers() -> None:
    paper = TrainConfig("p", "m", "o", recipe="paper")
    assert paper.selection == SelectionConfig(**PAPER)  # the recipe, not its name alone
    assert TrainConfig("p", "m", "o", recipe="paper", selection={"gamma": 0.3}).selection == SelectionConfig(
        **PAPER | {"gamma": 0.3}
    )
    with pytest.raises(UserError, match="--recipe paper: `selection` has none of it"):
        TrainConfig("p", "m", "o", recipe="paper", selection=SelectionConfig(gamma=0.3))
    with pytest.raises(
        UserError, match=r"--selection\.gamma 0\.3: is read only with --method lead or rescore, not random"
    ):
        TrainConfig("p", "m", "o", method="random", selection=SelectionConfig(gamma=0.3))
    none = TrainConfig(
        "p", "m", "o", recipe="paper", selection={"bandit": "none"}
    )  # the recipe's prior is nobody's mistake
    assert none.selection.prior == "uniform"
    assert without_unread(none, TRAIN, none.default_of) == none
