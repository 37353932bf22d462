"""Values of a record's fields, checked: what cannot be used raises `Bad`, which becomes a problem of that record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


class Bad(Exception):
    """Why a record cannot be used: (kind of problem, detail)."""


def present(fields: Mapping[Any, Any]) -> dict[str, Any]:
    """The fields that hold something: null is absent, as Parquet fills with it, and so is NaN, which pandas writes."""
    return {str(name): value for name, value in fields.items() if value is not None and value == value}


def empty(value: Any) -> bool:
    """Whether the value says nothing: blank text, or an empty list or object."""
    if isinstance(value, str):
        return not value.strip()
    return value in ([], {})


def text(value: Any, field: str) -> str:
    """The value, if it is text that a tokenizer takes."""
    if not isinstance(value, str):
        raise Bad("wrong_type", f"{field!r} must be text, found {type_name(value)}")
    try:
        value.encode()  # JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes
    except UnicodeEncodeError as error:
        raise Bad("bad_utf8", f"{field!r} holds an unpaired surrogate at character {error.start}") from None
    return value


def identifier(value: Any, field: str) -> str:
    """Text as it is; a number as it is written, a whole one without a fraction (1.0 is "1")."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return text(value, field)


def listed(value: Any, field: str) -> list[Any]:
    """A list, which may be spelled as JSON text."""
    found = parsed(value)
    if not isinstance(found, list):
        raise Bad("wrong_type", f"{field!r} must be a list, found {type_name(value)}")
    return found


def objects(value: Any, field: str) -> list[dict[str, Any]]:
    """A list of objects; it, and each of them, may be spelled as JSON text."""
    found = [parsed(item) for item in listed(value, field)]
    for item in found:
        if not isinstance(item, dict):
            raise Bad("wrong_type", f"{field!r} must be a list of objects, found {type_name(item)} in it")
    return found


def json_object(value: Any, field: str) -> dict[str, Any]:
    """An object, which may be spelled as JSON text."""
    found = parsed(value)
    if not isinstance(found, dict):
        raise Bad("wrong_type", f"{field!r} must be an object (or JSON text of one), found {type_name(value)}")
    return found


def parsed(value: Any) -> Any:
    """What JSON text of a list or an object spells; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def only(fields: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[str, Any] | None:
    """Name and value of the one field present among several of one meaning; None if there is none.

    Two that say the same are one.
    """
    found = [name for name in names if name in fields]
    for name in found[1:]:
        if fields[name] != fields[found[0]]:
            raise Bad("conflicting_fields", f"{where} has both {found[0]!r} and {name!r}, and they differ; keep one")
    return (found[0], fields[found[0]]) if found else None


def type_name(value: Any) -> str:
    """The value's type in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
