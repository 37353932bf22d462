"""Which options are read only together with others: the tables, and the error for one that would be ignored.

`TRAIN` and its like say what an option needs in order to be read: other options, and their values. An option whose
needs fail, or hang on an option that is itself not read, would change nothing: giving it is an error. Given is what
differs from its default, and what a flag says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lead_engine.base.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Need:
    """What the value of another option has to be."""

    words: str
    holds: Callable[[Any], bool]


Needs = Mapping[str, Need]
Table = Mapping[str, Needs]
"""Option, or group of options, with dots -> the options that it needs."""


def one_of(*values: Any) -> Need:
    return Need(" or ".join(map(str, values)), lambda value: value in values)


ABOVE_0 = Need("above 0", lambda value: value > 0)
SCRATCH = Need("scratch:NAME", lambda value: value.startswith("scratch:"))
HAVE_RECIPES = ("lead", "rescore")

TRAIN: Table = {
    "recipe": {"method": Need("that has recipes (lead, rescore)", lambda method: method in HAVE_RECIPES)},
    "budget": {"method": Need("that chooses among the samples", lambda value: value != "full")},
    "lora": {"lora.rank": ABOVE_0},
}
"""Of the options that methods share. What a method's own options need stands with them, in the method's file."""
PRETRAIN: Table = {"vocab_size": {"model": SCRATCH}}
PREPARE: Table = {
    "warmup_share": {"scoring": one_of("model")},
    "optimizer": {"warmup_share": ABOVE_0},
    "vocab_size": {"model": SCRATCH},
}
EVAL: Table = {"max_new_tokens": {"generate": ABOVE_0}}


def value_of(config: Any, option: str) -> Any:
    """The value under a name with dots."""
    for name in option.split("."):
        config = getattr(config, _field_of(config, name))
    return config


def _field_of(config: Any, key: str) -> str:
    return str(config.field_of(key))


def flag_of(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def leaves(config: Any, prefix: str = "") -> Iterator[str]:
    """Names with dots of all options of a config."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + config.key(field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{name}.")
        else:
            yield name


def why_unread(option: str, config: Any, table: Table, prefix: str = "") -> str | None:
    """Why `config` does not read the option, as what follows "is read only"; None where it does.

    prefix: what stands before the options' names in a flag.
    """
    group = option.partition(".")[0]
    for other, need in {**table.get(group, {}), **table.get(option, {})}.items():
        if other == option:
            continue
        deeper = why_unread(other, config, table, prefix)
        if deeper:
            return deeper
        value = value_of(config, other)
        if not need.holds(value):
            return f"with {flag_of(prefix + other)} {need.words}, not {value}"
    return None


def unread(config: Any, table: Table) -> list[str]:
    """The options, with dots, that `config` does not read."""
    return [option for option in leaves(config) if why_unread(option, config, table)]


def refuse_unread(
    config: Any, table: Table, default_of: Callable[[str], Any], given: Collection[str] = (), prefix: str = ""
) -> None:
    """UserError for an option that is given and not read; `given`: those that were, whatever their values."""
    for option in leaves(config):
        value = value_of(config, option)
        reason = why_unread(option, config, table, prefix)
        if reason and (option in given or value != default_of(option)):
            raise UserError(f"{flag_of(prefix + option)} {value}: is read only {reason}; leave it out")


def without_unread(config: T, table: Table, default_of: Callable[[str], Any]) -> T:
    """The config with the defaults of what it does not read."""
    for option in unread(config, table):
        group, _, name = option.rpartition(".")
        change = {name: default_of(option)}
        if change[name] is dataclasses.MISSING:
            continue
        if group:
            change = {_field_of(config, group): dataclasses.replace(value_of(config, group), **change)}
        config = dataclasses.replace(config, **change)  # type: ignore[type-var]
    return config
