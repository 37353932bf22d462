"""Which options are read only together with others: the tables, and the error for one that would be ignored.

`TRAIN` and its like say what an option needs in order to be read: other options, and their values. An option whose needs
fail, or hang on an option that is itself not read, would change nothing: giving it is an error. Given is what differs from
its default, and what a flag says.
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
LEADS = one_of("lead", "rescore")

SCHEDULE: Table = {"optimizer.final_lr": {"optimizer.schedule": one_of("cosine", "linear")}}
SELECTION: Table = {
    "selection.loss_change": {"method": one_of("lead")},
    "selection.inner_form": {"selection.loss_change": one_of("inner", "paper")},
    "selection.sketch_dim": {"selection.inner_form": one_of("sketch")},
    "selection.calibrate_every": {"selection.loss_change": one_of("inner")},
    "selection.smoothing": {"method": LEADS},
    "selection.bandit": {"method": LEADS},
    "selection.gamma": {"selection.bandit": one_of("exp3", "exp3s")},
    "selection.exp3s_alpha": {"selection.bandit": one_of("exp3s")},
    "selection.draw": {"method": LEADS},
    "selection.prior": {"selection.bandit": one_of("exp3", "exp3s", "uniform")},
    "selection.ranking": {"method": LEADS},
    "selection.soft_power": {"selection.ranking": one_of("soft")},
    "selection.rank_by": {"selection.ranking": one_of("hard", "soft")},
    "selection.unseen": {"method": one_of("lead")},
    "selection.optimism": {"selection.unseen": one_of("estimate")},
    "selection.drop_misaligned": {"method": LEADS},
    "selection.use_tasks": {"method": LEADS},
    "selection.task_power": {"selection.use_tasks": one_of(True)},
    "selection.max_visits": {"method": LEADS},
    "selection.round_steps": {},
    "selection.epochs": {"method": one_of("iterit")},
    "selection.candidates": {"method": one_of("iterit"), "selection.epochs": Need("above 1", lambda value: value > 1)},
    "selection.decay": {"method": one_of("iterit")},
    "selection.match": {"method": one_of("random-matched")},
}
TRAIN: Table = {
    "recipe": {"method": LEADS},
    "epochs": {"method": one_of("full")},
    "budget": {"method": Need("that chooses among the samples", lambda value: value != "full")},
    "lora": {"lora.rank": ABOVE_0},
    **SELECTION,
    **SCHEDULE,
}
PRETRAIN: Table = {"vocab_size": {"model": SCRATCH}, **SCHEDULE}
PREPARE: Table = {
    "warmup_share": {"scoring": one_of("model")},
    "optimizer": {"warmup_share": ABOVE_0},
    "vocab_size": {"model": SCRATCH},
    **SCHEDULE,
}
EVAL: Table = {"max_new_tokens": {"generate": ABOVE_0}}


def value_of(config: Any, option: str) -> Any:
    """The value under a name with dots."""
    for name in option.split("."):
        config = getattr(config, name)
    return config


def flag_of(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def leaves(config: Any, prefix: str = "") -> Iterator[str]:
    """Names with dots of all options of a config."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def why_unread(option: str, config: Any, table: Table) -> str | None:
    """Why `config` does not read the option, as what follows "is read only"; None where it does."""
    group = option.partition(".")[0]
    for other, need in {**table.get(group, {}), **table.get(option, {})}.items():
        if other == option:
            continue
        deeper = why_unread(other, config, table)
        if deeper:
            return deeper
        value = value_of(config, other)
        if not need.holds(value):
            return f"with {flag_of(other)} {need.words}, not {value}"
    return None


def unread(config: Any, table: Table) -> list[str]:
    """The options, with dots, that `config` does not read."""
    return [option for option in leaves(config) if why_unread(option, config, table)]


def refuse_unread(config: Any, table: Table, default_of: Callable[[str], Any], given: Collection[str] = ()) -> None:
    """UserError for an option that is given and not read; `given`: those that were, whatever their values."""
    for option in leaves(config):
        value = value_of(config, option)
        reason = why_unread(option, config, table)
        if reason and (option in given or value != default_of(option)):
            raise UserError(f"{flag_of(option)} {value}: is read only {reason}; leave it out")


def without_unread(config: T, table: Table, default_of: Callable[[str], Any]) -> T:
    """The config with the defaults of what it does not read."""
    for option in unread(config, table):
        group, _, name = option.rpartition(".")
        change = {name: default_of(option)}
        if change[name] is dataclasses.MISSING:
            continue
        if group:
            change = {group: dataclasses.replace(value_of(config, group), **change)}
        config = dataclasses.replace(config, **change)  # type: ignore[type-var]
    return config
