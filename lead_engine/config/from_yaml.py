"""Plain values, as YAML gives them, into the configs: every unknown key and wrong type is named, with its place."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lead_engine.base.errors import UserError
from lead_engine.config.convert import Unfit, convert, field_hints
from lead_engine.config.methods import WithMethod, method_names, options_of
from lead_engine.config.old_names import moved_option
from lead_engine.config.options import Options
from lead_engine.config.yaml_file import read_yaml

T = TypeVar("T", bound=Options)
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
    absent = [name for name in _names(cls) if getattr(draft, name) is _ABSENT]
    if absent:
        keys = "key" if len(absent) == 1 else "keys"
        raise UserError(f"{source}: required {keys} missing: {', '.join(absent)}")
    try:
        return _construct(draft)
    except UserError as error:
        raise UserError(f"{source}: {_flag_as_key(str(error))}") from None


def draft_from_mapping(cls: type[T], mapping: Mapping[str, Any], *, source: str, missing: Any) -> T:
    """The same, but values have only been converted to their types: bounds and rules are not checked yet.

    The command line needs this: a flag may put right what in the YAML file alone breaks a rule. Required fields that
    the mapping leaves out hold `missing`. A `recipe` that the mapping names comes under its other values.
    """
    values = {f.name: _default(f, missing) for f in dataclasses.fields(cls)}
    if issubclass(cls, WithMethod) and isinstance(mapping, Mapping):
        for name in ("method", "recipe"):
            if name in mapping:
                values[name] = _convert(field_hints(cls)[name], mapping[name], source, (name,))
        options = options_of(values["method"])
        own = {f.name: _default(f, missing) for f in dataclasses.fields(options)}
        values["options"] = _raw_instance(options, {**own, **options.recipe(values["recipe"])})
    return _overlay(_raw_instance(cls, values), mapping, source, ())


def _names(cls: type[Options]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _overlay(base: T, mapping: Any, source: str, path: tuple[str, ...]) -> T:
    """A copy of `base` with the mapping's values, made without running `__post_init__`."""
    if not isinstance(mapping, Mapping):
        raise UserError(f"{_place(source, path)}: expected a mapping of options, found {_describe(mapping)}")
    hints = typing.get_type_hints(type(base))  # without Bounds: those are checked when the config is built
    values = {name: getattr(base, name) for name in _names(type(base))}
    fields = {base.key(name): name for name in values}
    for key, value in mapping.items():
        name = fields.get(key)
        if name is None:
            raise UserError(f"{_place(source, (*path, str(key)))}: {_why_unknown(base, key, path, list(fields))}")
        if dataclasses.is_dataclass(values[name]):
            values[name] = _overlay(values[name], value, source, (*path, key))
        else:
            values[name] = _convert(hints[name], value, source, (*path, key))
    return _raw_instance(type(base), values)


def _why_unknown(base: Any, key: Any, path: tuple[str, ...], known: list[str]) -> str:
    moved = moved_option(".".join((*path, str(key))), as_key=True)
    if moved:
        return moved
    if isinstance(base, WithMethod) and key in method_names():
        return f"is read only with method: {key}, not {base.method}; leave it out"
    return f"unknown key; {_suggest(str(key), known)}"


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
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return missing


def _raw_instance(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance made without the constructor, and so without its checks."""
    instance = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(instance, name, value)
    return instance


def _construct(draft: T) -> T:
    """The same values through the constructors, so that every `__post_init__` checks its own."""
    values = {name: getattr(draft, name) for name in _names(type(draft))}
    for name, value in values.items():
        if isinstance(value, Options):
            values[name] = _construct(value)
    return type(draft)(**values)


def _flag_as_key(message: str) -> str:
    """`--batch.micro-batches 0: ...` as `batch.micro_batches 0: ...`: the user of a YAML file sees the key."""
    flag, space, rest = message.partition(" ")
    if not flag.startswith("--"):
        return message
    return flag.removeprefix("--").replace("-", "_") + space + rest


def _place(source: str, path: tuple[str, ...]) -> str:
    return f"{source}: {'.'.join(path)}" if path else source


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    shown = repr(value)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return f"{shown} ({_KINDS.get(type(value), type(value).__name__)})"


_KINDS = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "a mapping"}


def _suggest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"known here: {', '.join(known)}"
