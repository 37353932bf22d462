"""What users install: a wheel built from the sources, alone in an environment of its own, works and holds what it must.

The dependencies are not downloaded: the environment sees those of the tests' own, by a .pth file. So the first test
shows that the wheel needs nothing of the checkout, and the last that what the packages import is declared.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PACKAGES = {"lead_engine": "lead_engine", "lead_kernels": "kernels/lead_kernels"}
"""Import name -> folder in the repository."""


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the sources as they are now, built in a copy: setuptools writes beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, sources)
    for name in ("lead_engine", "kernels", "tests"):
        shutil.copytree(repository / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*build, "--no-build-isolation", "-w", folder, sources], check=True)
    [built] = folder.glob("*.whl")
    return built


def test_installed_alone_it_runs_doctor(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "--no-index", "--no-deps", wheel], check=True)
    [own] = venv.glob("lib/python*/site-packages")
    # Not `site.addsitedir`: .pth files there, such as that of an editable installation, must not count.
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [venv / "bin" / command[0], *command[1:]], cwd=tmp_path, env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    report = run("lead-engine", "doctor")
    assert "passed" in report
    assert "FAILED" not in report
    where = run("python", "-c", "import lead_engine, lead_kernels; print(lead_engine.__file__, lead_kernels.__file__)")
    assert [Path(place).is_relative_to(own) for place in where.split()] == [True, True], where


def test_it_holds_both_packages_and_nothing_else(wheel: Path, repository: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    wanted = set()
    for name, folder in PACKAGES.items():
        root = repository / folder
        files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        wanted |= {f"{name}/{path.relative_to(root).as_posix()}" for path in files}
    assert held == wanted  # data files too; no tests, and nothing importable as `kernels`
    assert {"lead_engine/py.typed", "lead_kernels/py.typed"} <= held


def imported_at_once(tree: ast.Module) -> Iterator[str]:
    """Top names of the modules that importing this one imports: not those of functions, `try` or TYPE_CHECKING."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


def test_every_import_is_declared(wheel: Path, repository: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    lines = [line.removeprefix("Requires-Dist: ") for line in text.splitlines() if line.startswith("Requires-Dist: ")]
    declared = {normal(re.split(r"[^\w.-]", line)[0]) for line in lines if "extra ==" not in line}
    providers = importlib.metadata.packages_distributions()
    missing = []
    for folder in PACKAGES.values():
        for path in sorted((repository / folder).rglob("*.py")):
            for name in set(imported_at_once(ast.parse(path.read_text(encoding="utf-8")))):
                known = name in sys.stdlib_module_names or name in PACKAGES
                if not known and not {normal(each) for each in providers.get(name, [name])} & declared:
                    missing.append(f"{path.relative_to(repository)}: {name}")
    assert missing == []


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
