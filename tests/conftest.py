"""Fixtures that all tests share: where things lie, and the real command line as a subprocess."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before torch is imported anywhere: tests are small, and several processes on few cores slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before triton is imported: where there is no GPU (torch, which would know, is not to be imported yet), its kernels run
# in its interpreter.
if shutil.which("nvidia-smi") is None and shutil.which("rocm-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "fixtures"))  # not tests/ itself: its folders have the packages' names
pytest_plugins = ["pools", "ranks"]
REAL_DATA = ROOT.parent / "shared" / "data"

RunCli = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: several workers then end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real instruction data beside the repository; the test is skipped where there is none."""
    if not (REAL_DATA / "pool.jsonl").exists():
        pytest.skip(f"real data is not there: {REAL_DATA / 'pool.jsonl'}")
    return REAL_DATA


@pytest.fixture(scope="session")
def run_cli() -> RunCli:
    """run_cli("train", "--pool", ..., cwd=...) -> CompletedProcess of `python -m lead_engine train --pool ...`."""

    def run(
        *arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lead_engine", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "COLUMNS": "120", **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
