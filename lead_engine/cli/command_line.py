"""The command line: each command is a config dataclass read from flags (and YAML), and the one function that it calls.

What a user got wrong is reported as "error: ..." on standard error with exit status 2, without a traceback. Commands
are imported when they are called, so `lead-engine --help` and flag errors need no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import importlib
import importlib.metadata
import io
import os
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lead_engine import config
from lead_engine.base.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Under torchrun only rank 0 prints messages."""
    speaks = int(os.environ.get("RANK", "0")) == 0
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments, speaks)
    except UserError as error:
        return _fail(str(error), speaks)
    except KeyboardInterrupt:
        _fail("interrupted", speaks, label="")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output left (`| head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_USER_ERROR
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _fail(f"{error.filename or 'writing the output'}: {error.strerror}", speaks)


def _dispatch(arguments: list[str], speaks: bool) -> int:
    if not arguments:
        return _fail("no command given\n\n" + _overview(), speaks)
    for argument in arguments:
        if not argument.isprintable() and argument != argument.encode(errors="replace").decode():
            raise UserError(f"{argument!r}: not UTF-8 text; give names in UTF-8")
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help"):
        _say(_overview(), speaks)
    elif name == "--version":
        _say(f"lead-engine {importlib.metadata.version('lead-engine')}", speaks)
    elif name in COMMANDS:
        COMMANDS[name](f"lead-engine {name}", rest, speaks)
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"commands are {', '.join(COMMANDS)}"
        raise UserError(f"{name}: no such command; {hint}")
    return 0


def _say(text: str, speaks: bool) -> None:
    if speaks:
        print(text, flush=True)


def _fail(message: str, speaks: bool, label: str = "error: ") -> int:
    # A rank that fails alone would otherwise end the run without a word.
    place = "" if speaks else f"[rank {os.environ['RANK']}] "
    sys.stdout.flush()
    print(f"{place}{label}{message}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    closing = "lead-engine COMMAND --help lists its options."
    return "\n".join(["usage: lead-engine COMMAND [OPTIONS]", "", "commands:", *lines, "", closing])


@dataclass(frozen=True)
class Command:
    """A command line of its own: `options` (a config class, or a function that builds one) is read, `target` called."""

    options: Callable[..., Any]
    target: str
    """"module:function", imported when the command is called."""
    has_config_file: bool = False

    @property
    def summary(self) -> str:
        return (self.options.__doc__ or "").strip().splitlines()[0]

    def __call__(self, prog: str, arguments: list[str], speaks: bool) -> None:
        parse = _parse_with_file if self.has_config_file else _parse
        options = parse(self.options, prog, arguments, speaks)
        module, _, function = self.target.partition(":")
        run = getattr(importlib.import_module(module), function)
        run() if options is None else run(options)


def _parse(options: Callable[..., Any], prog: str, arguments: list[str], speaks: bool) -> Any:
    import tyro

    if isinstance(options, type):
        _refuse_repeated_lists(options, arguments)
    with _silence_unless(speaks):
        parsed = tyro.cli(options, prog=prog, args=arguments)
    if isinstance(options, type):
        _refuse_empty_lists(parsed, arguments)
        parsed.refuse_unread(_given(arguments))
    return parsed


def _parse_with_file(cls: type, prog: str, arguments: list[str], speaks: bool) -> Any:
    """Flags over the values of `--config FILE` over the class's defaults."""
    import tyro

    from lead_engine.base.yaml_file import read_yaml
    from lead_engine.config.from_yaml import draft_from_mapping

    file = _last_value(arguments, "--config")
    mapping = read_yaml(Path(file)) if file else {}
    recipe = _last_value(arguments, "--recipe")
    if recipe in config.RECIPES:  # a flag, too, comes under all other options; tyro refuses any other value
        mapping = {**mapping, "recipe": recipe}
    defaults = draft_from_mapping(cls, mapping, source=f"--config {file}", missing=tyro.MISSING)
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("options", Annotated[cls, tyro.conf.arg(name="")], defaults),
            ("config", Annotated[Path | None, tyro.conf.arg(metavar="FILE.yaml", help=_CONFIG_HELP)], None),
        ],
        frozen=True,
    )
    _refuse_repeated_lists(cls, arguments)
    try:
        with _silence_unless(speaks):
            parsed = tyro.cli(options, prog=prog, description=cls.__doc__, args=arguments).options
    except UserError as error:
        flag = str(error).split(" ", 1)[0]
        if file and not any(_flag_name(argument) == flag for argument in arguments):
            raise UserError(f"--config {file}: {error}") from None
        raise
    _refuse_empty_lists(parsed, arguments)
    parsed.refuse_unread(_given(arguments))
    return parsed


def _given(arguments: list[str]) -> set[str]:
    """The options that the flags name: --lora.no-head is lora.head."""
    flags = (
        _flag_name(argument).removeprefix("--").rpartition(".") for argument in arguments if argument.startswith("--")
    )
    return {group + dot + name.removeprefix("no-").replace("-", "_") for group, dot, name in flags}


_CONFIG_HELP = "YAML file of the options, nested as their names are (batch: {capacity: 4096}); flags override it."


@contextlib.contextmanager
def _silence_unless(speaks: bool) -> Iterator[None]:
    """Keep the flag parser quiet on the other ranks; its own `console_outputs=False` lets value errors through."""
    with contextlib.ExitStack() as stack:
        if not speaks:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def _last_value(arguments: list[str], flag: str) -> str | None:
    """The value of the last such flag. tyro reads it too (for --help and its errors), but too late for defaults."""
    found = None
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag and (equals or i + 1 < len(arguments)):
            found = value if equals else arguments[i + 1]
    return found


def _list_fields(cls: type) -> list[str]:
    hints = typing.get_type_hints(cls)
    return [f.name for f in dataclasses.fields(cls) if Ellipsis in typing.get_args(hints[f.name])]


def _flag_name(argument: str) -> str:
    return argument.partition("=")[0].replace("_", "-")


def _refuse_repeated_lists(cls: type, arguments: list[str]) -> None:
    """`--pool A --pool B` would quietly train on B alone."""
    for flag in (f"--{name.replace('_', '-')}" for name in _list_fields(cls)):
        if sum(_flag_name(argument) == flag for argument in arguments) > 1:
            raise UserError(f"{flag} is given more than once; give all its values together: {flag} A B")


def _refuse_empty_lists(parsed: Any, arguments: list[str]) -> None:
    """A list that must be given, or whose flag was, has values."""
    required = {f.name for f in dataclasses.fields(parsed) if f.default is dataclasses.MISSING}
    for name in _list_fields(type(parsed)):
        given = any(_flag_name(argument) == f"--{name.replace('_', '-')}" for argument in arguments)
        if not getattr(parsed, name) and (given or name in required):
            raise UserError(f"--{name.replace('_', '-')}: give at least one value")


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


COMMANDS: dict[str, Command] = {
    "make-pool": Command(config.MakePoolConfig, "lead_engine.pool.procedural:run"),
    "pretrain": Command(config.PretrainConfig, "lead_engine.training.pretrain:run", has_config_file=True),
    "prepare": Command(config.PrepareConfig, "lead_engine.prepare:run", has_config_file=True),
    "train": Command(config.TrainConfig, "lead_engine.training.train:run", has_config_file=True),
    "eval": Command(config.EvalConfig, "lead_engine.evaluation.evaluate:run"),
    "lm-eval": Command(config.HarnessConfig, "lead_engine.evaluation.harness:run"),
    "compare": Command(config.CompareConfig, "lead_engine.cli.compare:run"),
    "report": Command(_report, "lead_engine.report:run"),
    "merge": Command(_merge, "lead_engine.model.merge:run"),
    "doctor": Command(_doctor, "lead_engine.cli.doctor:run"),
}
