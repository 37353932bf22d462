"""Every form and file is read as it should be, and everything that cannot be used is named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lead_engine.base.errors import UserError
from lead_engine.pool.problems import Problems
from lead_engine.pool.records import Message, iter_records, read_records

GOOD = {"instruction": "Add 1 and 2.", "output": "3"}


def write_lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def one(tmp_path: Path, record: Any) -> tuple[Message, ...]:
    records, problems = read_records([write_lines(tmp_path / "one.jsonl", [record])], skip_bad=False)
    assert len(records) == 1
    assert not problems.entries
    return records[0].messages


def problem_of(tmp_path: Path, record: Any) -> tuple[str, str]:
    """Kind and detail of a record that stands in line 2 behind a good one."""
    source = write_lines(tmp_path / "bad.jsonl", [{**GOOD, "id": "good"}, record])
    with pytest.raises(UserError, match=r"bad\.jsonl:2") as error:
        read_records([source], skip_bad=False)
    assert "--skip-bad" in str(error.value)
    records, problems = read_records([source], skip_bad=True)
    assert [r.id for r in records] == ["good"]
    [problem] = problems.entries
    assert (problem.file, problem.line) == (source, 2)
    assert problem.kind in str(error.value)
    return problem.kind, problem.detail


class TestForms:
    def test_instruction_with_input(self, tmp_path: Path) -> None:
        record = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
        assert one(tmp_path, record) == (Message("user", "Add.\n\n1 and 2"), Message("assistant", "3"))

    @pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": None}, {"input": " \n"}])
    def test_instruction_without_input(self, tmp_path: Path, extra: dict[str, Any]) -> None:
        assert one(tmp_path, {**GOOD, **extra}) == (Message("user", "Add 1 and 2."), Message("assistant", "3"))

    def test_prompt_and_completion_are_kept_as_they_are(self, tmp_path: Path) -> None:
        record = {"prompt": " 1 + 2 =", "completion": " 3\n"}
        assert one(tmp_path, record) == (Message("user", " 1 + 2 ="), Message("assistant", " 3\n"))

    def test_messages_keep_their_turns_up_to_the_last_answer(self, tmp_path: Path) -> None:
        roles = ["system", "user", "assistant", "user", "assistant", "user"]
        turns = [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles)]
        messages = one(tmp_path, {"messages": turns})
        assert messages == tuple(Message(role, f"text {i}") for i, role in enumerate(roles[:-1]))

    def test_null_fields_are_absent(self, tmp_path: Path) -> None:
        record = {"messages": None, "instruction": None, "prompt": "p", "completion": "c", "id": None, "dataset": None}
        records, _ = read_records([write_lines(tmp_path / "x.jsonl", [record])], skip_bad=False)
        assert records[0].messages == (Message("user", "p"), Message("assistant", "c"))
        assert (records[0].id, records[0].dataset) == ("x.jsonl:1", "")


class TestIdentity:
    def test_given_and_made_ids(self, tmp_path: Path) -> None:
        records = [{**GOOD, "id": "a", "dataset": "d"}, GOOD, *({**GOOD, "id": i} for i in (7, 8.0, 1e20, 1.5))]
        source = write_lines(tmp_path / "x.jsonl", [*records, {**GOOD, "id": float("nan")}])
        read, _ = read_records([source], skip_bad=False)
        assert [r.id for r in read] == ["a", "x.jsonl:2", "7", "8", "100000000000000000000", "1.5", "x.jsonl:7"]
        assert [r.dataset for r in read] == ["d", *[""] * 6]
        assert [(r.file, r.line) for r in read] == [(source, n) for n in range(1, 8)]

    def test_files_of_one_name_in_two_folders_do_not_collide(self, tmp_path: Path) -> None:
        sources = []
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            sources.append(write_lines(tmp_path / folder / "x.jsonl", [GOOD]))
        read, _ = read_records(sources, skip_bad=False)
        assert [r.id for r in read] == [f"{source}:1" for source in sources]

    def test_the_same_file_twice_is_refused(self, tmp_path: Path) -> None:
        source = write_lines(tmp_path / "x.jsonl", [GOOD])
        with pytest.raises(UserError, match=r"--data .*x\.jsonl.*2 times"):
            read_records([source, f"{tmp_path}/../{tmp_path.name}/x.jsonl"], skip_bad=False, flag="--data")

    def test_duplicate_ids_name_both_places(self, tmp_path: Path) -> None:
        kind, detail = problem_of(tmp_path, {**GOOD, "id": "good"})
        assert kind == "duplicate_id"
        assert "bad.jsonl:1" in detail

    def test_duplicate_ids_across_files(self, tmp_path: Path) -> None:
        sources = [write_lines(tmp_path / f"{name}.jsonl", [{**GOOD, "id": "same"}]) for name in "ab"]
        records, problems = read_records(sources, skip_bad=True)
        assert len(records) == 1
        assert problems.counts() == {"duplicate_id": 1}
        assert problems.entries[0].file == sources[1]


BAD = [
    (["a list"], "not_a_record", "list"),
    ("text", "not_a_record", "text"),
    (None, "not_a_record", "null"),
    ({}, "not_a_record", "nothing"),
    ({"topic": "q", "label": "a"}, "not_a_record", "label, topic"),
    ({"output": "a"}, "not_a_record", "has output"),
    ({"instruction": "q"}, "no_response", "'output'"),
    ({"instruction": "q", "output": None}, "no_response", "'output'"),
    ({"instruction": "q", "output": " \n"}, "no_response", "empty"),
    ({"prompt": "q", "completion": ""}, "no_response", "empty"),
    ({"prompt": "q"}, "no_response", "'completion'"),
    ({"instruction": 5, "output": "a"}, "wrong_type", "'instruction' must be text, found a number"),
    ({"instruction": "q", "output": ["a"]}, "wrong_type", "'output' must be text, found a list"),
    ({"instruction": "q", "input": {"a": 1}, "output": "a"}, "wrong_type", "'input' must be text, found an object"),
    ({**GOOD, "id": [1]}, "wrong_type", "'id'"),
    ({**GOOD, "id": True}, "wrong_type", "'id'"),
    ({**GOOD, "dataset": 3}, "wrong_type", "'dataset'"),
    ({"messages": "hello"}, "wrong_type", "'messages' must be a list"),
    ({"messages": ["hello"]}, "wrong_type", "message 1"),
    ({"messages": [{"role": "user"}]}, "wrong_type", "message 1"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "wrong_type", "content of message 1"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown_role", "'narrator'"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown_role", "['user']"),
    ({"messages": []}, "no_response", "assistant"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no_response", "assistant"),
    (
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": ""},
                {"role": "assistant", "content": "y"},
            ]
        },
        "no_response",
        "message 2 of 3",
    ),
    ({"instruction": "q", "output": "\ud800"}, "bad_utf8", "surrogate"),
]


@pytest.mark.parametrize(("record", "kind", "detail"), BAD)
def test_bad_records_are_named(tmp_path: Path, record: Any, kind: str, detail: str) -> None:
    found_kind, found_detail = problem_of(tmp_path, record)
    assert found_kind == kind
    assert detail in found_detail


class TestSources:
    @pytest.mark.parametrize("name", ["missing.jsonl", "dir/missing.json", "/nowhere/at/all/x"])
    def test_missing_file(self, name: str) -> None:
        with pytest.raises(UserError, match=f"{name}: no such file"):
            read_records([name], skip_bad=True)

    def test_nothing_usable(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="empty"):
            read_records([write_lines(tmp_path / "x.jsonl", [])], skip_bad=True)
        with pytest.raises(UserError, match="not_a_record 2"):
            read_records([write_lines(tmp_path / "x.jsonl", [{}, {}])], skip_bad=True)
        with pytest.raises(UserError, match="--pool"):
            read_records([], skip_bad=True)


class TestProblems:
    def test_at_most_five_of_each_kind_are_shown(self, tmp_path: Path) -> None:
        source = write_lines(tmp_path / "x.jsonl", [GOOD] + [{}] * 8 + [{"prompt": "p"}] * 2)
        with pytest.raises(UserError) as error:
            read_records([source], skip_bad=False)
        text = str(error.value)
        assert text.startswith("10 record(s)")
        assert text.count("not_a_record: " + source) == 5
        assert "and 3 more" in text
        assert text.count("no_response: " + source) == 2

    def test_every_record_is_either_read_or_a_problem(self, tmp_path: Path) -> None:
        values = [bad for bad, _, _ in BAD] + [GOOD] * 5
        records, problems = read_records([write_lines(tmp_path / "x.jsonl", values)], skip_bad=True)
        assert sorted([r.line for r in records] + [p.line for p in problems.entries]) == list(range(1, len(values) + 1))

    def test_counted_kinds_refuse_nothing(self) -> None:
        problems = Problems()
        problems.add("truncated", "x.jsonl", 1, "long")
        problems.add("response_truncated_away", "x.jsonl", 2, "long")
        problems.refuse()
        problems.add("no_response", "x.jsonl", 3, "empty")
        with pytest.raises(UserError, match=r"^1 record"):
            problems.refuse()

    def test_written_as_json_lines(self, tmp_path: Path) -> None:
        problems = Problems()
        problems.add("truncated", "ä.jsonl", 1, "long")
        problems.write(tmp_path / "problems.jsonl")
        [line] = (tmp_path / "problems.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(line) == {"kind": "truncated", "file": "ä.jsonl", "line": 1, "detail": "long"}
        assert [p.name for p in tmp_path.iterdir()] == ["problems.jsonl"]

    def test_iter_records_streams(self, tmp_path: Path) -> None:
        source = write_lines(tmp_path / "x.jsonl", [GOOD, {}, GOOD])
        problems = Problems()
        records = iter_records([source], problems, skip_bad=False)
        assert next(records).line == 1
        assert next(records).line == 3
        with pytest.raises(UserError, match=r"x\.jsonl:2"):
            next(records)
