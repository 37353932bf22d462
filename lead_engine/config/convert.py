"""A value as the type that an annotation names: converted where nothing is lost, else `Unfit` is raised.

This module knows nothing of flags or files: `options` (Python callers and flags) and `from_yaml` turn Unfit into a
UserError that names the flag or the key.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from lead_engine.config.bounds import Bounds, Expands, OneOf, Rule


class Unfit(Exception):
    """A value of the wrong type, or out of bounds: `rule` is what it must be; `where` the place inside a list."""

    def __init__(self, rule: str, value: Any, where: str = "", hint: str = "") -> None:
        super().__init__(rule)
        self.rule, self.value, self.where, self.hint = rule, value, where, hint


class OutOfBounds(Unfit):
    """A value outside its Bounds, or against its Rule."""


_HINTS: dict[type[Any], dict[str, Any]] = {}
"""What `field_hints` has found: annotations are text (`from __future__ import annotations`), slow to look up."""


def field_hints(cls: type[Any]) -> dict[str, Any]:
    """The dataclass's fields and their annotations, `Bounds` included."""
    if cls not in _HINTS:
        hints = typing.get_type_hints(cls, include_extras=True)
        _HINTS[cls] = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return _HINTS[cls]


def convert(hint: Any, value: Any, *, strict: bool) -> Any:
    """`value` as the annotated type; raises Unfit.

    `strict`: a list has to be one, and a path or text has to be text (as in YAML).
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _annotated(arguments[0], arguments[1:], value, strict)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return convert(next(a for a in arguments if a is not type(None)), value, strict=strict)
    if origin is tuple:
        return _tuple(arguments, value, strict)
    if origin is dict:
        return _mapping(arguments[1], value, strict)
    if origin is typing.Literal:
        return _choice(arguments, value)
    if hint is Any:
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _config(hint, value)
    return _CONVERTERS[hint](value, strict)


def _annotated(hint: Any, extras: tuple[Any, ...], value: Any, strict: bool) -> Any:
    value = convert(hint, value, strict=strict)
    for extra in extras:
        if isinstance(extra, Bounds):
            broken = extra.broken_by(value)
            if broken:
                raise OutOfBounds(broken, value)
        if isinstance(extra, Rule) and not extra.holds(value):
            raise OutOfBounds(extra.says, value)
        if isinstance(extra, Expands):
            value = _expanded(value)
        if isinstance(extra, OneOf) and value not in extra.names():
            raise Unfit(f"one of {', '.join(extra.names())}", value)
    return value


def _tuple(arguments: tuple[Any, ...], value: Any, strict: bool) -> tuple[Any, ...]:
    any_number = arguments[-1] is Ellipsis
    is_list = isinstance(value, (list, tuple)) or (not strict and not _is_single(value))
    if not is_list and any_number and not strict:  # a Python caller's one value is a list of one
        return (convert(arguments[0], value, strict=strict),)
    if not is_list:
        raise Unfit("a list such as [a, b]", value)
    values = list(value)
    if any_number:
        arguments = (arguments[0],) * len(values)
    if len(values) != len(arguments):
        raise Unfit(f"{len(arguments)} values", len(values))
    return tuple(_inside(f"[{i}]", each, values[i], strict) for i, each in enumerate(arguments))


def _is_single(value: Any) -> bool:
    """Whether a Python caller's value is one value: also text, a mapping, and a set, which has no order."""
    if isinstance(value, (str, bytes, os.PathLike, Mapping, set, frozenset)):
        return True
    return not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0  # an array or tensor of no dimension


def _inside(where: str, hint: Any, value: Any, strict: bool) -> Any:
    """`convert` of a part, whose place stands in the error."""
    try:
        return convert(hint, value, strict=strict)
    except OutOfBounds:
        raise  # the bounds hold for all of a list: all of it is shown
    except Unfit as unfit:
        raise Unfit(unfit.rule, unfit.value, where + unfit.where, unfit.hint) from None


def _mapping(hint: Any, value: Any, strict: bool) -> dict[str, Any]:
    """A mapping under names of the user's choice. Values annotated as Any stay as they are: someone else reads them."""
    if not isinstance(value, Mapping):
        raise Unfit("a mapping of options", value)
    for key in value:
        if not isinstance(key, str):
            raise Unfit("names", key, hint="put it in quotes")
    return {key: _inside(f".{key}", hint, each, strict) for key, each in value.items()}


def _choice(choices: tuple[Any, ...], value: Any) -> Any:
    value = _plain(value)
    for choice in choices:
        same_type = isinstance(value, type(choice)) and isinstance(value, bool) == isinstance(choice, bool)
        if same_type and value == choice:  # not 1 for True
            return choice
    raise Unfit(f"one of {', '.join(map(str, choices))}", value)


def _config(cls: type[Any], value: Any) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise Unfit(f"a {cls.__name__}, or a mapping of its options", value)
    hints = field_hints(cls)
    for key in value:
        if key not in hints:
            raise Unfit(f"a mapping of {cls.__name__}'s options, which has no {key!r}", dict(value))
    absent = [f.name for f in dataclasses.fields(cls) if _is_required(f) and f.name not in value]
    if absent:
        raise Unfit(f"a mapping with all that {cls.__name__} needs: {', '.join(absent)} missing", dict(value))
    return cls(**value)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _plain(value: Any) -> Any:
    """NumPy's scalars, and arrays and tensors of no dimension, as Python's own."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return value


_WHOLE = re.compile(r"[-+]?(0|[1-9](_?[0-9]){,99})")
"""0123 is none: octal to some, decimal to others."""


def _whole(value: Any, strict: bool) -> int:
    given = value
    value = _plain(value)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    value = _number_in(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Unfit("a whole number", given)
    if isinstance(value, int):  # exactly, however large
        return int(value)
    if not math.isfinite(value) or value != math.floor(value):
        raise Unfit("a whole number", given)
    return typing.cast("int", math.floor(value))  # Real does not say what its floor is


def _number(value: Any, strict: bool) -> float:
    given = value
    value = _number_in(_plain(value))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Unfit("a number", given)
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _number_in(value: Any) -> Any:
    """Text of a number as the number: PyYAML reads 2e-4 (no dot) as text. Text that begins 01 is left as it is."""
    if not isinstance(value, str) or re.fullmatch(r"[-+]?0[0-9].*", value):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _truth(value: Any, strict: bool) -> bool:
    value = _plain(value)
    if isinstance(value, str) and strict and value.lower() in _TRUTHS:
        return _TRUTHS[value.lower()]
    if not isinstance(value, bool):
        raise Unfit("true or false", value)
    return value


_TRUTHS = {"yes": True, "on": True, "no": False, "off": False}
"""Words of YAML 1.1 for truth values, where one is wanted."""


def _text(value: Any, strict: bool) -> str:
    given = value
    value = _plain(value)
    if isinstance(value, os.PathLike) and not strict:
        value = os.fspath(value)
    if not isinstance(value, str):
        hint = "put it in quotes" if isinstance(value, (bool, int, float)) else ""
        raise Unfit("text", given, hint=hint)
    _check_encodable(value)
    return str.__str__(value)  # plain text of a subclass, such as NumPy's


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unfit("text in UTF-8", text) from None


def _path(value: Any, strict: bool) -> Path:
    given = value
    if isinstance(value, os.PathLike) and not strict:
        value = os.fspath(value)
    if not isinstance(value, str):
        raise Unfit("a path", given)
    _check_encodable(value)
    return Path(value) if strict else Path(_expanded(str.__str__(value)))


_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{[A-Za-z_]\w*\})")
"""$NAME or ${NAME}."""


def _expanded(text: str) -> str:
    """`~` and `$VAR` filled in. A name with a dollar under which something lies is left as it is."""
    if not text or "\0" in text:
        raise Unfit("the name of a file or folder", text)
    if text[0] != "~" and ("$" not in text or os.path.lexists(text)):
        return text

    def value_of(variable: re.Match[str]) -> str:
        name = variable[1].strip("{}")
        if not os.environ.get(name):
            hint = f"the variable {name} is not set: set it, or write the path out"
            raise Unfit("a path that can be filled in", text, hint=hint)
        return os.environ[name]

    filled = os.path.expanduser(_VARIABLE.sub(value_of, text))
    if filled.startswith("~") and text.startswith("~"):
        hint = f"there is no such user; for a file of that name write ./{text}"
        raise Unfit("a path that can be filled in", text, hint=hint)
    return filled


_CONVERTERS: dict[Any, Callable[[Any, bool], Any]] = {
    float: _number,
    int: _whole,
    bool: _truth,
    str: _text,
    Path: _path,
}
