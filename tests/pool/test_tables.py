"""Tables of text (CSV, TSV): cells as they were written, and every bad row named by the line where it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lead_engine.base.errors import UserError
from lead_engine.pool.records import read_records


class TestTables:
    def read(self, path: Path, content: str | bytes) -> tuple[list[tuple[int, str, str]], list[tuple[str, int, str]]]:
        """(line, question, answer) of every record and (kind, line, detail) of every problem."""
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        records, problems = read_records([str(path)], skip_bad=True)
        found = [(r.line, r.messages[-2].content, r.messages[-1].content) for r in records]
        return found, [(p.kind, p.line, p.detail) for p in problems.entries]

    def test_line_breaks_within_cells_and_the_line_where_a_record_starts(self, tmp_path: Path) -> None:
        text = '\ufeffinstruction,output\r\n"a\nb, ""c""",d\r\n\r\n"e\n\nf",g\r\nh,i'
        found, problems = self.read(tmp_path / "x.csv", text)
        assert found == [(2, 'a\nb, "c"', "d"), (5, "e\n\nf", "g"), (8, "h", "i")]
        assert not problems

    def test_tabs(self, tmp_path: Path) -> None:
        found, _ = self.read(tmp_path / "x.tsv", 'prompt\tresponse\nHe said "a", then b\t"c\td"\n')
        assert found == [(2, 'He said "a", then b', "c\td")]

    def test_empty_cells_and_missing_columns_are_absent(self, tmp_path: Path) -> None:
        text = "id,input,instruction,output,system\n,,q,a,\n7,x,q,a\n8,,q,,\n9,,q\n"
        (tmp_path / "x.csv").write_text(text)
        records, problems = read_records([str(tmp_path / "x.csv")], skip_bad=True)
        assert [(r.id, r.messages[0].content, len(r.messages)) for r in records] == [
            ("x.csv:2", "q", 2),
            ("7", "q\n\nx", 2),
        ]
        assert [(p.kind, p.line) for p in problems.entries] == [("no_response", 4), ("no_response", 5)]

    def test_bad_rows_are_named_by_the_line_where_they_start(self, tmp_path: Path) -> None:
        text = b'instruction,output\na,b\n"a\ncaf\xe9",b\na,b,c\n"a"x,b\na,b\n"never\nclosed,b\na,b\n'
        found, problems = self.read(tmp_path / "x.csv", text)
        assert [line for line, *_ in found] == [2, 7]
        kinds = [("bad_utf8", 3), ("broken_line", 5), ("broken_line", 6), ("broken_line", 8)]
        assert [problem[:2] for problem in problems] == kinds
        assert "in line 4" in problems[0][2]
        assert "3 cells under 2 columns" in problems[1][2]
        assert "lines 8 to 10 are left out" in problems[3][2]
        with pytest.raises(UserError, match=r"x\.csv:5: 3 cells"):
            read_records([str(tmp_path / "x.csv")], skip_bad=False)

    def test_cells_of_any_length_and_lists_as_json_text(self, tmp_path: Path) -> None:
        turns = [{"role": "user", "content": "a" * 200_000}, {"role": "assistant", "content": 'b "c"\n'}]
        cell = json.dumps(turns).replace('"', '""')
        found, _ = self.read(tmp_path / "x.csv", f'messages,weight\n"{cell}",1\n')
        assert found == [(2, "a" * 200_000, 'b "c"\n')]

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            (b"instruction;output\na;b\n", r"x\.csv:1: one column.*';'"),
            (b"a,output,a\n1,2,3\n", r"x\.csv:1: two columns have the name 'a'"),
            (b"caf\xe9,output\n1,2\n", r"x\.csv:1: not UTF-8"),
            (b"\xff\xfei\0n\0,\0o\0\n\0", r"x\.csv:1: not UTF-8"),
            (b'"a\n', r"x\.csv:1: .*column names"),
            (b"", "empty"),
            (b"instruction,output\n", "empty"),
        ],
    )
    def test_files_that_are_no_table(self, tmp_path: Path, text: bytes, match: str) -> None:
        (tmp_path / "x.csv").write_bytes(text)
        with pytest.raises(UserError, match=match):
            read_records([str(tmp_path / "x.csv")], skip_bad=True)
