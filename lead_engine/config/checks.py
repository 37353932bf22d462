"""Checks between a config's fields, and a config as plain values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lead_engine.base.errors import UserError


def require(condition: bool, flag: str, value: object, rule: str) -> None:
    """Raise UserError "FLAG VALUE: must be RULE" unless `condition` holds."""
    if not condition:
        raise UserError(f"{flag} {value}: must be {rule}")


def _is_empty(value: Any) -> bool:
    """Whether it is the options of a method that has none."""
    return dataclasses.is_dataclass(value) and not dataclasses.fields(value)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain YAML/JSON types (paths as strings, tuples as lists)."""
    values = {config.key(field.name): getattr(config, field.name) for field in dataclasses.fields(config)}
    return {key: _plain(value) for key, value in values.items() if not _is_empty(value)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return value
