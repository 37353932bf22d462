"""The selection methods by name, and a config's place for the options of the one that is chosen.

A method is one file of lead_engine/selection/methods: its options, its order, its state. Its name and place stand here,
in `BUILT_IN`. Another package adds a method with `register`, or with an entry point of the group `lead_engine.methods`:

    [project.entry-points."lead_engine.methods"]
    middle = "my_package.middle:Middle"

A method's module is imported when the method is chosen: it imports torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from lead_engine.base.errors import UserError
from lead_engine.config import reads
from lead_engine.config.bounds import OneOf
from lead_engine.config.old_names import moved_option
from lead_engine.config.options import Options, shown_value

BUILT_IN = {
    "lead": "lead_engine.selection.methods.lead:Lead",
    "iterit": "lead_engine.selection.methods.iterit:Iterit",
    "rescore": "lead_engine.selection.methods.rescore:Rescore",
    "loss": "lead_engine.selection.methods.loss:Loss",
    "ifd": "lead_engine.selection.methods.ifd:Ifd",
    "random": "lead_engine.selection.methods.random:Random",
    "random-matched": "lead_engine.selection.methods.random_matched:RandomMatched",
    "full": "lead_engine.selection.methods.full:Full",
}
"""Name of `--method` -> "module:class"."""
GROUP = "lead_engine.methods"
"""Entry points of other packages' methods."""
_registered: dict[str, type[Any]] = {}

M = TypeVar("M", bound=type[Any])
Recipe = Literal["default", "paper"]


@dataclass(frozen=True)
class MethodOptions(Options):
    """Base of a method's options, and the options of a method that has none."""

    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Recipe -> option -> value, under what a file and flags say."""

    @classmethod
    def recipe(cls, name: str) -> Mapping[str, Any]:
        """What the recipe sets of these options."""
        return cls.recipes.get(name, {})


def register(name: str) -> Callable[[M], M]:
    """Decorator of a method's class (lead_engine.selection.methods.Method): `--method NAME` and `--NAME.option` are it.

    UserError for a name that is taken, or cannot be a flag's.
    """

    def add(method: M) -> M:
        if name in BUILT_IN or _registered.get(name, method) is not method:
            raise UserError(f"register({name!r}): there is a method of this name; choose another")
        if not name.replace("-", "").isalnum() or name != name.lower():
            raise UserError(f"register({name!r}): use lower-case letters, digits and dashes")
        _registered[name] = method
        return method

    return add


def method_names() -> list[str]:
    """All names of `--method`: ours, those of other packages' entry points, those registered in this process."""
    return list(dict.fromkeys([*BUILT_IN, *_entry_points(), *_registered]))


def find_method(name: str) -> type[Any]:
    """The class of a method. UserError if there is none of this name, or its package cannot be imported."""
    if name in _registered:
        return _registered[name]
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        found: type[Any] = getattr(importlib.import_module(module), attribute)
        return found
    entry = _entry_points().get(name)
    if entry is None:
        raise UserError(f"--method {name}: must be one of {', '.join(method_names())}")
    try:
        loaded: type[Any] = entry.load()
    except Exception as error:  # whatever another package's import raises
        raise UserError(f"--method {name}: {entry.value} cannot be imported ({error}); mend that package") from error
    return loaded


def options_of(name: str) -> type[MethodOptions]:
    """The class of a method's options."""
    options: type[MethodOptions] = find_method(name).Options
    return options


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


MethodName = Annotated[str, OneOf(method_names)]


class WithMethod(Options):
    """Base of configs that have these three fields.

    In YAML, in names with dots and in flags, `options` is called by the method's name: `lead: {gamma: 0.2}`,
    `--lead.gamma 0.2`. A mapping of options lies over the recipe's values.
    """

    method: str
    recipe: Recipe
    options: MethodOptions

    def __new__(cls, *values: Any, **named: Any) -> Any:
        for name in named:
            moved = moved_option(name)
            if moved:
                raise UserError(f"{cls.__name__}({name}=...): {moved}")
        return super().__new__(cls)

    def key(self, field: str) -> str:
        return self.method if field == "options" else field

    def field_of(self, key: str) -> str:
        return "options" if key == self.method else key

    def table(self) -> reads.Table:
        group = f"{self.method}."
        own = {
            group + option: {group + other: need for other, need in needs.items()}
            for option, needs in self.options.read_with.items()
        }
        return {**reads.TRAIN, **own}

    def default_of(self, option: str) -> Any:
        group, _, name = option.rpartition(".")
        if group != self.method:
            return super().default_of(option)
        options = options_of(group)
        return options.recipe(self.recipe).get(name, getattr(options, name, dataclasses.MISSING))

    def _completed(self, name: str, value: Any) -> Any:
        if name == "options":
            return method_options(self.method, value, self.recipe, place=self.flag("options"))
        for old in value if name == "selection" and isinstance(value, Mapping) else ():
            moved = moved_option(f"selection.{old}")
            if moved:
                raise UserError(f"--selection.{old}: {moved}")
        return super()._completed(name, value)


def method_options(method: str, value: Any = None, recipe: str = "default", place: str = "options") -> MethodOptions:
    """The method's options from None, a mapping, or an instance. UserError "PLACE ...: ..." for anything else."""
    cls = options_of(method)
    if value is None or type(value) is MethodOptions:
        value = {}
    if isinstance(value, Mapping):
        unknown = [str(name) for name in value if name not in {f.name for f in dataclasses.fields(cls)}]
        if unknown:
            why = moved_option(f"selection.{unknown[0]}") if "paper" in cls.recipes else None  # of LEAD's
            why = why or _known(method, cls)
            raise UserError(f"{place} {unknown[0]}: {why}")
        return cls(**{**cls.recipe(recipe), **value})
    if not isinstance(value, cls):
        raise UserError(f"{place} {shown_value(value)}: must be a {cls.__name__}, or a mapping of its options")
    own = [name for name, said in cls.recipe(recipe).items() if said != getattr(cls, name)]
    if own and all(getattr(value, name) != cls.recipe(recipe)[name] for name in own):
        raise UserError(f"--recipe {recipe}: `options` has none of it; give a mapping, which lies over the recipe")
    return value


def _known(method: str, cls: type[MethodOptions]) -> str:
    names = [f.name for f in dataclasses.fields(cls)]
    if not names:
        return f"must be left out: the method {method} has no options"
    return f"must be an option of the method {method}: {', '.join(names)}"
