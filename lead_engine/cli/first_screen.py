"""`--help` of commands with many options: the ten that matter, on one screen. `--help-all` lists all of them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
from typing import Any

from lead_engine.config.convert import field_hints
from lead_engine.config.options import Options

ALL = "--help-all"


def first_screen(prog: str, cls: type[Options], options: tuple[str, ...]) -> str:
    """The command's summary and some of its options, given as names with dots; needs no torch."""
    width = min(100, shutil.get_terminal_size().columns)
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    lines = [f"usage: {prog} [OPTIONS]", "", *textwrap.wrap(summary, width), "", "the options that matter most:"]
    for option in options:
        flag, text = _described(cls, option)
        lines += [f"  {flag}", *textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    closing = (
        f"{prog} {ALL} lists all options. Each may stand in a YAML file, too: --config FILE.yaml; flags override it."
    )
    return "\n".join([*lines, "", *textwrap.wrap(closing, width)])


def _described(cls: type[Any], option: str) -> tuple[str, str]:
    """(the flag and what it takes, its help with the default)."""
    owner = cls
    *groups, name = option.split(".")
    for group in groups:
        owner = field_hints(owner)[group]
    field = next(field for field in dataclasses.fields(owner) if field.name == name)
    flag = f"--{option.replace('_', '-')}"
    if isinstance(field.default, bool):
        takes = ""
    else:
        takes = " ..." if isinstance(field.default, tuple) else f" {name.rpartition('_')[2].upper()}"
    default = "required" if field.default is dataclasses.MISSING else f"default: {_shown(field.default)}"
    return flag + takes, f"{_documentation(owner)[name]} ({default})"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _documentation(cls: type[Any]) -> dict[str, str]:
    """The text below each field, which Python itself does not keep."""
    found: dict[str, str] = {}
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found
