"""The one reader of YAML: what is refused with its line, and what stays as it was written."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from lead_engine.base.errors import UserError
from lead_engine.cli import command_line as cli
from lead_engine.config import TrainConfig
from lead_engine.config.from_yaml import parse_yaml_into
from lead_engine.config.yaml_file import read_yaml
from lead_engine.study.variants import read_study

HEAD = "pool: P\nmodel: BASE\nout: RUN\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "optimizer: {lr: 1e-3}\nseed: 1\noptimizer:\n  eps: 1e-6\n",
            "line 6: .*the key 'optimizer' stands twice, on lines 4 and 6",
        ),
        ("batch:\n  capacity: 64\n  slots: 2\n  capacity: 96\n", "the key 'capacity' stands twice, on lines 5 and 7"),
        ("batch: {slots: 1, 'slots': 2}\n", "the key 'slots' stands twice, on line 4"),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}\n", "the key '<<' stands twice, on line 5"),
        ("batch:\n\tcapacity: 64\n", "line 5: .*'\\\\t'"),
        ("seed: !!int x\n", "line 4: .*'x' is no int"),
        ("seed: !!timestamp 2024-99-99\n", "line 4: .*is no timestamp"),
        ("seed: !!python/name:os.system\n", "line 4: "),
        ("seed: 1\n---\nseed: 2\n", "line 5: "),
        ("seed: \0\n", "line 4: .*special characters"),
        ("seed: [[\n", "line 5: "),
        ("? [a]\n: b\n", "line 4: .*unhashable"),
        ("seed: " + "[" * 3000, "nested too deeply"),
    ],
)
def test_what_cannot_be_right_names_the_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(HEAD + text)
    with pytest.raises(UserError, match=rf"^{path}: .*{told}"):
        read_yaml(path)


def test_files_that_are_no_text_or_no_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    cases = {
        b"a: 1\nb: \xe9\n": "line 2: not UTF-8 text",
        b"": "expected a mapping of options, found nothing",
        b"- a\n": "expected a mapping of options, found list",
        b"# a\n": "found nothing",
        None: "Is a directory",
    }
    for data, told in cases.items():
        if data is not None:
            path.write_bytes(data)
        assert cli.main(["train", "--config", str(path if data is not None else tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --config ")
        assert told in error
    path.write_bytes(b"\xef\xbb\xbfseed: 1\n")
    assert read_yaml(path) == {"seed": 1}


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("wandb: no", "wandb", "no"),  # true, a date, octal and 90 to YAML 1.1
        ("wandb: 2024-01-01", "wandb", "2024-01-01"),
        ("wandb: 0123", "wandb", "0123"),
        ("wandb: 1:30", "wandb", "1:30"),
        ("wandb: 1e-3x", "wandb", "1e-3x"),
        ("seed: 0x1F", "seed", 31),
        ("seed: 1_000", "seed", 1000),
        ("seed: 1e3", "seed", 1000),
        ("resume: yes", "resume", True),
        ("resume: off", "resume", False),
        ("budget: 2e-2", "budget", 0.02),
        ("budget: 1", "budget", 1.0),
        ("a: &a {capacity: 64}\nbatch: {<<: *a, capacity: 96}", "batch", None),
    ],
)
def test_what_is_written_is_what_is_meant(tmp_path: Path, text: str, option: str, value: object) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(HEAD + text)
    if value is None:
        assert read_yaml(path)["batch"] == {"capacity": 96}
    else:
        assert getattr(parse_yaml_into(TrainConfig, path), option) == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 0123", r"seed: expected a whole number, found '0123' \(text\)"),
        ("seed: 1:30", "seed: expected a whole number, found '1:30'"),
        ("seed: 2024-01-01", "seed: expected a whole number"),
        ("seed: .inf", "seed: expected a whole number, found inf"),
        ("seed: -1", "seed -1: must be between 0 and 4294967295"),
        ("budget: .nan", "budget nan: must be above 0"),
        ("wandb: 2024", r"wandb: expected text, found 2024 \(a number\); put it in quotes"),
        ("wandb: ~", "wandb: expected text, found nothing"),
        ("resume: 1", "resume: expected true or false, found 1"),
        ("x: &x [*x]\nbatch: *x", "x: unknown key"),
        ("epochs: 3", "epochs: is now full.epochs"),
        ("selection: {gamma: 0.2}", "selection.gamma: is now lead.gamma"),
        ("selection: {use_tasks: no}", "selection.use_tasks: is now part of lead.task_quotas, where none is without"),
        ("lead: {gama: 0.2}", r"lead.gama: unknown key; did you mean gamma\?"),
        ("method: random\nlead: {gamma: 0.2}", "lead: is read only with method: lead, not random; leave it out"),
        ("method: laed", "method: expected one of lead, iterit, rescore, .*; found 'laed'"),
    ],
)
def test_what_is_meant_for_no_option_names_its_key(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(HEAD + text)
    with pytest.raises(UserError, match=rf"^{path}: {told}"):
        parse_yaml_into(TrainConfig, path)


def test_paths_in_a_file_and_studies_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    path = tmp_path / "run.yaml"
    path.write_text("pool: ~/P\nmodel: ${DATA}/m\nout: $DATA/o\n")
    made = parse_yaml_into(TrainConfig, path)
    assert (made.pool, made.model, made.out) == (tmp_path / "P", "/data/m", Path("/data/o"))
    path.write_text("pool: P\nmodel: m\nheldout: [$NOT_SET/h]\n")
    with pytest.raises(UserError, match=rf"^{path}: heldout.*the variable NOT_SET is not set"):
        read_study(path)
    path.write_text("pool: P\nmodel: m\nheldout: [h]\nvariants:\n  a: {}\n  a: {method: random}\n")
    with pytest.raises(UserError, match="the key 'a' stands twice, on lines 5 and 6"):
        read_study(path)


def test_nothing_else_reads_yaml(repository: Path) -> None:
    readers = {"load", "safe_load", "full_load", "load_all", "safe_load_all"}
    for file in (repository / "lead_engine").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "yaml":
                assert node.attr not in readers or file.name == "yaml_file.py", file
