"""What all configs share: fields are converted to their types and kept within their bounds when a config is built.

    class BatchConfig(Options):
        flags = "--batch."
        capacity: Annotated[int, Bounds(ge=16)] = 4096

Flags, YAML and Python callers all end in the constructor, so all of them meet the same checks.
Rules between fields stay in the class's `__post_init__`, which calls this one first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from lead_engine.base.errors import UserError
from lead_engine.config import reads
from lead_engine.config.convert import Unfit, convert, field_hints

T = TypeVar("T")
_NO_DEFAULT = object()


@dataclass(frozen=True)
class Options:
    """Base of the configs, which are frozen dataclasses.

    Raises UserError "FLAG VALUE: must be ..." for the first field whose value is neither of its type nor convertible
    without loss. Converted are: text to Path and back, text and whole floats to numbers, NumPy's scalars, lists and
    single values to tuples, mappings to nested configs.
    """

    flags: ClassVar[str] = "--"
    """What stands before a field's name in messages. Names have dashes after a flag's dashes, else underscores."""

    read_with: ClassVar[reads.Table] = {}
    """Which options are read only together with others."""

    def __post_init__(self) -> None:
        for name, hint in field_hints(type(self)).items():
            value = getattr(self, name)
            if value is not getattr(type(self), name, _NO_DEFAULT):
                object.__setattr__(self, name, argument(hint, self._completed(name, value), self.flag(name)))
        if self.table():
            self.refuse_unread()

    def table(self) -> reads.Table:
        """Which options are read only together with others, nested ones too."""
        return self.read_with

    def refuse_unread(self, given: Collection[str] = ()) -> None:
        """UserError for an option that nothing would read and that is `given`, or differs from its default."""
        reads.refuse_unread(self, self.table(), self.default_of, given, prefix=self.flags.removeprefix("--"))

    def key(self, field: str) -> str:
        """What a field is called in YAML and in names with dots."""
        return field

    def field_of(self, key: str) -> str:
        """The field that is called so."""
        return key

    def default_of(self, option: str) -> Any:
        """The value, under a name with dots, of an option that is not given; MISSING where it has to be."""
        group, _, name = option.rpartition(".")
        if group:
            return getattr(self._default_group(group), name)
        return getattr(type(self), name, dataclasses.MISSING)

    def _completed(self, name: str, value: Any) -> Any:
        """A mapping for a nested config over this field's own default, which may differ from the nested class's."""
        default = self._default_group(name)
        if not isinstance(value, Mapping) or not dataclasses.is_dataclass(default):
            return value
        below = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
        return below | dict(value) if value.keys() <= below.keys() else value

    @classmethod
    def _default_group(cls, name: str) -> Any:
        """The nested config that a field has by default; None for a field that holds none."""
        factory = cls.__dataclass_fields__[name].default_factory
        return None if factory is dataclasses.MISSING else factory()

    @classmethod
    def flag(cls, name: str) -> str:
        return cls.flags + (name.replace("_", "-") if cls.flags.startswith("--") else name)


def argument(hint: Any, value: Any, name: str) -> Any:
    """A Python caller's `value` as `hint`, which may hold `Bounds`. UserError "NAME VALUE: must be ..." otherwise."""
    try:
        return convert(hint, value, strict=False)
    except Unfit as unfit:
        way_out = f"; {unfit.hint}" if unfit.hint else ""
        shown = shown_value(unfit.value if unfit.where else value)
        raise UserError(f"{name}{unfit.where} {shown}: must be {unfit.rule}{way_out}") from None


def as_config(cls: type[T], value: Any, name: str) -> T:
    """`value` as the config `cls`, of which it may be the mapping. UserError if it is anything else."""
    made: T = argument(cls, value, name)
    return made


def device_argument(value: Any, name: str) -> Any:
    """A Python caller's `value` as a torch.device. UserError "NAME VALUE: must be ..." if it names none."""
    import torch

    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError):
        raise UserError(f"{name} {shown_value(value)}: must be a device, such as cpu, cuda or cuda:1") from None


def shown_value(value: Any) -> str:
    """A value as it stands in a message: short, and on one line."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "(a whole number of very many digits)"
    text = str(value) if isinstance(value, (int, float, Path)) or value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
