"""The documentation keeps its promises: sizes, links, files, options and the picture are as the repository has them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
LONGEST = 120
PAST = {"LOG.md", "CHANGELOG.md"}
"""Pages about what was: files and options that they name may be gone."""


def prose(page: Path) -> str:
    """The page without its fenced code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_fits_its_door() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 1300
    assert max(map(len, text.splitlines())) <= LONGEST
    for command in ("scripts/quickstart.sh", "scripts/test.sh"):
        assert command in text
        assert (ROOT / command).stat().st_mode & 0o100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short(page: Path) -> None:
    """A row of a table cannot be broken."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [n for n, line in enumerate(lines, 1) if len(line) > LONGEST and not line.startswith("|")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [
        page.name for page in ROOT.glob("docs/*.md") if f"({page.name}" not in index and page.name != "README.md"
    ] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in PAST], ids=lambda page: page.name)
def test_files_that_it_names_are_there(page: Path) -> None:
    """Paths in code marks that begin with a folder of the repository, and tests named from tests/ on."""
    tops = ("bench", "docs", "kernels", "lead_engine", "scripts", "tests")
    missing = []
    for name in re.findall(r"`([\w.-]+(?:/[\w.-]+)+/?)`", prose(page)):
        where = [ROOT / name, ROOT / "kernels" / name, ROOT / "tests" / name]
        ours = name.startswith(tuple(f"{top}/" for top in tops)) or re.search(r"/test_\w+\.py$", name)
        if ours and not any(path.exists() for path in where):
            missing.append(name)
    tests = {path.name for path in ROOT.glob("tests/**/test_*.py")}
    assert missing + [name for name in re.findall(r"`(test_\w+\.py)`", prose(page)) if name not in tests] == []


def test_the_picture_is_what_its_source_draws(tmp_path: Path) -> None:
    """By its texts, which the file has as comments; lines and letters may differ with matplotlib's version."""
    drawn = tmp_path / "round.svg"
    subprocess.run([sys.executable, ROOT / "docs" / "figures" / "round.py", drawn], check=True)
    texts = [
        re.findall(r"<!-- (.*?) -->", path.read_text()) for path in (drawn, ROOT / "docs" / "figures" / "round.svg")
    ]
    assert texts[0] == texts[1]
    assert "Bandit" in texts[0]
