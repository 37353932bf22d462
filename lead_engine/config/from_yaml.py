"""Strict reading of YAML into the config dataclasses: every unknown key and wrong type is named, with its place."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lead_engine.base.errors import UserError
from lead_engine.config import RECIPES
from lead_engine.config.convert import Unfit, convert
from lead_engine.config.yaml_file import read_yaml

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
    """`value` as the annotated type; UserError if it is of another. Text is never taken for a list."""
    try:
        return convert(hint, value, strict=True)
    except Unfit as unfit:
        place = _place(source, (*path[:-1], path[-1] + unfit.where))
        stop = ";" if unfit.rule.startswith("one of") else ","
        way_out = f"; {unfit.hint}" if unfit.hint else ""
        raise UserError(f"{place}: expected {unfit.rule}{stop} found {_describe(unfit.value)}{way_out}") from None


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
    """ "--batch.micro-batches 0: ..." as "batch.micro_batches 0: ...": the user of a YAML file sees the key."""
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
