"""The command line as a user meets it: help, flags that are wrong, and messages that say which and why."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lead_engine.cli.commands import FIRST_OF_PREPARE, FIRST_OF_TRAIN

pytestmark = pytest.mark.slow

COMMANDS = ["make-pool", "pretrain", "prepare", "train", "eval", "compare", "report", "merge", "doctor"]
TRAIN = ["train", "--pool", "pool", "--model", "model", "--out", "run"]
PREPARE = ["prepare", "--pool", "pool", "--model", "model", "--out", "run"]


def said(result: subprocess.CompletedProcess[str]) -> str:
    """Everything printed, with boxes and line breaks of the flag parser taken out."""
    text = result.stdout + result.stderr
    return " ".join("".join(c if c not in "│╭╮╰╯─" else " " for c in text).split())


def assert_refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2, result
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for part in parts:
        assert part in said(result), result.stderr


def test_overview_names_every_command(run_cli) -> None:
    result = run_cli("--help")
    assert result.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in result.stdout


def test_console_script_is_the_same_command_line() -> None:
    script = Path(sys.executable).with_name("lead-engine")
    result = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("lead-engine 0.")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run_cli, command: str) -> None:
    result = run_cli(command, "--help")
    assert result.returncode == 0, result.stderr
    assert f"usage: lead-engine {command}" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["prepare", "--help"], [*PREPARE, "--tasks", "-1"]]
)
def test_help_and_flag_errors_need_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from lead_engine.cli import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == (0 if "--help" in arguments else 2), result.stderr
    assert "torch was imported" not in result.stderr


@pytest.mark.parametrize(("command", "first"), [("train", FIRST_OF_TRAIN), ("prepare", FIRST_OF_PREPARE)])
def test_help_shows_what_matters_and_help_all_the_rest(run_cli, command: str, first: tuple[str, ...]) -> None:
    screen, everything = (run_cli(command, flag).stdout for flag in ("--help", "--help-all"))
    shown = re.findall(r"^  (--[\w.-]+)", screen, flags=re.MULTILINE)
    assert shown == [f"--{name.replace('_', '-')}" for name in first]
    assert len(shown) <= 10
    assert "--help-all" in screen
    listed = set(re.findall(r"--[\w.-]+", everything))
    assert set(shown) < listed
    assert "--optimizer.weight-decay" in listed


def test_help_all_shows_the_options_of_the_method_that_is_named(run_cli) -> None:
    lead, iterit = (run_cli("train", *more, "--help-all").stdout for more in ((), ("--method", "iterit")))
    assert "--lead.gamma" in lead
    assert "--iterit." not in lead
    assert "--iterit.epochs" in iterit
    assert "--lead." not in iterit


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--selection.gamma", "0.2"], "--selection.gamma: is now --lead.gamma"),
        (["--selection.match=r"], "--selection.match: is now --random-matched.match"),
        (["--selection.inner-form", "exact"], "--selection.inner-form: is now part of --lead.sketch-dim, where 0 is"),
        (["--selection.no-use-tasks"], "--selection.no-use-tasks: is now part of --lead.task-quotas"),
        (["--selection.prior", "size"], "--selection.prior: is no option any more: uniform with --lead.draw cluster"),
        (["--optimizer.eps", "1e-6"], "--optimizer.eps: is no option any more: 1e-8"),
        (["--epochs", "2"], "--epochs: is now --full.epochs"),
        (["--method", "random", "--lead.gamma", "0.2"], "--lead.gamma: is read only with --method lead, not random"),
    ],
)
def test_old_flags_are_refused_with_the_new_ones(run_cli, arguments: list[str], told: str) -> None:
    assert_refused(run_cli(*TRAIN, *arguments), told)


def test_no_command(run_cli) -> None:
    assert_refused(run_cli(), "no command given", "prepare")


def test_unknown_command_suggests_the_nearest(run_cli) -> None:
    assert_refused(run_cli("trian"), "trian", "did you mean train?")


def test_unknown_flag_suggests_the_nearest(run_cli) -> None:
    assert_refused(run_cli(*TRAIN, "--batch.capacty", "64"), "--batch.capacty", "--batch.capacity INT")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("make-pool", ["--out"]),
        ("pretrain", ["--text", "--out"]),
        ("prepare", ["--pool", "--model", "--out"]),
        ("train", ["--pool", "--model", "--out"]),
        ("eval", ["--model", "--data"]),
        ("compare", ["--config", "--out"]),
        ("report", ["--out"]),
        ("merge", ["--out"]),
    ],
)
def test_required_flags_are_named(run_cli, command: str, flags: list[str]) -> None:
    assert_refused(run_cli(command), *flags)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--seed", "x"),
        ("--budget", "much"),
        ("--budget", "0"),
        ("--budget", "nan"),
        ("--method", "laed"),
        ("--batch.capacity", "3"),
        ("--batch.micro-batches", "0"),
        ("--batch.capacity", "1.5"),
        ("--optimizer.lr", "-1"),
        ("--optimizer.betas", "0.9"),
        ("--optimizer.warmup", "1"),
        ("--lead.gamma", "0"),
        ("--lead.bandit", "best"),
        ("--lead.max-visits", "0"),
        ("--lora.rank", "-1"),
        ("--runtime.precision", "fp8"),
    ],
)
def test_bad_value_names_its_flag(run_cli, tmp_path: Path, flag: str, value: str) -> None:
    assert_refused(run_cli(*TRAIN, flag, value, cwd=tmp_path), flag)
    assert list(tmp_path.iterdir()) == []


def test_list_flag_given_twice_is_refused(run_cli) -> None:
    assert_refused(run_cli("prepare", "--pool", "a", "--pool", "b", "--model", "m", "--out", "o"), "--pool", "A B")


def test_list_flag_without_values_is_refused(run_cli) -> None:
    assert_refused(run_cli("eval", "--model", "m", "--data"), "--data")


def test_report_without_runs_is_refused(run_cli) -> None:
    assert_refused(run_cli("report", "--out", "o"), "run folder")


def test_flags_take_dashes_or_underscores(run_cli) -> None:
    for flag in ("--batch.micro-batches", "--batch.micro_batches"):
        assert_refused(run_cli(*TRAIN, flag, "0"), "--batch.micro-batches 0: must be at least 1")


def test_other_ranks_are_named(run_cli) -> None:
    """A rank that fails alone must not end the run without a word; tyro's own messages come from rank 0 only."""
    for arguments in ([*TRAIN, "--budget", "0"], ["trian"]):
        result = run_cli(*arguments, env={"RANK": "1"})
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("[rank 1] error: ")
    assert run_cli(*TRAIN, "--seed", "x", env={"RANK": "1"}).stderr == ""


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m lead_engine --help | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


def test_interrupt_is_one_line() -> None:
    code = (
        "import sys; from lead_engine.cli import command_line as cli\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "cli.COMMANDS['doctor'] = stop\n"
        "sys.exit(cli.main(['doctor']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")
