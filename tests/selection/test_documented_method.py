"""The method that docs/METHODS.md adds is real: its code is taken from the page and selects what the page says."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from lead_engine.base.errors import UserError
from lead_engine.cli import command_line as cli
from lead_engine.config import TrainConfig, method_names
from lead_engine.config.from_yaml import from_mapping
from lead_engine.config.methods import _registered, register

PAGE = Path(__file__).parents[2] / "docs" / "METHODS.md"


def test_the_page_names_every_method() -> None:
    table = PAGE.read_text(encoding="utf-8").split("\n## ")[0]
    assert re.findall(r"^\| `([a-z][a-z-]*)` \|", table, flags=re.MULTILINE) == [
        "lead",
        "iterit",
        "rescore",
        "loss",
        "ifd",
        "random",
        "random-matched",
        "full",
    ]


def code_of(page: Path) -> str:
    """The method that the page adds."""
    found = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> type:
    """The page's class, made known by its own `@register`, for the length of a test."""
    code = code_of(PAGE)
    assert len(code.splitlines()) <= 50
    monkeypatch.setattr("lead_engine.config.methods._registered", dict(_registered))
    module = types.ModuleType("documented")
    monkeypatch.setitem(sys.modules, "documented", module)
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module.Middle


@pytest.mark.parametrize("quantile", [0.5, 0.2])
def test_the_documented_method_works(make_selector, registered: type, quantile: float) -> None:
    selector = make_selector(90, method="middle", steps=3, quantile=quantile)
    assert type(selector.method) is registered
    loss, dropped = selector.samples.utility[:-1].clone(), selector.samples.dropped
    distance = torch.where(dropped, torch.inf, (loss - loss.quantile(quantile)).abs())
    chosen: list[int] = []
    for round in range(2):
        plan = selector.plan(round, 10_000)
        ids = plan.sample_ids[plan.sample_ids < 90]
        selector.observe(ids, torch.ones(len(ids)), torch.zeros(len(ids)))
        selector.learn(plan)
        chosen += ids.tolist()
    assert len(set(chosen)) == len(chosen) > 12  # looking ahead when packing passes some by, so the last few may differ
    near = distance.argsort()[: len(chosen) + 32]
    assert set(chosen) <= set(near.tolist())


def test_a_taken_or_odd_name_is_refused(registered: type) -> None:
    for name in ("lead", "middle"):
        with pytest.raises(UserError, match="there is a method of this name"):
            register(name)(type("Other", (registered,), {}))
    with pytest.raises(UserError, match="lower-case letters, digits and dashes"):
        register("My method")(registered)
    assert register("middle")(registered) is registered  # the same again: a module that is imported twice


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of somebody's with the page's method and its entry point, as pip would install it."""
    code = code_of(PAGE).replace('@register("middle")\n', "").replace(", register\n", "\n")
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "__init__.py").write_text("")
    (tmp_path / "their_package" / "middle.py").write_text(code)
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    lines = "[lead_engine.methods]\nmiddle = their_package.middle:Middle\nbroken = their_package.nothing:Nothing\n"
    (info / "entry_points.txt").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("their_package", "their_package.middle"):
        monkeypatch.delitem(sys.modules, name, raising=False)


TRAIN = ["train", "--pool", "p", "--model", "m", "--out", "no-such-folder/o"]


@pytest.mark.usefixtures("installed")
def test_a_method_of_another_package_is_an_option_like_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert method_names()[-2:] == ["middle", "broken"]
    config = from_mapping(
        TrainConfig,
        {"pool": "p", "model": "m", "out": "o", "method": "middle", "middle": {"quantile": 0.3}},
        source="x",
    )
    assert config.options.quantile == 0.3
    seen: list[TrainConfig] = []
    monkeypatch.setattr("lead_engine.training.train.run", seen.append)
    assert cli.main([*TRAIN, "--method", "middle", "--middle.quantile", "0.3"]) == 0
    file = tmp_path / "run.yaml"
    file.write_text("method: middle\nmiddle: {quantile: 0.3}\n")
    assert cli.main([*TRAIN, "--config", str(file)]) == 0
    assert [config.options.quantile for config in seen] == [0.3, 0.3]
    capsys.readouterr()
    for line, told in {
        "--method middle --middle.quantile 1": "error: --middle.quantile 1.0: must be in (0, 1)",
        "--middle.quantile 0.3": "error: --middle.quantile: is read only with --method middle, not lead",
        "--method broken": "error: --method broken: their_package.nothing:Nothing cannot be imported",
    }.items():
        assert cli.main([*TRAIN, *line.split()]) == 2
        assert told in capsys.readouterr().err
