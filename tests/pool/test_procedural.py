"""The made-up pool is what its documentation says: same bytes, stated shares, right answers, nothing held out leaks."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lead_engine.base.errors import UserError
from lead_engine.pool.procedural import make_pool
from lead_engine.pool.procedural.numbers import UNITS, column_sum
from lead_engine.pool.procedural.tasks import TASKS
from lead_engine.pool.procedural.world import make_world
from lead_engine.pool.records import read_records

FILES = ("pool.jsonl", "heldout.jsonl", "text.txt")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made-up")
    make_pool(path, seed=3)
    return path


@pytest.fixture(scope="module")
def pool(out: Path) -> list[dict[str, Any]]:
    return read(out / "pool.jsonl")


@pytest.fixture(scope="module")
def heldout(out: Path) -> list[dict[str, Any]]:
    return read(out / "heldout.jsonl")


def test_same_seed_same_bytes(out: Path, tmp_path: Path) -> None:
    make_pool(tmp_path / "again", seed=3)
    make_pool(tmp_path / "other", seed=4)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (out / name).read_bytes()
    assert {p.name for p in out.iterdir()} == set(FILES)


def test_other_contents_are_not_written_over(tmp_path: Path) -> None:
    options = {"samples": 100, "heldout": 10, "text_kib": 1}
    make_pool(tmp_path, **options)
    (tmp_path / "text.txt").unlink()  # of a call that was killed: the same one makes up for it
    make_pool(tmp_path, **options)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    with pytest.raises(UserError, match=r"pool\.jsonl: is there with other contents.*name another folder for --out"):
        make_pool(tmp_path, **options | {"samples": 120})
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before


def test_more_samples_leave_the_held_out_ones_as_they_are(out: Path, tmp_path: Path) -> None:
    make_pool(tmp_path, seed=3, samples=1000)
    assert (tmp_path / "heldout.jsonl").read_bytes() == (out / "heldout.jsonl").read_bytes()


def test_sizes_and_shares(out: Path, pool: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> None:
    assert (len(pool), len(heldout)) == (4000, 400)
    assert 300e3 < (out / "text.txt").stat().st_size < 600e3
    notes = Counter(r["note"] for r in pool)
    assert notes == {"": 3080, "wrong_answer": 320, "near_duplicate": 600}
    assert {r["note"] for r in heldout} == {""}
    assert 0.06 < sum(r["level"] == 0 for r in pool) / len(pool) < 0.10
    for records in (pool, heldout):
        places = Counter((r["dataset"], r["level"]) for r in records)
        assert set(places) == {(task, level) for task in TASKS for level in range(4)}
        counts = Counter(r["dataset"] for r in records)
        assert max(counts.values()) < 1.3 * min(counts.values())


def test_records_are_read_without_problems(out: Path) -> None:
    records, problems = read_records([str(out / "pool.jsonl"), str(out / "heldout.jsonl")], skip_bad=False)
    assert len(records) == 4400
    assert {p.detail.split("'")[1] for p in problems.entries} == {"level", "note"}  # what a test of selection reads
    assert {r.dataset for r in records} == set(TASKS)


def normal(record: dict[str, Any]) -> str:
    """The question without what the near-duplicates change."""
    text = (record["instruction"] + " | " + record["input"]).lower()
    return re.sub(r"^(please |question: |hello! )| thank you\.|[ .?!|]", "", text)


def test_nothing_held_out_is_in_the_pool(pool: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> None:
    prompts = [(r["instruction"], r["input"]) for r in pool]
    assert len(set(prompts)) == len(prompts)
    assert not {normal(r) for r in pool} & {normal(r) for r in heldout}
    # The same numbers to be added, in whatever wording and order.
    sums = [
        {tuple(sorted(re.findall(r"\d+", r["instruction"] + r["input"]))) for r in records if asks_for_sum(r)}
        for records in (pool, heldout)
    ]
    assert sums[0]
    assert sums[1]
    assert not sums[0] & sums[1]


def asks_for_sum(record: dict[str, Any]) -> bool:
    text = record["instruction"] + record["input"]
    return record["dataset"] == "arithmetic" and bool(re.search(r"\d (\+|plus|and) \d", text))


def test_near_duplicates_have_an_original_with_the_same_answer(pool: list[dict[str, Any]]) -> None:
    originals = {(r["dataset"], normal(r)): r["output"] for r in pool if r["note"] == ""}
    copies = [r for r in pool if r["note"] == "near_duplicate"]
    assert all(originals[r["dataset"], normal(r)] == r["output"] for r in copies)


def expected(record: dict[str, Any]) -> str | None:
    """The right answer to the questions that can be recognised by simple means, from the question alone."""
    text, level = record["instruction"] + " " + record["input"], record["level"]
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    if record["dataset"] == "arithmetic" and level in (1, 2):
        return str(sum(numbers)) if asks_for_sum(record) else str(abs(numbers[0] - numbers[1]))
    if record["dataset"] == "arithmetic" and level == 3:
        return column_sum(*numbers, sum(numbers))
    if record["dataset"] == "sequences" and level > 0:
        if "largest" in text or "smallest" in text:
            return str(max(numbers) if "largest" in text else min(numbers))
        return str(2 * numbers[-1] - numbers[-2])
    if record["dataset"] == "units" and level in (1, 2):
        large = next(unit for unit in UNITS if re.search(rf"\d {unit}", text))
        return f"{numbers[0] * UNITS[large][1]} {UNITS[large][0]}"
    if record["dataset"] == "sorting" and level > 0:
        items = re.split(r", ", (record["input"] or record["instruction"].split(": ")[1]).rstrip("."))
        return ", ".join(sorted(items, key=int) if items[0].isdigit() else sorted(items))
    return None


@pytest.mark.parametrize("name", ["pool.jsonl", "heldout.jsonl"])
def test_answers_are_right_except_the_wrong_ones(out: Path, name: str) -> None:
    checked = Counter()
    for record in read(out / name):
        answer = expected(record) if record["note"] != "near_duplicate" else None
        if answer is not None:
            checked[record["dataset"], record["note"]] += 1
            assert (answer == record["output"]) == (record["note"] == ""), record
    for task in ("arithmetic", "sequences", "units", "sorting"):
        assert checked[task, ""] > 20
        assert name == "heldout.jsonl" or checked[task, "wrong_answer"] > 5


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("level", range(4))
def test_wrong_answers_are_wrong(task: str, level: int) -> None:
    world, rng = make_world(random.Random(1), 90), random.Random(2)
    for _ in range(300):
        question = TASKS[task](rng, world, level)
        assert question.wrong != question.output
        assert question.output.strip() == question.output != ""
        assert question.wrong.strip()
        assert "{" not in question.instruction + question.input


def test_facts_are_those_of_the_text(out: Path, heldout: list[dict[str, Any]]) -> None:
    """A fact that is asked for stands in every paragraph about the person."""
    text = (out / "text.txt").read_text(encoding="utf-8")
    paragraphs = text.splitlines()
    asked = [r for r in heldout if r["dataset"] == "facts" and r["level"] == 1]
    assert len(asked) > 10
    for record in asked:
        name = re.findall(r"\b[A-Z][a-z]{4}\b", record["instruction"])[-1]
        about = [p for p in paragraphs if p.count(name) >= 4 and "Question:" not in p]
        assert len(about) >= 6
        assert all(record["output"] in p for p in about)


def test_what_held_out_questions_ask_is_no_example_in_the_text(out: Path, heldout: list[dict[str, Any]]) -> None:
    text = (out / "text.txt").read_text(encoding="utf-8")
    assert text.count("Question: ") > 1000
    for record in heldout:
        question = f"Question: {record['instruction']} {record['input']} Answer:".replace("  ", " ")
        assert question not in text
        if record["dataset"] == "sorting":
            assert f": {record['output']}." not in text
        if record["dataset"] == "units":
            assert f" {record['output']} make" not in text
        if asks_for_sum(record):
            a, b = re.findall(r"\d+", record["instruction"] + record["input"])
            for x, y in ((a, b), (b, a)):
                # Sums of single digits are steps of longer sums.
                assert f" {x} + {y} =" not in text or len(x) == len(y) == 1
                assert f" {x} and {y} together" not in text


def test_column_sum() -> None:
    assert column_sum(348, 275, 623) == "8 + 5 = 13, 4 + 7 + 1 = 12, 3 + 2 + 1 = 6. The sum is 623."


@pytest.mark.slow
def test_other_sizes(tmp_path: Path) -> None:
    make_pool(tmp_path / "small", samples=10, heldout=3, text_kib=1)
    assert len(read(tmp_path / "small" / "pool.jsonl")) == 10
    make_pool(tmp_path / "large", samples=20_000, text_kib=1)
    assert len(read(tmp_path / "large" / "pool.jsonl")) == 20_000
    with pytest.raises(UserError, match="--samples"):
        make_pool(tmp_path / "huge", samples=200_000, text_kib=1)
