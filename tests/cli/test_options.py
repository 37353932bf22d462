"""What every config refuses or converts when it is built, whoever gives the value: flags, YAML, or a Python caller."""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lead_engine import config
from lead_engine.base.errors import UserError
from lead_engine.config import BatchConfig, EvalConfig, OptimizerConfig, PretrainConfig, TrainConfig
from lead_engine.config.bounds import Bounds
from lead_engine.config.convert import field_hints
from lead_engine.config.options import Options
from lead_engine.selection.methods.random_matched import RandomMatchedOptions
from lead_engine.study.variants import VariantOptions

SMALLEST: dict[type, dict[str, Any]] = {
    config.TrainConfig: {"pool": "p", "model": "m", "out": "o"},
    config.PretrainConfig: {"text": "t", "out": "o"},
    config.PrepareConfig: {"pool": "p", "model": "m", "out": "o"},
    config.EvalConfig: {"model": "m", "data": "d"},
    config.HarnessConfig: {"model": "m", "tasks": "t", "out": "o"},
    config.ReportConfig: {"runs": "r", "out": "o"},
    config.MergeConfig: {"run": "r", "out": "o"},
    config.StudyConfig: {"pool": "p", "model": "m", "heldout": "h"},
    config.CompareConfig: {"config": "c", "out": "o"},
    config.MakePoolConfig: {"out": "o"},
    VariantOptions: {"pool": "p", "budgets": 0.1, "seeds": 0},
}
CLASSES = [c for c in vars(config).values() if inspect.isclass(c) and issubclass(c, Options) and c is not Options]
CLASSES.append(VariantOptions)
FIELDS = [(cls, name) for cls in CLASSES for name in field_hints(cls)]
NASTY = [
    math.nan,
    math.inf,
    -math.inf,
    -1,
    -1.0,
    0,
    0.0,
    -0.0,
    1,
    1.5,
    4.0,
    1e-300,
    5e-324,
    1e9,
    1e10,
    1e308,
    2**31,
    2**32 - 1,
    2**32,
    2**63,
    2**64,
    10**400,
    -(10**400),
    True,
    None,
    "",
    "x",
    "1",
    "1e-4",
    "0123",
    "1__0",
    "inf",
    "nan",
    "9" * 5000,
    "a\0b",
    "\udcff",
    "$NO_SUCH",
    "~no-such-user/x",
    b"x",
    1j,
    [],
    (),
    [1],
    (0.5, 0.6),
    [[]],
    {},
    {"a": 1},
    {1: 2},
    object(),
    Path("p"),
    float,
    np.float32(0.5),
    np.int64(3),
    np.bool_(True),
    np.array(3),
    np.array([0.1, 0.2]),
    np.datetime64("2024-01-01"),
    np.str_("lead"),
]


def build(cls: type, **values: Any) -> Any:
    return cls(**{**SMALLEST.get(cls, {}), **values})


def built_or_told(cls: type, name: str, value: Any) -> tuple[Any, str]:
    """The field of a config built with the value, or what the error says. Any other exception escapes."""
    try:
        return getattr(build(cls, **{name: value}), name), ""
    except UserError as error:
        return None, str(error)


def bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


@pytest.mark.parametrize(("cls", "name"), FIELDS)
def test_any_value_is_taken_or_refused_naming_the_flag(cls: type[Options], name: str) -> None:
    for value in NASTY:
        built, told = built_or_told(cls, name, value)
        kind = bare(field_hints(cls)[name])
        if told:
            flag = told.partition(" ")[0].partition("[")[0].partition(".")[0]
            assert cls.flag(name).startswith(flag) or flag in ("--max-length", "--block"), (
                value,
                told,
            )  # these: a rule with --batch
            assert "must be" in told or "is read only with" in told
        elif kind in (int, float, bool, str):
            assert type(built) is kind, value  # not NumPy's, which YAML cannot write
            assert kind is not float or math.isfinite(built), value


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_numbers_stay_within_the_bounds_beside_their_field(data: st.DataObject) -> None:
    numeric = [(c, n) for c, n in FIELDS if bare(field_hints(c)[n]) in (int, float)]
    cls, name = data.draw(st.sampled_from(numeric))
    value = data.draw(st.one_of(st.integers(), st.floats(), st.integers(-3, 300), st.floats(-1, 2)))
    built, told = built_or_told(cls, name, value)
    assert ("must be" in told or "is read only with" in told) if told else built == value and abs(built) <= 2**32


@pytest.mark.parametrize(("cls", "name"), FIELDS)
def test_every_number_has_bounds_and_every_default_keeps_them(cls: type[Options], name: str) -> None:
    hint = field_hints(cls)[name]
    for each in typing.get_args(hint) if typing.get_origin(hint) is tuple else [hint]:
        if bare(each) in (int, float):
            assert any(isinstance(extra, Bounds) for extra in each.__metadata__)
    default = getattr(build(cls), name)
    assert default == getattr(build(cls, **{name: default}), name)
    if isinstance(default, tuple):
        assert default == getattr(build(cls, **{name: list(default)}), name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(TrainConfig, seed=-1), "--seed -1: must be between 0 and 4294967295"),
        (lambda: build(config.PrepareConfig, seed=99999999999), "--seed 99999999999: must be between 0 and"),
        (lambda: build(TrainConfig, seed=18446744073709551616), "--seed 18446744073709551616: must be"),
        (lambda: OptimizerConfig(warmup=math.nan), "--optimizer.warmup nan: must be in"),
        (lambda: OptimizerConfig(warmup=-1), "--optimizer.warmup -1: must be in"),
        (lambda: OptimizerConfig(lr=math.inf), "--optimizer.lr inf: must be finite"),
        (lambda: OptimizerConfig(betas=(0.9, 1)), r"--optimizer.betas \(0.9, 1\): must be two numbers in \[0, 1\)"),
        (lambda: OptimizerConfig(betas=0.9), "--optimizer.betas 0.9: must be a list"),
        (lambda: BatchConfig(capacity=64.5), "--batch.capacity 64.5: must be a whole number"),
        (lambda: BatchConfig(capacity=True), "--batch.capacity True: must be a whole number"),
        (lambda: build(TrainConfig, method="leed"), "--method 'leed': must be one of lead, "),
        (lambda: build(TrainConfig, batch=3), "--batch 3: must be a BatchConfig"),
        (
            lambda: build(TrainConfig, batch={"capcity": 3}),
            "--batch {'capcity': 3}: must be a mapping of BatchConfig's options",
        ),
        (lambda: build(TrainConfig, batch={"capacity": 3}), "--batch.capacity 3: must be at least 16"),
        (lambda: build(TrainConfig, out=""), "--out '': must be the name of a file or folder"),
        (lambda: build(EvalConfig, data=("a", 3)), r"--data\[1\] 3: must be text"),
        (lambda: build(config.StudyConfig, seeds=[1, 1]), r"seeds \[1, 1\]: must be at least one seed, each once"),
        (lambda: build(config.StudyConfig, seeds=[]), r"seeds \[\]: must be at least one seed, each once"),
        (
            lambda: build(EvalConfig, max_length=2048, batch={"capacity": 1024}),
            "--max-length 2048: must be at most --b",
        ),
    ],
)
def test_refusals_say_what_it_must_be(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        make()


def test_what_loses_nothing_is_converted() -> None:
    assert build(EvalConfig, data="held.jsonl").data == ("held.jsonl",)  # not letter by letter
    assert build(EvalConfig, data=[Path("a"), "b"], model=Path("m")).data == ("a", "b")
    assert build(PretrainConfig, text=Path("a")).text == (Path("a"),)
    made = build(
        TrainConfig,
        out="run",
        seed="7",
        budget=1,
        batch={"capacity": 64.0},
        optimizer={"lr": "1e-4", "betas": [0.5, 0]},
    )
    assert (made.out, made.seed, made.budget, made.batch.capacity) == (Path("run"), 7, 1.0, 64)
    assert (made.optimizer.lr, made.optimizer.betas) == (1e-4, (0.5, 0.0))
    assert RandomMatchedOptions(match="other").match == Path("other")
    assert OptimizerConfig(betas=np.array([0.5, 0.6])).betas == (0.5, 0.6)
    # a mapping leaves the rest of this field's own default
    made = build(PretrainConfig, optimizer={"betas": (0.5, 0.6)})
    assert made.optimizer == OptimizerConfig(lr=2e-3, weight_decay=0.1, betas=(0.5, 0.6))


def test_home_and_variables_in_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.chdir(tmp_path)
    made = build(config.PrepareConfig, pool=["$DATA/a", "~/b"], model="${DATA}/m", out="~/o")
    assert (made.pool, made.model, made.out) == (("/data/a", "/home/me/b"), "/data/m", Path("/home/me/o"))
    for text, told in (
        ("$UNSET/a", "UNSET is not set"),
        ("${EMPTY}", "EMPTY is not set"),
        ("~nobody-here/a", "no such user"),
    ):
        for name in ("pool", "model", "out"):
            with pytest.raises(UserError, match=f"--{name}.*{told}"):
                build(config.PrepareConfig, **{name: text})
    Path("a$UNSET").touch()  # a name that is there is meant
    assert build(config.PrepareConfig, out="a$UNSET", model="$5 model").out == Path("a$UNSET")


def test_a_built_config_can_be_changed_and_compared() -> None:
    made = build(TrainConfig)
    assert dataclasses.replace(made, seed=3) == build(TrainConfig, seed=3)
    assert hash(made) == hash(build(TrainConfig))
