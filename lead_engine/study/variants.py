"""The variants that a study compares: its own options with changes, under a name.

In the study's YAML:

    selection: {round_steps: 2}
    methods: [lead, random]             # variants without changes, named after their method
    variants:
      paper: {method: lead, recipe: paper}
      no-bandit: {lead: {bandit: none}}
      control: {method: random-matched, match: no-bandit}
      noisy: {pool: other/prepared, budgets: [0.05], seeds: [0, 1]}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from lead_engine.base.errors import UserError
from lead_engine.config import (
    BatchConfig,
    LoraConfig,
    OptimizerConfig,
    RuntimeConfig,
    SelectionConfig,
    Share,
    StudyConfig,
    reads,
)
from lead_engine.config.bounds import Seeds
from lead_engine.config.from_yaml import draft_from_mapping, from_mapping
from lead_engine.config.methods import MethodName, MethodOptions, Recipe, WithMethod, method_names
from lead_engine.config.old_names import flat_options
from lead_engine.config.yaml_file import read_yaml
from lead_engine.pool.sources import STDIN

NAME = re.compile(r"[A-Za-z0-9._-]+")
"""Names are parts of folder names."""
OVERLAID = ("batch", "selection", "optimizer", "lora", "runtime")
MATCHED = "random-matched"


@dataclass(frozen=True)
class VariantOptions(WithMethod):
    """What may be said of a variant; what is not said is as in the study."""

    flags: ClassVar[str] = ""

    pool: Path
    budgets: tuple[Share, ...]
    seeds: Seeds
    method: MethodName = "lead"
    recipe: Recipe = "default"
    """Comes under the study's options and the variant's."""
    match: str | None = None
    """Of `random-matched`: the variant whose runs it imitates; by default the one called lead."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    options: MethodOptions = field(default_factory=MethodOptions)
    """The method's own, in YAML under its name: `lead: {...}`."""


@dataclass(frozen=True)
class Variant:
    """A named setting, and the budgets and seeds that it is run with."""

    name: str
    options: VariantOptions

    @property
    def budgets(self) -> tuple[float | None, ...]:
        """Shares of the pool's tokens; `full` has one budget, None: all of the pool."""
        return (None,) if self.options.method == "full" else self.options.budgets


@dataclass(frozen=True)
class Study:
    """A study's options, and its variants in the order in which they are shown."""

    options: StudyConfig
    variants: tuple[Variant, ...]

    @property
    def reference(self) -> str | None:
        """The variant that the others are compared with, if there is one."""
        names = [variant.name for variant in self.variants]
        return self.options.reference or ("random" if "random" in names else None)


def read_study(path: Path) -> Study:
    """The study in a YAML file; UserError naming file and key for anything that is not one."""
    said = read_yaml(path, flag="--config")
    shared = {key: value for key, value in said.items() if key not in method_names()}
    options = from_mapping(StudyConfig, shared, source=str(path))
    if options.variants and "methods" not in said:
        options = replace(options, methods=())
    if not options.heldout:
        raise UserError(f"{path}: heldout: name at least one held-out file")
    if STDIN in options.heldout:
        raise UserError(
            f"{path}: heldout: every run reads these records, and standard input can be read once; name a file"
        )
    named: list[tuple[str, str, Mapping[str, Any]]]
    named = [(name, "methods", {"method": name}) for name in options.methods]
    named += [(name, f"variants.{name}", values) for name, values in options.variants.items()]
    variants = tuple(_variant(name, values, options, said, f"{path}: {key}") for name, key, values in named)
    for option in flat_options({key: said[key] for key in (*OVERLAID, *method_names()) if key in said}):
        reasons = [_why_unread(option, variant.options) for variant in variants]
        if all(reasons):
            raise UserError(f"{path}: {option}: no variant reads it: it is read only {reasons[0]}; leave it out")
    study = Study(options, variants)
    _check_names(study, path)
    for variant in variants:
        _check_match(variant, study, path)
    return study


def _variant(name: str, values: Mapping[str, Any], study: StudyConfig, said: Mapping[str, Any], source: str) -> Variant:
    """said: the study's YAML. What it sets outranks a variant's recipe; the defaults of what it leaves out do not."""
    if not NAME.fullmatch(name):
        raise UserError(f"{source}: {name!r} cannot be part of a folder's name; use letters, digits, '.', '_' and '-'")
    draft = draft_from_mapping(VariantOptions, values, source=source, missing=None)  # mistakes are named where they are
    if "match" in values.get(MATCHED, {}):
        raise UserError(f"{source}: {MATCHED}.match: the study fills it in; name a variant: match: lead")
    shared = {key: said[key] for key in (*OVERLAID, draft.method) if key in said}
    if draft.method == "full":
        shared["full"] = {"epochs": study.epochs, **shared.get("full", {})}
    inherited = {"pool": str(study.pool), "budgets": study.budgets, "seeds": study.seeds}
    options = from_mapping(VariantOptions, overlay({**inherited, **shared}, values), source=source)
    if options.method == "full" and "budgets" in values:
        raise UserError(f"{source}: budgets: full takes the whole pool, `epochs` times; leave budgets out")
    if options.method != "full" and not options.budgets:
        raise UserError(f"{source.partition(': ')[0]}: budgets: name at least one share of the pool")
    if options.match is not None and options.method != MATCHED:
        raise UserError(f"{source}: match: only the method {MATCHED} imitates another variant")
    for option in flat_options(values):
        reason = _why_unread(option, options)
        if reason:
            raise UserError(f"{source}: {option}: is read only {reason}; leave it out")
    if options.method == MATCHED and options.match is None:
        options = replace(options, match="lead")
    return Variant(name, options)


def _why_unread(option: str, options: VariantOptions) -> str | None:
    """Why a variant does not read an option, as what follows "is read only"; None where it does."""
    group = option.partition(".")[0]
    if group in method_names() and group != options.method:
        return f"with method {group}, not {options.method}"
    return reads.why_unread(option, options, options.table())


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above`, nested mappings key by key."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = overlay(under, value) if isinstance(value, Mapping) and isinstance(under, Mapping) else value
    return merged


def _check_names(study: Study, path: Path) -> None:
    names = [variant.name for variant in study.variants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{path}: methods, variants: {', '.join(twice)} is there twice; give every variant a name of its own"
        )
    options = study.options
    if options.reference is not None:
        _check_known(options.reference, names, f"{path}: reference")
    for i, pair in enumerate(options.contrasts):
        for name in pair:
            _check_known(name, names, f"{path}: contrasts[{i}]")
        if pair[0] == pair[1]:
            raise UserError(f"{path}: contrasts[{i}]: {pair[0]} cannot be compared with itself")


def _check_known(name: str, names: Sequence[str], place: str) -> None:
    if name not in names:
        raise UserError(f"{place}: {name}: no such variant; the study has {', '.join(names)}")


def _check_match(variant: Variant, study: Study, path: Path) -> None:
    """What a `random-matched` variant imitates must be run at the same budgets and seeds, from the same pool."""
    options = variant.options
    if options.method != MATCHED:
        return
    assert options.match is not None
    place = f"{path}: {'variants.' if variant.name in study.options.variants else ''}{variant.name}: match"
    _check_known(options.match, [other.name for other in study.variants], place)
    other = next(other for other in study.variants if other.name == options.match).options
    if other.method == MATCHED:
        raise UserError(f"{place}: {options.match} is {MATCHED} itself; name a variant of another method")
    absent = sorted(set(options.budgets) - set(other.budgets)) if other.method != "full" else list(options.budgets)
    if absent:
        raise UserError(
            f"{place}: {options.match} has no run with budget {absent[0]:g}; give both variants the same budgets"
        )
    absent = sorted(set(options.seeds) - set(other.seeds))
    if absent:
        raise UserError(f"{place}: {options.match} has no run with seed {absent[0]}; give both variants the same seeds")
    if other.pool != options.pool:
        raise UserError(
            f"{place}: {options.match} selects from another pool, {other.pool}; give both variants the same pool"
        )
