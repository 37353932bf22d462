"""The commands: the options that each reads and the one function that it calls with them.

A command's function is imported when the command is called, so that help and wrong flags need no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lead_engine import config
from lead_engine.base.errors import UserError
from lead_engine.cli.first_screen import ALL, first_screen
from lead_engine.cli.flags import read_flags, read_flags_over_file


@dataclass(frozen=True)
class Command:
    """One command: `options` are read from its arguments, then `target` is called with them."""

    options: Callable[..., Any]
    """A config class, or a function that builds a config. Its docstring is the command's help."""
    target: str
    """"module:function", imported when the command is called."""
    has_config_file: bool = False
    """Whether the command takes `--config FILE.yaml`; then `options` is a class."""
    first: tuple[str, ...] = ()
    """The options that `--help` shows, where `--help-all` shows all; none: `--help` shows all."""

    @property
    def summary(self) -> str:
        """The first line of the help."""
        return (self.options.__doc__ or "").strip().splitlines()[0]

    def __call__(self, prog: str, arguments: list[str], speaks: bool) -> None:
        """Read the arguments and run the command. speaks: whether this process may print help and errors."""
        if self.first and isinstance(self.options, type) and {"-h", "--help"} & set(arguments):
            if speaks:
                print(first_screen(prog, self.options, self.first), flush=True)
            return
        arguments = ["--help" if self.first and argument == ALL else argument for argument in arguments]
        options = self.read(prog, arguments, speaks)
        module, _, function = self.target.partition(":")
        run = getattr(importlib.import_module(module), function)
        if options is None:
            run()
        else:
            run(options)

    def read(self, prog: str, arguments: list[str], speaks: bool) -> Any:
        """The options that the arguments describe. UserError, or the flag parser's SystemExit, if they are wrong."""
        if self.has_config_file:
            assert isinstance(self.options, type)
            return read_flags_over_file(self.options, prog, arguments, speaks)
        return read_flags(self.options, prog, arguments, speaks)


def _report(runs: tuple[Path, ...], /, *, out: Path) -> config.ReportConfig:
    """Plots and one stand-alone HTML page from run folders.

    Args:
        runs: Run folders, or one folder written by `compare`.
        out: Folder to write.
    """
    if not runs:
        raise UserError("RUNS: give at least one run folder: lead-engine report RUN... --out DIR")
    return config.ReportConfig(runs=runs, out=out)


def _merge(run: Path, /, *, out: Path) -> config.MergeConfig:
    """Merge a LoRA adapter into its base; writes a model folder in Hugging Face format.

    Args:
        run: Run folder with an adapter.
        out: Model folder to write.
    """
    return config.MergeConfig(run=run, out=out)


def _doctor() -> None:
    """What this machine has, and what the engine will use of it."""


FIRST_OF_PREPARE = ("pool", "model", "out", "max_length", "clusters", "tasks", "scoring", "warmup_share", "skip_bad")
FIRST_OF_TRAIN = (
    *("pool", "model", "out", "method", "budget", "eval_data", "resume"),
    *("batch.capacity", "optimizer.lr", "lora.rank"),
)
COMMANDS: dict[str, Command] = {
    "make-pool": Command(config.MakePoolConfig, "lead_engine.pool.procedural:run"),
    "pretrain": Command(config.PretrainConfig, "lead_engine.training.pretrain:run", has_config_file=True),
    "prepare": Command(config.PrepareConfig, "lead_engine.prepare:run", has_config_file=True, first=FIRST_OF_PREPARE),
    "train": Command(config.TrainConfig, "lead_engine.training.train:run", has_config_file=True, first=FIRST_OF_TRAIN),
    "eval": Command(config.EvalConfig, "lead_engine.evaluation.evaluate:run"),
    "lm-eval": Command(config.HarnessConfig, "lead_engine.evaluation.harness:run"),
    "compare": Command(config.CompareConfig, "lead_engine.cli.compare:run"),
    "report": Command(_report, "lead_engine.report:run"),
    "merge": Command(_merge, "lead_engine.model.merge:run"),
    "doctor": Command(_doctor, "lead_engine.cli.doctor:run"),
}
