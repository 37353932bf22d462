"""`--config FILE.yaml`: what it sets, what flags override, and how its mistakes are reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lead_engine.base.errors import UserError
from lead_engine.cli.commands import COMMANDS
from lead_engine.config import PretrainConfig, StudyConfig, TrainConfig, to_dict
from lead_engine.config.from_yaml import from_mapping, parse_yaml_into

TRAIN = {"pool": "pool", "model": "model", "out": "run"}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def parsed():
    """parsed("train", *arguments) -> the config that the command's function would be called with."""

    def parse(command: str, *arguments: str | Path):
        assert COMMANDS[command].has_config_file
        return COMMANDS[command].read(f"lead-engine {command}", list(map(str, arguments)), speaks=True)

    return parse


def test_file_sets_and_flags_override(parsed, tmp_path: Path) -> None:
    path = write(tmp_path, "pool: p\nmodel: m\nseed: 5\nbatch: {capacity: 64, slots: 4}\noptimizer: {lr: 1e-3}\n")
    flags = ["--out", "o", "--batch.capacity", "128", "--optimizer.betas", "0.5", "0.6"]
    config = parsed("train", "--config", path, *flags)
    assert (config.pool, config.model, config.out, config.seed) == (Path("p"), "m", Path("o"), 5)
    assert (config.batch.capacity, config.batch.slots) == (128, 4)
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-3, (0.5, 0.6))


def test_a_flag_may_mend_what_the_file_alone_could_not_be(parsed, tmp_path: Path) -> None:
    path = write(tmp_path, "pool: [a, b]\nmodel: m\nout: o\nmax_length: 8192\n")
    with pytest.raises(UserError, match=rf"--config {path}: --max-length 8192"):
        parsed("prepare", "--config", path)
    assert parsed("prepare", "--config", path, "--batch.capacity", "8192").max_length == 8192


def test_flags_set_true_can_be_unset(parsed, tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump({**TRAIN, "resume": True}))
    assert parsed("train", "--config", path).resume is True
    assert parsed("train", "--config", path, "--no-resume").resume is False


def test_a_written_config_reads_back_the_same(parsed, tmp_path: Path) -> None:
    changed = {"optimizer": {"betas": [0.1, 0.2]}, "batch": {"slots": 7}}
    config = from_mapping(TrainConfig, {**TRAIN, **changed}, source="test")
    path = write(tmp_path, yaml.safe_dump(to_dict(config)))
    assert parsed("train", "--config", path) == config
    assert parse_yaml_into(TrainConfig, path) == config


def test_a_partly_given_group_keeps_the_command_s_own_defaults() -> None:
    config = from_mapping(PretrainConfig, {"text": ["t"], "out": "o", "optimizer": {"warmup": 0.2}}, source="test")
    default = PretrainConfig(text=(Path("t"),), out=Path("o")).optimizer
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (default.lr, default.weight_decay)
    assert config.optimizer.warmup == 0.2


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "required keys missing: pool, model, heldout"),
        ({"metods": []}, "metods: unknown key; did you mean methods"),
        ({"batch": {"capcity": 3}}, r"batch\.capcity: unknown key; did you mean capacity"),
        ({"batch": {"zzz": 3}}, r"batch\.zzz: unknown key; known here: capacity, micro_batches, slots"),
        ({"batch": 3}, "batch: expected a mapping of options, found 3"),
        ({"batch": {"capacity": "many"}}, r"batch\.capacity: expected a whole number, found 'many' \(text\)"),
        ({"batch": {"capacity": 64.5}}, r"batch\.capacity: expected a whole number, found 64.5"),
        ({"batch": {"capacity": True}}, r"batch\.capacity: expected a whole number, found True \(a truth value\)"),
        ({"optimizer": {"lr": "fast"}}, r"optimizer\.lr: expected a number, found 'fast'"),
        ({"optimizer": {"lr": None}}, r"optimizer\.lr: expected a number, found nothing"),
        ({"optimizer": {"betas": [0.9]}}, r"optimizer\.betas: expected 2 values, found 1"),
        ({"runtime": {"compile": "y"}}, r"runtime\.compile: expected true or false, found 'y'"),
        ({"model": 7}, r"model: expected text, found 7 \(a number\)"),
        ({"heldout": "a.jsonl"}, r"heldout: expected a list such as \[a, b\], found 'a.jsonl'"),
        ({"seeds": [0, "x"]}, r"seeds\[1\]: expected a whole number, found 'x'"),
        (
            {"pool": "p", "model": "m", "heldout": ["h"], "methods": ["lead", "laed"]},
            r"methods\[1\] 'laed': must be one of lead, iterit, ",
        ),
    ],
)
def test_mistakes_name_the_key_path(mapping: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^study.yaml: {message}"):
        from_mapping(StudyConfig, mapping, source="study.yaml")


def test_refused_values_name_the_key(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump({**TRAIN, "batch": {"micro_batches": 0}}))
    with pytest.raises(UserError, match=rf"^{path}: batch\.micro_batches 0: must be at least 1"):
        parse_yaml_into(TrainConfig, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metod: lead", "metod: unknown key; did you mean method"),
        ("batch: {capacity: x}", "batch.capacity: expected a whole number"),
        ("a: [", "line 1"),
        ("", "expected a mapping"),
        ("- a", "expected a mapping"),
        ("batch: {capacity: 3}", "--batch.capacity 3: must be at least 16"),
    ],
)
def test_bad_files_through_the_command_line(run_cli, tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    out = tmp_path / "run"
    result = run_cli("train", "--config", path, "--pool", "p", "--model", "m", "--out", out)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --config {path}: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_missing_file_through_the_command_line(run_cli, tmp_path: Path) -> None:
    result = run_cli("train", "--config", tmp_path / "none.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --config {tmp_path / 'none.yaml'}: No such file")
