"""What a method says is read only with what (its `Options.read_with`), against what methods and estimators really
read.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest
import torch

from lead_engine.base.errors import UserError
from lead_engine.cli import command_line as cli
from lead_engine.config import MethodOptions, SelectionConfig, TrainConfig, find_method, method_names
from lead_engine.config.methods import method_options, options_of
from lead_engine.config.reads import TRAIN, leaves, unread, why_unread, without_unread
from lead_engine.selection.methods.full import FullOptions
from lead_engine.selection.methods.lead import ClusterOptions, LeadOptions

pytestmark = pytest.mark.slow

PAPER = dict(LeadOptions.recipe("paper"))
BASES: list[tuple[str, dict[str, Any]]] = [
    ("lead", {}),
    ("lead", PAPER),
    ("lead", {"bandit": "exp3s", "unseen": "estimate"}),
    ("lead", {"bandit": "none"}),
    ("lead", {"bandit": "uniform", "draw": "cluster", "ranking": "random"}),
    ("lead", {"ranking": "hard", "task_quotas": "none"}),
    ("lead", {"loss_change": "none", "unseen": "drift"}),
    ("lead", {"sketch_dim": 0, "ranking": "hard"}),
    ("rescore", {}),
    ("rescore", {"draw": "cluster", "bandit": "exp3s"}),
]
OTHER: dict[str, list[Any]] = {
    "loss_change": ["none", "paper"],
    "sketch_dim": [5, 0],
    "calibrate_every": [3],
    "smoothing": [0.6],
    "bandit": ["uniform", "none", "exp3s"],
    "gamma": [0.7],
    "draw": ["cluster", "mixture"],
    "ranking": ["hard", "random", "soft"],
    "unseen": ["drift", "estimate"],
    "drop_misaligned": [True, False],
    "task_quotas": ["none", "equal", "proportional"],
    "max_visits": [1],
}


def seen(make_selector: Any, method: str, chosen: MethodOptions) -> tuple[Any, ...]:
    """Six rounds' plans and rewards, and the estimator that goes with them."""
    selector = make_selector(90, method=method, **vars(chosen))
    rounds = []
    for number in range(6):
        plan = selector.plan(number, 150)
        for step in range(2):
            loss = ((plan.sample_ids[step] * 37 + number * 11) % 101).float() / 25
            selector.observe(plan.sample_ids[step], loss, torch.full_like(loss, -0.1))
        stats = selector.learn(plan)
        rounds.append((int(plan.cluster), plan.sample_ids.tolist(), float(stats.reward)))
    estimator = selector.loss_change(6)
    shapes = {name: tuple(value.shape) for name, value in estimator.state_dict().items()}
    sketch = None if estimator.signature is None else tuple(estimator.signature[0].shape)
    return rounds, type(estimator), shapes, sketch, estimator.wants_hidden, getattr(estimator, "calibrate_every", None)


def unchecked(base: MethodOptions, **changes: Any) -> MethodOptions:
    """A copy whose constructor has not refused what is not read."""
    copy: MethodOptions = object.__new__(type(base))
    for name, value in {**vars(base), **changes}.items():
        object.__setattr__(copy, name, value)
    return copy


def test_what_the_table_calls_unread_changes_nothing_and_what_it_calls_read_something(
    make_selector: Any, monkeypatch
) -> None:
    monkeypatch.setattr(MethodOptions, "refuse_unread", lambda self, given=(): None)
    matters = set()
    for method, options in BASES:
        base = method_options(method, options)
        expected = seen(make_selector, method, base)
        for name, values in OTHER.items():
            if not hasattr(base, name):
                continue
            reason = why_unread(name, base, base.read_with)
            for value in values:
                if value == getattr(base, name) or (name in matters and not reason):
                    continue
                changed = {name: value}
                if {**vars(base), **changed}.get("loss_change") == "paper" and {**vars(base), **changed}[
                    "draw"
                ] != "cluster":
                    changed |= {"draw": "cluster"} if reason is None else {"loss_change": "none"}
                found = seen(make_selector, method, unchecked(base, **changed))
                if reason:
                    assert found == expected, (method, options, name, value, reason)
                elif found != expected:
                    matters.add(name)
    assert matters == set(OTHER)


def test_every_option_is_one_that_its_method_reads() -> None:
    """An option of a method stands in its source, or in that of the class it is made of."""
    assert set(OTHER) == {field.name for field in dataclasses.fields(LeadOptions)}
    for name in method_names():
        source = "".join(inspect.getsource(inspect.getmodule(cls)) for cls in find_method(name).__mro__[:-1])
        read = set(re.findall(r"options\.([a-z]\w+)", source))
        assert {field.name for field in dataclasses.fields(options_of(name))} <= read, name
        config = TrainConfig("p", "m", "o", method=name)
        assert not [
            option
            for option in leaves(config)
            if option.startswith((f"{name}.", "selection."))
            and option not in ("selection.round_steps",)
            and option in unread(config, config.table())
        ]


def test_every_need_is_of_an_option_that_is_there() -> None:
    there = set(leaves(TrainConfig("p", "m", "o")))
    for option, needs in TRAIN.items():
        assert option in there or any(name.startswith(f"{option}.") for name in there)
        assert set(needs) <= there
    for name in method_names():
        own = options_of(name)
        there = {field.name for field in dataclasses.fields(own)}
        assert own.read_with.keys() | {other for needs in own.read_with.values() for other in needs} <= there
        assert all(recipe.keys() <= there for recipe in own.recipes.values())


LINE = {
    "train": ["--pool", "p", "--model", "m", "--out", "no-such-folder/o"],
    "prepare": ["--pool", "p", "--model", "m", "--out", "no-such-folder/o"],
    "pretrain": ["--text", "t", "--model", "m", "--out", "no-such-folder/o"],
    "eval": ["--model", "m", "--data", "d"],
}


@pytest.mark.parametrize(
    ("command", "flags", "told"),
    [
        ("train", "--epochs 3", "--epochs: is now --full.epochs"),
        ("train", "--full.epochs 3", "--full.epochs: is read only with --method full, not lead; leave it out"),
        (
            "train",
            "--method full --budget 0.1",
            "--budget 0.1: is read only with --method that chooses among the samples, not full",
        ),
        ("train", "--iterit.candidates 2", "--iterit.candidates: is read only with --method iterit, not lead"),
        ("train", "--method iterit --iterit.epochs 1 --iterit.candidates 2", "--iterit.epochs above 1, not 1"),
        ("train", "--random-matched.match r", "--random-matched.match: is read only with --method random-matched"),
        ("train", "--method random --lead.gamma 0.1", "--lead.gamma: is read only with --method lead, not random"),
        ("train", "--method rescore --lead.sketch-dim 8", "is read only with --method lead, not rescore"),
        ("train", "--lead.loss-change none --lead.calibrate-every 2", "--lead.loss-change inner, not none"),
        ("train", "--lead.loss-change none --lead.sketch-dim 64", "--lead.loss-change inner or paper, not none"),
        (
            "train",
            "--lead.bandit uniform --lead.gamma 0.1",
            "--lead.gamma 0.1: is read only with --lead.bandit exp3 or",
        ),
        ("train", "--method rescore --rescore.bandit none --rescore.gamma 0.2", "with --rescore.bandit exp3 or exp3s"),
        ("train", "--lora.alpha 8", "--lora.alpha 8.0: is read only with --lora.rank above 0"),
        ("train", "--recipe paper --method random", "--recipe paper: is read only with --method that has recipes"),
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
    assert paper.options == LeadOptions(**PAPER)  # the recipe, not its name alone
    assert TrainConfig("p", "m", "o", recipe="paper", options={"gamma": 0.3}).options == LeadOptions(
        **PAPER | {"gamma": 0.3}
    )
    with pytest.raises(UserError, match="--recipe paper: `options` has none of it"):
        TrainConfig("p", "m", "o", recipe="paper", options=LeadOptions(gamma=0.3))
    with pytest.raises(UserError, match=r"options gamma: must be left out: the method random has no options"):
        TrainConfig("p", "m", "o", method="random", options={"gamma": 0.3})
    with pytest.raises(
        UserError, match=r"options LeadOptions\(.*: must be a IteritOptions, or a mapping of its options"
    ):
        TrainConfig("p", "m", "o", method="iterit", options=LeadOptions(gamma=0.3))
    with pytest.raises(
        UserError, match=r"--lead\.gamma 0\.3: is read only with --lead\.bandit exp3 or exp3s, not none"
    ):
        LeadOptions(bandit="none", gamma=0.3)
    none = TrainConfig("p", "m", "o", recipe="paper", options={"bandit": "none"})
    assert without_unread(none, none.table(), none.default_of) == none
    again = TrainConfig("p", "m", "o", method="rescore", recipe="paper").options
    assert {name: getattr(again, name) for name in ClusterOptions.recipe("paper")} == ClusterOptions.recipe("paper")
    assert TrainConfig("p", "m", "o", method="full", options={"epochs": 2}).options == FullOptions(epochs=2)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: SelectionConfig(gamma=0.2), r"SelectionConfig\(gamma=\.\.\.\): is now --lead\.gamma"),
        (
            lambda: SelectionConfig(prior="size"),
            r"no option any more: uniform with --lead\.draw cluster, size with mixture",
        ),
        (lambda: TrainConfig("p", "m", "o", epochs=3), r"TrainConfig\(epochs=\.\.\.\): is now --full\.epochs"),
        (
            lambda: TrainConfig("p", "m", "o", selection={"match": "r"}),
            r"--selection\.match: is now --random-matched\.match",
        ),
        (
            lambda: TrainConfig("p", "m", "o", options={"use_tasks": False}),
            r"use_tasks: is now part of --lead\.task-quotas",
        ),
    ],
)
def test_python_callers_with_old_names_hear_the_new_ones(build: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        build()
