"""Whatever stands on the command line, parsing it ends in options, in the parser's own refusal, or in UserError."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from lead_engine.cli import command_line as cli
from lead_engine.config import TrainConfig
from lead_engine.config.convert import field_hints
from lead_engine.config.reads import leaves

pytestmark = pytest.mark.slow

REQUIRED = {
    "make-pool": "--out o",
    "pretrain": "--text t --out o",
    "prepare": "--pool p --model m --out o",
    "train": "--pool p --model m --out o",
    "eval": "--model m --data d",
    "lm-eval": "--model m --tasks t --out o",
    "compare": "--config c --out o",
    "report": "r --out o",
    "merge": "r --out o",
}
WORDS = [
    "",
    " ",
    "x",
    "-1",
    "0",
    "1",
    "1e9",
    "1e400",
    "nan",
    "-inf",
    "0x10",
    "0123",
    "9" * 5000,
    "\udcff",
    "é",
    "true",
    "None",
    "[1,2]",
    "{}",
    "$NO_SUCH",
    "~",
    "~no-such-user",
    "a\nb",
    "--",
    "-",
    "=",
    "1,2",
    "%s",
]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """parse(command, arguments) -> "options", "status 2", or the error; the command itself is not run."""

    def run(command: str, arguments: list[str]) -> str:
        monkeypatch.setitem(cli.COMMANDS, command, dataclasses.replace(cli.COMMANDS[command], target="builtins:id"))
        try:
            status = cli.main([command, *arguments])
        except SystemExit as stop:
            return f"status {stop.code}"
        finally:
            error = capsys.readouterr().err
        return "options" if status == 0 else error.removeprefix("error: ")

    return run


@pytest.mark.parametrize("command", REQUIRED)
def test_no_other_exception_leaves_the_parser(command: str, parse) -> None:
    draw = random.Random(command)
    flags = [f"--{name.replace('_', '-')}" for name in leaves(TrainConfig("p", "m", "o"))] + [
        "--config",
        "--no-resume",
        "--nonsense",
    ]
    options = cli.COMMANDS[command].options
    if isinstance(options, type):
        flags += [f"--{name.replace('_', '-')}" for name in field_hints(options)]
    for _ in range(7):
        line = REQUIRED[command].split()
        for _ in range(draw.choice([1, 1, 2])):
            flag, word = draw.choice(flags), draw.choice(WORDS)
            line += draw.choice([[flag, word], [f"{flag}={word}"], [flag], [word]])
        told = parse(command, line)
        assert told in ("options", "status 2") or ":" in told, (line, told)


def test_the_last_of_a_flag_given_twice_holds_and_lists_are_given_once(parse) -> None:
    assert parse("train", [*REQUIRED["train"].split(), "--seed", "1", "--seed", "-2"]).startswith("--seed -2: must be")
    assert "given more than once" in parse("prepare", [*REQUIRED["prepare"].split(), "--pool", "q"])


def test_a_config_that_is_a_folder_or_missing(tmp_path: Path, parse) -> None:
    for path in (tmp_path, tmp_path / "none.yaml"):
        assert parse("train", ["--config", str(path)]).startswith(f"--config {path}: ")
