"""What all commands' options share: checks between fields, and a config as plain values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lead_engine.base.errors import UserError


def require(condition: bool, flag: str, value: object, rule: str) -> None:
    """Raise UserError "FLAG VALUE: must be RULE" unless `condition` holds."""
    if not condition:
        raise UserError(f"{flag} {value}: must be {rule}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain YAML/JSON types (paths as strings, tuples as lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Path):
            return str(value)
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(config)
