"""The one reader of YAML files: no key is ignored, and no text is taken for something else.

YAML 1.1, which PyYAML reads, takes `no` and `on` for truth values, 0123 for an octal number, 1:30 for 90 and 2024-01-01
for a date. Here they stay text, as in YAML 1.2, and the option that they are given for decides. A key that stands twice
in a mapping is an error: PyYAML would keep the last.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lead_engine.base.errors import UserError


def read_yaml(path: Path, *, flag: str = "") -> dict[str, Any]:
    """The mapping in a YAML file. UserError naming file and line if it cannot be read or holds no mapping.

    flag: the flag that named the file, for the error.
    """
    source = f"{flag} {path}".strip()
    text = _read_text(path, source)
    try:
        values = yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UserError(f"{source}: line {line}: not valid YAML ({error.reason})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{source}: {where}not valid YAML ({getattr(error, 'problem', error)})") from None
    except RecursionError:
        raise UserError(f"{source}: nested too deeply to be read") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"{source}: expected a mapping of options, found {found}")
    return values


def _read_text(path: Path, source: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}; give a YAML file that can be read") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{source}: line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    def compose_mapping_node(self, anchor: str | None) -> Any:
        """A mapping whose keys differ."""
        # Merge keys (<<), which may say a key again, are filled in later.
        node = super().compose_mapping_node(anchor)
        line_of: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in line_of:
                before = line_of[name]
                lines = f"line {line}" if before == line else f"lines {before} and {line}"
                problem = f"the key {key.value!r} stands twice, on {lines}: put its values together"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            line_of[name] = line
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The node's value; where a tag such as !!int does not fit its text, the error has a line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            problem = f"{node.value!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


# --- which plain texts are a truth value or a number: YAML 1.2's rules in the place of 1.1's ---

_TAG = "tag:yaml.org,2002:"
_EXPONENT = r"(?:[eE][-+]?[0-9]+)?"
_FLOATS = (
    rf"[-+]?[0-9][0-9_]*\.[0-9_]*{_EXPONENT}",
    rf"[-+]?\.[0-9][0-9_]*{_EXPONENT}",
    r"[-+]?\.(?:inf|Inf|INF)",
    r"\.(?:nan|NaN|NAN)",
)
_RULES = (
    # kind, pattern, the characters that such a text may begin with (which PyYAML looks rules up by)
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", "|".join(_FLOATS), "-+0123456789."),
)
_REPLACED = {_TAG + kind for kind, _, _ in _RULES} | {_TAG + "timestamp"}

_Loader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern, _starts in _RULES:
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})$"), list(_starts))
