"""Every form and file is read as it should be, and everything that cannot be used is named with its place."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lead_engine.errors import UserError
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

    def test_messages_come_before_the_other_forms(self, tmp_path: Path) -> None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert one(tmp_path, {"prompt": "p", "messages": turns}) == (Message("user", "a"), Message("assistant", "b"))


class TestIdentity:
    def test_given_and_made_ids(self, tmp_path: Path) -> None:
        records = [{**GOOD, "id": "a", "dataset": "d"}, GOOD, {**GOOD, "id": 7}]
        source = write_lines(tmp_path / "x.jsonl", records)
        read, _ = read_records([source], skip_bad=False)
        assert [r.id for r in read] == ["a", "x.jsonl:2", "7"]
        assert [r.dataset for r in read] == ["d", "", ""]
        assert [(r.file, r.line) for r in read] == [(source, 1), (source, 2), (source, 3)]

    def test_files_of_one_name_in_two_folders_do_not_collide(self, tmp_path: Path) -> None:
        sources = []
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            sources.append(write_lines(tmp_path / folder / "x.jsonl", [GOOD]))
        read, _ = read_records(sources, skip_bad=False)
        assert [r.id for r in read] == [f"{source}:1" for source in sources]

    def test_the_same_file_twice_is_refused(self, tmp_path: Path) -> None:
        source = write_lines(tmp_path / "x.jsonl", [GOOD])
        with pytest.raises(UserError, match=r"x\.jsonl.*2 times"):
            read_records([source, str(tmp_path / "." / "sub" / ".." / "x.jsonl")], skip_bad=False)

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
    ({"question": "q", "answer": "a"}, "not_a_record", "answer, question"),
    ({"instruction": "q"}, "no_response", "'output'"),
    ({"instruction": "q", "output": None}, "no_response", "'output'"),
    ({"instruction": "q", "output": " \n"}, "no_response", "empty"),
    ({"prompt": "q", "completion": ""}, "no_response", "empty"),
    ({"prompt": "q"}, "no_response", "'completion'"),
    ({"instruction": 5, "output": "a"}, "wrong_type", "'instruction' must be text, found a number"),
    ({"instruction": "q", "output": ["a"]}, "wrong_type", "'output' must be text, found a list"),
    ({"instruction": "q", "input": {}, "output": "a"}, "wrong_type", "'input' must be text, found an object"),
    ({**GOOD, "id": [1]}, "wrong_type", "'id'"),
    ({**GOOD, "id": True}, "wrong_type", "'id'"),
    ({**GOOD, "dataset": 3}, "wrong_type", "'dataset'"),
    ({"messages": "hello"}, "wrong_type", "'messages' must be a list"),
    ({"messages": ["hello"]}, "wrong_type", "message 1"),
    ({"messages": [{"role": "user"}]}, "wrong_type", "message 1"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "wrong_type", "content of message 1"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "unknown_role", "'tool'"),
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


class TestJsonLines:
    def test_byte_order_mark_crlf_and_blank_lines(self, tmp_path: Path) -> None:
        line = json.dumps(GOOD).encode()
        path = tmp_path / "x.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n   \n" + line + b"\n\n" + line)
        records, problems = read_records([str(path)], skip_bad=False)
        assert [r.line for r in records] == [1, 4, 6]
        assert not problems.entries

    def test_line_separators_within_text_do_not_split_lines(self, tmp_path: Path) -> None:
        text = "a\u2028b\u0085c"
        path = tmp_path / "x.jsonl"
        path.write_text(json.dumps({"prompt": "p", "completion": text}, ensure_ascii=False), encoding="utf-8")
        records, _ = read_records([str(path)], skip_bad=False)
        assert records[0].messages[1].content == text

    def test_bytes_that_are_not_utf8_spoil_only_their_line(self, tmp_path: Path) -> None:
        path = tmp_path / "x.jsonl"
        good = json.dumps(GOOD).encode()
        path.write_bytes(good + b'\n{"prompt": "caf\xe9", "completion": "c"}\n' + good + b"\n")
        with pytest.raises(UserError, match=r"x\.jsonl:2"):
            read_records([str(path)], skip_bad=False)
        records, problems = read_records([str(path)], skip_bad=True)
        assert [r.line for r in records] == [1, 3]
        assert problems.entries[0][:3] == ("bad_utf8", str(path), 2)
        assert "byte 16" in problems.entries[0].detail

    @pytest.mark.parametrize("line", ['{"prompt": "p"', "not json", "[" * 100_000, '{"id": ' + "9" * 5000 + "}"])
    def test_broken_lines(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "x.jsonl"
        path.write_text(json.dumps(GOOD) + "\n" + line + "\n", encoding="utf-8")
        records, problems = read_records([str(path)], skip_bad=True)
        assert len(records) == 1
        assert problems.entries[0][:3] == ("broken_line", str(path), 2)


class TestJson:
    @pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"data": x, "version": 1}])
    def test_list_and_data(self, tmp_path: Path, wrap: Any) -> None:
        path = tmp_path / "x.json"
        path.write_text("\ufeff" + json.dumps(wrap([GOOD, GOOD]), indent=1), encoding="utf-8")
        records, _ = read_records([str(path)], skip_bad=False)
        assert [(r.id, r.line) for r in records] == [("x.json:1", 1), ("x.json:2", 2)]

    def test_bad_records_are_named_by_their_number(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_text(json.dumps([GOOD] * 16 + [{}]), encoding="utf-8")
        with pytest.raises(UserError, match=r"x\.json: record 17"):
            read_records([str(path)], skip_bad=False)

    def test_lines_under_the_name_json(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD) + "\n", encoding="utf-8")
        records, _ = read_records([str(path)], skip_bad=False)
        assert [r.line for r in records] == [1, 2]

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            (b'[\n{"a": 1},\n{"b"}]', r"x\.json:3"),
            (b'[\n"caf\xe9"]', r"x\.json:2.*UTF-8"),
            (b"3", "list of records"),
            (b'{"instruction": "q", "output": "a"}', "list of records"),
            (b"", r"x\.json:1"),
        ],
    )
    def test_unreadable(self, tmp_path: Path, text: bytes, match: str) -> None:
        path = tmp_path / "x.json"
        path.write_bytes(text)
        with pytest.raises(UserError, match=match):
            read_records([str(path)], skip_bad=True)


class TestParquet:
    def test_forms_mix_through_nulls(self, tmp_path: Path) -> None:
        turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
        rows = [{"messages": turns, "id": "one"}, {"instruction": "q", "output": "a", "id": "two"}]
        path = tmp_path / "x.parquet"
        pq.write_table(pa.Table.from_pylist([{**dict.fromkeys(("messages", "instruction", "output")), **r} for r in rows]), path)
        records, _ = read_records([str(path)], skip_bad=False)
        assert records[0].messages == (Message("user", "u"), Message("assistant", "a"))
        assert records[1].messages == (Message("user", "q"), Message("assistant", "a"))

    def test_many_row_groups_are_numbered_through(self, tmp_path: Path) -> None:
        path = tmp_path / "x.parquet"
        pq.write_table(pa.Table.from_pylist([GOOD] * 3000), path, row_group_size=700)
        records, _ = read_records([str(path)], skip_bad=False)
        assert [r.line for r in records] == list(range(1, 3001))

    def test_text_that_is_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "x.parquet"
        text = pa.array([b"fine", b"caf\xe9", b"fine"]).cast(pa.binary()).view(pa.string())
        pq.write_table(pa.table({"prompt": text, "completion": ["a"] * 3}), path)
        records, problems = read_records([str(path)], skip_bad=True)
        assert [r.line for r in records] == [1, 3]
        assert problems.entries[0][:3] == ("bad_utf8", str(path), 2)

    def test_damaged_file(self, tmp_path: Path) -> None:
        path = tmp_path / "x.parquet"
        path.write_bytes(b"PAR1 this is no Parquet file PAR1")
        with pytest.raises(UserError, match=r"x\.parquet.*Parquet"):
            read_records([str(path)], skip_bad=True)


class TestSources:
    @pytest.mark.parametrize("name", ["missing.jsonl", "dir/missing.json", "/nowhere/at/all/x"])
    def test_missing_file(self, name: str) -> None:
        with pytest.raises(UserError, match=f"{name}: no such file"):
            read_records([name], skip_bad=True)

    def test_folder_and_unknown_suffix(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="folder"):
            read_records([str(tmp_path)], skip_bad=True)
        (tmp_path / "x.csv").write_text("a,b\n")
        with pytest.raises(UserError, match=r"x\.csv.*\.jsonl"):
            read_records([str(tmp_path / "x.csv")], skip_bad=True)

    def test_nothing_usable(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="empty"):
            read_records([write_lines(tmp_path / "x.jsonl", [])], skip_bad=True)
        with pytest.raises(UserError, match="not_a_record 2"):
            read_records([write_lines(tmp_path / "x.jsonl", [{}, {}])], skip_bad=True)
        with pytest.raises(UserError, match="--pool"):
            read_records([], skip_bad=True)

    def test_hub_names_need_the_package(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match=r"owner/name.*pip install"):
            read_records(["owner/name"], skip_bad=False)

    def test_hub_names_need_the_network(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def refuse(name: str, split: str) -> Any:
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nand a long story")

        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=refuse))
        with pytest.raises(UserError, match=r"owner/name: no such file.*Couldn't reach") as error:
            read_records(["owner/name"], skip_bad=False)
        assert "long story" not in str(error.value)

    def test_hub_rows_are_records(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        calls = []

        def load(name: str, split: str) -> Any:
            calls.append((name, split))
            return [GOOD, {}, GOOD]

        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
        records, problems = read_records(["owner/name"], skip_bad=True)
        assert calls == [("owner/name", "train")]
        assert [(r.file, r.line) for r in records] == [("owner/name", 1), ("owner/name", 3)]
        assert problems.entries[0][:3] == ("not_a_record", "owner/name", 2)


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
