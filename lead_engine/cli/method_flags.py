"""The flags of the chosen method, `--lead.*` and the like: `--method` is read before all others, as `--recipe` is."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any

from lead_engine.base.errors import UserError
from lead_engine.config.methods import Recipe, WithMethod, find_method, method_names, options_of
from lead_engine.config.old_names import moved_option


def named_in(arguments: list[str], mapping: Mapping[str, Any], last_value: Any) -> dict[str, Any]:
    """The YAML file's values with the method and recipe that flags name; these set the defaults of other options."""
    chosen = dict(mapping)
    method, recipe = last_value(arguments, "--method"), last_value(arguments, "--recipe")
    if method is not None:
        find_method(method)
        chosen["method"] = method
    if recipe in typing.get_args(Recipe):  # the parser refuses any other value
        chosen["recipe"] = recipe
    return chosen


def with_method_flags(cls: type[WithMethod], method: str) -> type[Any]:
    """`cls` as the flag parser shall see it: the field `options` is of the method's own class and goes by its name."""
    import tyro

    options = options_of(method)
    shown: Any = tyro.conf.arg(name=method) if dataclasses.fields(options) else tyro.conf.Suppress
    names = "{" + ",".join(method_names()) + "}"
    fields = [
        ("method", Annotated[str, tyro.conf.arg(metavar=names)], dataclasses.field(default="lead")),
        ("options", Annotated[options, shown], dataclasses.field(default_factory=options)),
    ]
    return dataclasses.make_dataclass(
        cls.__name__, fields, bases=(cls,), frozen=True, namespace={"__doc__": cls.__doc__}
    )


def without_method_flags(cls: type[WithMethod], parsed: Any) -> Any:
    """What the flag parser made of `with_method_flags(cls, ...)`, as a `cls`."""
    return cls(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(cls)})


def refuse_moved(arguments: list[str], known: Collection[str]) -> None:
    """UserError for a flag of an earlier version, with its name of today; `known` are the command's own options."""
    for flag, group, name in _flags(arguments):
        option = f"{group}.{name.removeprefix('no-')}" if group else name
        moved = None if option.replace("-", "_") in known else moved_option(option)
        if moved:
            raise UserError(f"{flag}: {moved}")


def refuse_other_methods(arguments: list[str], method: str) -> None:
    """UserError for a flag of a method that is not the one chosen."""
    for flag, group, _ in _flags(arguments):
        if group in method_names() and group != method:
            raise UserError(f"{flag}: is read only with --method {group}, not {method}; leave it out")


def _flags(arguments: list[str]) -> Iterator[tuple[str, str, str]]:
    """(--group.name, group, name) of every flag."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--"):
            group, _, name = flag.removeprefix("--").rpartition(".")
            yield flag, group, name
