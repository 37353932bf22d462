"""Reading a command's options: flags, over a YAML file's values, over the defaults of the config class.

tyro makes the flags from the class. What it would let pass is refused here: a list flag given twice or without values,
and an option that would have no effect.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from lead_engine.base.errors import UserError
from lead_engine.cli.method_flags import (
    named_in,
    refuse_moved,
    refuse_other_methods,
    with_method_flags,
    without_method_flags,
)
from lead_engine.config.methods import WithMethod
from lead_engine.config.options import Options

CONFIG_HELP = "YAML file of the options, nested as their names are (batch: {capacity: 4096}); flags override it."


def read_flags(build: Callable[..., Any], prog: str, arguments: list[str], speaks: bool) -> Any:
    """What `build` (a config class, or a function) makes of the flags.

    speaks: whether the flag parser may print help and errors. Raises UserError, or the parser's SystemExit.
    """
    import tyro

    if not isinstance(build, type):
        with _silence_unless(speaks):
            return tyro.cli(build, prog=prog, args=arguments)
    refuse_moved(arguments, {field.name for field in dataclasses.fields(build)})
    _refuse_repeated_lists(build, arguments)
    with _silence_unless(speaks):
        parsed: Options = tyro.cli(build, prog=prog, args=arguments)
    _check(parsed, arguments)
    return parsed


def read_flags_over_file(cls: type[Options], prog: str, arguments: list[str], speaks: bool) -> Any:
    """The same for a class, with `--config FILE.yaml` for the values that no flag gives."""
    import tyro

    refuse_moved(arguments, {field.name for field in dataclasses.fields(cls)})
    file, defaults = _defaults_of_file(cls, arguments)
    # One more field beside the class's own, so that --help shows --config and the parser accepts it.
    wrapper: Any = dataclasses.make_dataclass(
        "Options",
        [
            ("options", Annotated[type(defaults), tyro.conf.arg(name="")], defaults),
            ("config", Annotated[Path | None, tyro.conf.arg(metavar="FILE.yaml", help=CONFIG_HELP)], None),
        ],
        frozen=True,
    )
    _refuse_repeated_lists(cls, arguments)
    try:
        with _silence_unless(speaks):
            parsed = tyro.cli(wrapper, prog=prog, description=cls.__doc__, args=arguments).options
    except UserError as error:
        # The error begins with a flag's name. Where no such flag was given, the value came from the file.
        flag = str(error).split(" ", 1)[0]
        if file is None or any(_flag_name(argument) == flag for argument in arguments):
            raise
        raise UserError(f"--config {file}: {error}") from None
    if issubclass(cls, WithMethod):
        parsed = without_method_flags(cls, parsed)
    _check(parsed, arguments)
    return parsed


def _defaults_of_file(cls: type[Options], arguments: list[str]) -> tuple[str | None, Any]:
    """The file that `--config` names (None without one), and its values over the class's defaults, not yet checked."""
    import tyro

    from lead_engine.config.from_yaml import draft_from_mapping
    from lead_engine.config.yaml_file import read_yaml

    file = _last_value(arguments, "--config")
    mapping = read_yaml(Path(file), flag="--config") if file else {}
    shown: Any = cls
    if issubclass(cls, WithMethod):
        mapping = named_in(arguments, mapping, _last_value)
        method = str(mapping.get("method", cls.method))
        refuse_other_methods(arguments, method)
        shown = with_method_flags(cls, method)
    defaults: Any = draft_from_mapping(shown, mapping, source=f"--config {file}", missing=tyro.MISSING)
    return file or None, defaults


def _check(parsed: Options, arguments: list[str]) -> None:
    _refuse_empty_lists(parsed, arguments)
    parsed.refuse_unread(_given(arguments))


@contextlib.contextmanager
def _silence_unless(speaks: bool) -> Iterator[None]:
    """Keep the flag parser quiet on the other ranks; its own `console_outputs=False` lets value errors through."""
    with contextlib.ExitStack() as stack:
        if not speaks:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


# --- what stands on the command line ---


def _flag_name(argument: str) -> str:
    return argument.partition("=")[0].replace("_", "-")


def _flag_of(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _given(arguments: list[str]) -> set[str]:
    """The options that the flags name, as `group.name`: `--lora.no-head` names lora.head."""
    given = set()
    for argument in arguments:
        if argument.startswith("--"):
            group, dot, name = _flag_name(argument).removeprefix("--").rpartition(".")
            given.add(group + dot + name.removeprefix("no-").replace("-", "_"))
    return given


def _last_value(arguments: list[str], flag: str) -> str | None:
    """The value of the last such flag. tyro reads it too (for --help and its errors), but too late for defaults."""
    found = None
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != flag:
            continue
        if equals:
            found = value
        elif i + 1 < len(arguments):
            found = arguments[i + 1]
    return found


# --- lists ---


def _list_fields(cls: type[Any]) -> list[str]:
    """Names of the fields that hold any number of values: tuple[T, ...]."""
    hints = typing.get_type_hints(cls)
    return [f.name for f in dataclasses.fields(cls) if Ellipsis in typing.get_args(hints[f.name])]


def _refuse_repeated_lists(cls: type[Any], arguments: list[str]) -> None:
    """`--pool A --pool B` would quietly train on B alone."""
    for flag in map(_flag_of, _list_fields(cls)):
        if sum(_flag_name(argument) == flag for argument in arguments) > 1:
            raise UserError(f"{flag} is given more than once; give all its values together: {flag} A B")


def _refuse_empty_lists(parsed: Options, arguments: list[str]) -> None:
    """A list that is required, or whose flag is given, needs a value."""
    required = {f.name for f in dataclasses.fields(parsed) if f.default is dataclasses.MISSING}
    for name in _list_fields(type(parsed)):
        given = any(_flag_name(argument) == _flag_of(name) for argument in arguments)
        if not getattr(parsed, name) and (given or name in required):
            raise UserError(f"{_flag_of(name)}: give at least one value")
