"""Strict reading of YAML into the config dataclasses: every unknown key and wrong type is named, with its place."""
from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lead_engine.config import RECIPES, read_yaml
from lead_engine.errors import UserError

T = TypeVar("T")
_ABSENT = object()


def parse_yaml_into(cls: type[T], path: Path) -> T:
    """The config `cls` that the YAML file describes. UserError naming file and key path if it describes none."""
    return from_mapping(cls, read_yaml(path), source=str(path))


def from_mapping(cls: type[T], mapping: Mapping[str, Any], *, source: str) -> T:
    """`cls` built from nested plain values; fields that the mapping leaves out keep their defaults.

    A partly given nested config keeps the rest of *this* field's default, which may differ from its class's defaults.
    Raises UserError "SOURCE: key.path: ..." for unknown or missing keys, wrong types, and values that `cls` refuses.
    """
    draft = draft_from_mapping(cls, mapping, source=source, missing=_ABSENT)
    absent = [f.name for f in dataclasses.fields(cls) if getattr(draft, f.name) is _ABSENT]
    if absent:
        raise UserError(f"{source}: required key{'s' * (len(absent) > 1)} missing: {', '.join(absent)}")
    try:
        return _construct(draft)
    except UserError as error:
        raise UserError(f"{source}: {_flag_as_key(str(error))}") from None


def draft_from_mapping(cls: type[T], mapping: Mapping[str, Any], *, source: str, missing: Any) -> T:
    """Like `from_mapping`, but an instance whose values are type-checked only: nothing validates their ranges yet.

    The command line needs this: a YAML value that is out of range by itself may be put right by a flag. Required
    fields that the mapping leaves out hold `missing`.
    A `recipe` that the mapping names comes under its other values.
    """
    base = _raw_instance(cls, {f.name: _default(f, missing) for f in dataclasses.fields(cls)})
    recipe = mapping.get("recipe", "default") if isinstance(mapping, Mapping) else None
    if recipe in RECIPES and "recipe" in _names(cls):
        base = _overlay(base, RECIPES[recipe], f"recipe {recipe}", ())
    return _overlay(base, mapping, source, ())


def _names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _overlay(base: T, mapping: Any, source: str, path: tuple[str, ...]) -> T:
    """A copy of `base` with the mapping's values, made without running `__post_init__`."""
    if not isinstance(mapping, Mapping):
        raise UserError(f"{_place(source, path)}: expected a mapping of options, found {_describe(mapping)}")
    hints = typing.get_type_hints(type(base))
    values = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    for key, value in mapping.items():
        if key not in values:
            raise UserError(f"{_place(source, (*path, str(key)))}: unknown key; {_suggest(str(key), list(values))}")
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _overlay(values[key], value, source, (*path, key))
        else:
            values[key] = _convert(hints[key], value, source, (*path, key))
    return _raw_instance(type(base), values)


def _convert(hint: Any, value: Any, source: str, path: tuple[str, ...]) -> Any:
    """`value` as the annotated type; UserError if it is of another. Text is never taken for a truth value or a list."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, source, path)
    if origin is tuple:
        return _convert_tuple(arguments, value, source, path)
    if origin is dict:
        return _convert_mapping(arguments[1], value, source, path)
    if origin is typing.Literal:
        if not any(value == a and type(value) is type(a) for a in arguments):
            choices = ", ".join(map(str, arguments))
            raise UserError(f"{_place(source, path)}: expected one of {choices}; found {_describe(value)}")
        return value
    if hint is float and isinstance(value, str):
        value = _number_in_text(value)
    accepted = {float: (int, float), int: (int,), bool: (bool,), str: (str,), Path: (str,)}[hint]
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{_place(source, path)}: expected {_NAMES[hint]}, found {_describe(value)}")
    return hint(value)


def _convert_tuple(arguments: tuple[Any, ...], value: Any, source: str, path: tuple[str, ...]) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{_place(source, path)}: expected a list such as [a, b], found {_describe(value)}")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise UserError(f"{_place(source, path)}: expected {len(arguments)} values, found {len(value)}")
    return tuple(
        _convert(a, v, source, (*path[:-1], f"{path[-1]}[{i}]"))
        for i, (a, v) in enumerate(zip(arguments, value, strict=True))
    )


def _convert_mapping(hint: Any, value: Any, source: str, path: tuple[str, ...]) -> dict[str, Any]:
    """A mapping under names of the user's choice. Values annotated as Any stay as they are: someone else reads them."""
    if not isinstance(value, Mapping):
        raise UserError(f"{_place(source, path)}: expected a mapping of options, found {_describe(value)}")
    for key in value:
        if not isinstance(key, str):
            raise UserError(f"{_place(source, path)}: expected names, found {_describe(key)}; put it in quotes")
    return {key: v if hint is Any else _convert(hint, v, source, (*path, key)) for key, v in value.items()}


_NAMES = {float: "a number", int: "a whole number", bool: "true or false", str: "text", Path: "a path"}


def _number_in_text(value: str) -> float | str:
    """YAML 1.1 reads 2e-4 (no dot) as text; whoever writes it means the number."""
    try:
        return float(value)
    except ValueError:
        return value


def _default(field: dataclasses.Field[Any], missing: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return missing if field.default_factory is dataclasses.MISSING else field.default_factory()


def _raw_instance(cls: type[T], values: Mapping[str, Any]) -> T:
    instance = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(instance, name, value)
    return instance


def _construct(draft: T) -> T:
    """The same values through the constructors, so that every `__post_init__` checks its own."""
    values = {f.name: getattr(draft, f.name) for f in dataclasses.fields(draft)}
    return type(draft)(**{k: _construct(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()})


def _flag_as_key(message: str) -> str:
    """"--batch.micro-batches 0: ..." as "batch.micro_batches 0: ...": the user of a YAML file sees the key."""
    first, space, rest = message.partition(" ")
    return first.removeprefix("--").replace("-", "_") + space + rest if first.startswith("--") else message


def _place(source: str, path: tuple[str, ...]) -> str:
    return f"{source}: {'.'.join(path)}" if path else source


def _describe(value: Any) -> str:
    kinds = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "a mapping"}
    if value is None:
        return "nothing"
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({kinds.get(type(value), type(value).__name__)})"


def _suggest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"known here: {', '.join(known)}"
