"""The one reader of YAML files: nothing is passed over in silence, or read as something else.

YAML 1.1, which PyYAML reads, takes `no` and `on` for truth values, 0123 for an octal number, 1:30 for 90 and 2024-01-01
for a date. Here they stay text, as in YAML 1.2, and the option that they are given for decides. A key that stands twice in
a mapping is an error: PyYAML would keep the last.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lead_engine.base.errors import UserError


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError naming file and line if it is not one."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give a YAML file that can be read") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        told = f"line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        raise UserError(f"--config {path}: {told}") from None
    try:
        values = yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UserError(f"--config {path}: line {line}: not valid YAML ({error.reason})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"--config {path}: {where}not valid YAML ({getattr(error, 'problem', error)})") from None
    except RecursionError:
        raise UserError(f"--config {path}: nested too deeply to be read") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"--config {path}: expected a mapping of options, found {found}")
    return values


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # merge keys (<<), which may say a key again, are filled in later
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in first:
                    lines = f"line {line}" if first[name] == line else f"lines {first[name]} and {line}"
                    problem = f"the key {key.value!r} stands twice, on {lines}: put its values together"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                first[name] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):  # of !!int x and the like
            problem = f"{node.value!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


_PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
"""What is read as other than 1.1 has it: the pattern, and the characters that it may begin with."""
_OWN = {f"tag:yaml.org,2002:{kind}" for kind in (*_PLAIN, "timestamp")}
_Loader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in resolvers if tag not in _OWN]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _starts) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})$"), list(_starts))
