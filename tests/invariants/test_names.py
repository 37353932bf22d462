"""Nothing of ours may be importable as `kernels`: transformers and others look a Hugging Face package of that name up.

The folder `kernels/` in the repository's root has no __init__.py. Where the root itself is on sys.path (python -c,
python -m in the root), Python therefore sees an empty namespace package there. That is harmless, as the last two tests
show: it is no installed package to transformers, and a real `kernels` anywhere on sys.path wins over it.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest


def python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module", autouse=True)
def _hugging_face_kernels_absent() -> None:
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    pytest.skip(f"the Hugging Face package kernels {version} is installed, so the name is taken as it should be")


def test_kernels_is_not_importable_from_elsewhere(tmp_path: Path) -> None:
    result = python("import kernels", tmp_path)
    assert "ModuleNotFoundError: No module named 'kernels'" in result.stderr


def test_our_packages_are_importable_from_elsewhere(tmp_path: Path) -> None:
    result = python("import lead_engine, lead_kernels; print(lead_engine.__file__, lead_kernels.__file__)", tmp_path)
    assert result.returncode == 0, result.stderr


def test_installed_names_are_ours(tmp_path: Path) -> None:
    code = "import importlib.metadata as m; print(*m.distribution('lead-engine').read_text('top_level.txt').split())"
    result = python(code, tmp_path)
    assert result.stdout.split() == ["lead_engine", "lead_kernels"], result.stderr


def test_the_folder_has_no_module_of_its_own(repository: Path) -> None:
    modules = [path.name for path in (repository / "kernels").glob("*.py")]
    assert modules == []
    result = python("import kernels; print(kernels.__file__)", repository)
    assert result.stdout.strip() == "None", result.stderr


@pytest.mark.slow
def test_transformers_does_not_take_the_folder_for_the_package(repository: Path) -> None:
    code = (
        "from transformers.utils import is_kernels_available; import transformers.integrations.hub_kernels, peft; "
        "print(is_kernels_available())"
    )
    result = python(code, repository)
    assert result.stdout.strip() == "False", result.stderr


def test_a_real_package_wins_over_the_folder(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    result = python("import kernels; print(kernels.__file__)", repository, PYTHONPATH=str(tmp_path))
    assert result.stdout.strip() == str(tmp_path / "kernels" / "__init__.py"), result.stderr
