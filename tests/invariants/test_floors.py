"""No circular imports, and no import of a room above: both packages, function-level and type-checking imports too."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

ROOMS = ["base", "config", "pool", "model", "selection", "training", "prepare", "evaluation", "study", "report"]
ROOMS += ["integrations", "api", "cli"]
"""lead_engine's rooms from the ground up. A room imports only itself, rooms to its left, and lead_kernels."""


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, name: str, known: set[str]) -> set[str]:
    """The modules among `known` that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write absolute imports"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if module in known else str(node.module))  # the name is a module, or is in one
    return (found & known) - {name}


def graph(*packages: Path) -> dict[str, set[str]]:
    """What each module of the packages imports from them."""
    files = {name: path for package in packages for name, path in modules(package).items()}
    return {name: imports(path, name, set(files)) for name, path in files.items()}


def violations(imported: dict[str, set[str]]) -> list[str]:
    """Circles, imports of a room above, and imports of lead_engine by lead_kernels, in words."""
    found = []
    try:
        graphlib.TopologicalSorter(imported).prepare()
    except graphlib.CycleError as error:
        found.append(f"a circle: {' <- '.join(error.args[1])}")
    for name, others in imported.items():
        for other in others:
            if other.startswith("lead_engine") and name.startswith("lead_kernels"):
                found.append(f"{name} imports {other}")
            below, above = room(other), room(name)
            if below is not None and above is not None and ROOMS.index(below) > ROOMS.index(above):
                found.append(f"{name} imports {other}, a room above")
    return found


def room(name: str) -> str | None:
    """Which room a module is in; None for lead_engine itself, its __main__, and other packages."""
    package, _, inside = name.partition(".")
    first = inside.partition(".")[0]
    return first if package == "lead_engine" and first not in ("", "__main__") else None


def test_imports_go_down_and_never_round(repository: Path) -> None:
    imported = graph(repository / "lead_engine", repository / "kernels" / "lead_kernels")
    assert {room(name) for name in imported} == {*ROOMS, None}, "a room is missing from ROOMS, or has gone"
    assert violations(imported) == []


def test_an_import_of_a_room_above_is_found(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    packages = tmp_path / "lead_engine", tmp_path / "lead_kernels"
    write("lead_engine/cli.py", "from lead_engine import pool\n")
    write("lead_engine/pool/store.py", "from lead_engine.base import files\nimport lead_kernels.ops\n")
    write("lead_engine/pool/__init__.py", "import numpy\n")
    write("lead_engine/base/files.py", "")
    write("lead_engine/base/errors.py", "")
    write("lead_kernels/ops.py", "")
    assert violations(graph(*packages)) == []
    # In a function: upwards, without a circle.
    write("lead_engine/base/errors.py", "def f():\n    import lead_engine.pool.store\n")
    assert violations(graph(*packages)) == ["lead_engine.base.errors imports lead_engine.pool.store, a room above"]
    # For type checking alone: a circle within a room.
    write("lead_engine/base/errors.py", "if TYPE_CHECKING:\n    from lead_engine.base.files import File\n")
    write("lead_engine/base/files.py", "from lead_engine.base.errors import UserError\n")
    (circle,) = violations(graph(*packages))
    assert circle.startswith("a circle: lead_engine.base.")
    write("lead_engine/base/files.py", "")
    write("lead_kernels/ops.py", "import lead_engine.base.errors\n")
    assert violations(graph(*packages)) == ["lead_kernels.ops imports lead_engine.base.errors"]
