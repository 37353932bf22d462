"""The documentation keeps its promises: sizes, links, files, options and the picture are as the repository has them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from lead_engine import config
from lead_engine.config import method_names
from lead_engine.config.methods import options_of

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


FOREIGN = {
    *("--config", "--help", "--help-all", "--version"),  # of every command
    *("--fast", "--fresh", "--part"),  # of scripts
    *("--nproc-per-node", "--max-restarts", "--nodes", "--time", "--signal", "--requeue"),  # of torchrun, of Slurm
    *("--middle", "--middle.quantile"),  # of the method that METHODS.md adds
    *("--strict", "--no-build-isolation"),  # of mypy, of pip
}
"""Options that are no field of a config."""


def flags(cls: type, prefix: str = "--") -> Iterator[str]:
    """Every option of a config, as the command line spells it."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            yield from flags(hints[field.name], name + ".")
        else:
            yield name


def all_flags() -> set[str]:
    commands = [value for name, value in vars(config).items() if name.endswith("Config")]
    own = {flag for name in method_names() for flag in flags(options_of(name), f"--{name}.")}
    return own | {flag for command in commands for flag in flags(command)}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in PAST], ids=lambda page: page.name)
def test_options_that_it_names_exist(page: Path) -> None:
    """`--lora.*` stands for a group."""
    known, unknown = all_flags() | FOREIGN, set()
    for name in re.findall(r"(?<![\w-])--[a-z][\w.*-]*[\w*]", page.read_text(encoding="utf-8")):
        start = name.removesuffix("*")
        if not (name in known or (start != name and any(flag.startswith(start) for flag in known))):
            unknown.add(name)
    assert unknown == set()


def test_the_table_of_leads_options_names_fields() -> None:
    text = (ROOT / "docs" / "METHODS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[a-z].*?) \|", text.split("## LEAD's options")[1], flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    fields = {flag.removeprefix("--").rpartition(".")[2].replace("-", "_") for flag in all_flags()}
    assert len(names) > 8
    assert [name for name in names if name not in fields] == []


def test_the_picture_is_what_its_source_draws(tmp_path: Path) -> None:
    """By its texts, which the file has as comments; lines and letters may differ with matplotlib's version."""
    drawn = tmp_path / "round.svg"
    subprocess.run([sys.executable, ROOT / "docs" / "figures" / "round.py", drawn], check=True)
    texts = [
        re.findall(r"<!-- (.*?) -->", path.read_text()) for path in (drawn, ROOT / "docs" / "figures" / "round.svg")
    ]
    assert texts[0] == texts[1]
    assert "Bandit" in texts[0]
