"""Every kind of file gives the records that stand in it, and names the line of what cannot be read."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lead_engine.base.errors import UserError
from lead_engine.pool import sources
from lead_engine.pool.records import Message, read_records

GOOD = {"instruction": "Add 1 and 2.", "output": "3"}


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
        pq.write_table(
            pa.Table.from_pylist([{**dict.fromkeys(("messages", "instruction", "output")), **r} for r in rows]), path
        )
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


class TestRepeatedKeys:
    LINE = '{"prompt": "a", "completion": "b", "prompt": "c"}'
    NESTED = '{"messages": [{"role": "user", "content": "a", "content": "c"}, {"role": "assistant", "content": "b"}]}'

    @pytest.mark.parametrize(("line", "key"), [(LINE, "prompt"), (NESTED, "content")])
    def test_spoil_their_record_alone(self, tmp_path: Path, line: str, key: str) -> None:
        good = json.dumps(GOOD)
        (tmp_path / "x.jsonl").write_text(f"{good}\n{line}\n{good}\n")
        (tmp_path / "x.json").write_text(f"[{good},\n{line},\n{good}]")
        for name in ("x.jsonl", "x.json"):
            records, problems = read_records([str(tmp_path / name)], skip_bad=True)
            assert [r.line for r in records] == [1, 3]
            [problem] = problems.entries
            assert (problem.kind, problem.line) == ("broken_line", 2)
            assert f"the key '{key}' stands more than once" in problem.detail


@pytest.mark.parametrize("ending", sources.COMPRESSED)
class TestCompressed:
    LINES = b"".join(json.dumps({**GOOD, "id": i}).encode() + b"\n" for i in range(500))

    def compressed(self, path: Path, data: bytes) -> bytes:
        if path.suffix == ".gz":  # by another hand than the reader's
            path.write_bytes(gzip.compress(data))
        else:
            with pa.CompressedOutputStream(str(path), sources.COMPRESSED[path.suffix]) as stream:
                stream.write(data)
        return path.read_bytes()

    def test_as_if_it_were_not(self, tmp_path: Path, ending: str) -> None:
        path = tmp_path / f"x.jsonl{ending}"
        self.compressed(path, self.LINES + b"{}\n")
        records, problems = read_records([str(path)], skip_bad=True)
        assert [(r.id, r.line) for r in records] == [(str(i), i + 1) for i in range(500)]
        assert str(problems.entries[0]).startswith(f"{path}:501: ")
        self.compressed(path.with_name(f"y.csv{ending}"), b"question,answer\na,b\n")
        records, _ = read_records([str(path.with_name(f"y.csv{ending}"))], skip_bad=False)
        assert records[0].messages == (Message("user", "a"), Message("assistant", "b"))

    @pytest.mark.parametrize(
        "damage", [lambda raw: raw[:-1], lambda raw: raw[: len(raw) // 2], lambda raw: b"no such thing"]
    )
    def test_cut_or_damaged(self, tmp_path: Path, ending: str, damage: Callable[[bytes], bytes]) -> None:
        path = tmp_path / f"x.jsonl{ending}"
        path.write_bytes(damage(self.compressed(path, self.LINES)))
        with pytest.raises(UserError, match=f"x.jsonl{ending}: cannot be read"):
            read_records([str(path)], skip_bad=True)


class TestStandardInput:
    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        sources._standard_input.cache_clear()
        text = "\n".join([json.dumps(GOOD), "", json.dumps({"prompt": "p"}), json.dumps(GOOD)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        yield
        sources._standard_input.cache_clear()

    def test_is_json_lines_and_can_be_read_again(self) -> None:
        for _ in range(2):
            records, problems = read_records(["-"], skip_bad=True)
            assert [(r.id, r.line) for r in records] == [("stdin:1", 1), ("stdin:4", 4)]
            assert str(problems.entries[0]).startswith("standard input:3: ")
        assert Path(sources.content_path("-")).read_bytes().endswith(json.dumps(GOOD).encode())

    def test_belongs_to_rank_0(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(UserError, match="ranks share one"):
            read_records(["-"], skip_bad=True)

    def test_a_terminal_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        with pytest.raises(UserError, match="pipe the records"):
            read_records(["-"], skip_bad=True)


class TestSavedDataSets:
    TURNS = ({"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 1})

    def test_shards_in_their_order(self, tmp_path: Path) -> None:
        rows = [{"messages": list(self.TURNS), "id": str(i)} for i in range(30)]
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set", num_shards=12)
        records, problems = read_records([str(tmp_path / "set")], skip_bad=False)
        assert [r.id for r in records] == [str(i) for i in range(30)]
        assert records[0].messages == (Message("user", "u"), Message("assistant", "a"))
        assert not problems.entries

    def test_splits_have_to_be_named(self, tmp_path: Path) -> None:
        part = datasets.Dataset.from_list([GOOD])
        datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "set")
        with pytest.raises(UserError, match=r"name those to read: .*/set/test, .*/set/train"):
            read_records([str(tmp_path / "set")], skip_bad=False)
        records, _ = read_records([str(tmp_path / "set" / "test")], skip_bad=False)
        assert len(records) == 1

    def test_both_arrow_formats(self, tmp_path: Path) -> None:
        table = pa.Table.from_pylist([GOOD, GOOD])
        for name, new in (("x", pa.ipc.new_file), ("y", pa.ipc.new_stream)):
            with new(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
                writer.write_table(table)
        (tmp_path / "z.arrow").write_bytes(b"neither")
        for name in "xy":
            assert len(read_records([str(tmp_path / f"{name}.arrow")], skip_bad=False)[0]) == 2
        with pytest.raises(UserError, match=r"z\.arrow: not a readable Arrow"):
            read_records([str(tmp_path / "z.arrow")], skip_bad=False)


class TestHub:
    def test_hub_names_need_the_package(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match=r"owner/name.*pip install"):
            read_records(["owner/name"], skip_bad=False)

    def test_hub_names_need_the_network(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def refuse(name: str, config: str | None, split: str) -> Any:
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nand a long story")

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets, "load_dataset", refuse)
        with pytest.raises(UserError, match=r"owner/name: no such file.*Couldn't reach") as error:
            read_records(["owner/name"], skip_bad=False)
        assert "long story" not in str(error.value)

    def test_hub_rows_are_records(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        calls = []

        def load(name: str, config: str | None, split: str) -> Any:
            calls.append((name, config, split))
            return datasets.Dataset.from_list([GOOD, {"output": None}, GOOD])

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets, "load_dataset", load)
        records, problems = read_records(["owner/name"], skip_bad=True)
        assert [(r.file, r.line) for r in records] == [("owner/name", 1), ("owner/name", 3)]
        assert problems.entries[0][:3] == ("not_a_record", "owner/name", 2)
        for name in ("owner/name:main", "owner/name:main:test", "owner/name::train[:9]"):
            assert read_records([name], skip_bad=True)[0][0].id == f"{name.removeprefix('owner/')}:1"
        splits = [(None, "train"), ("main", "train"), ("main", "test"), (None, "train[:9]")]
        assert calls == [("owner/name", *split) for split in splits]

    def test_a_configuration_that_has_to_be_chosen_is_named(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """By `datasets` itself, on a data set of two configurations that lies here."""
        for config in ("easy", "hard"):
            (tmp_path / "set" / config).mkdir(parents=True)
            (tmp_path / "set" / config / "train.jsonl").write_text(json.dumps({**GOOD, "id": config}))
        configs = "".join(f"- config_name: {c}\n  data_files: {c}/train.jsonl\n" for c in ("easy", "hard"))
        (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
        load = datasets.load_dataset

        def from_here(name: str, config: str | None, split: str) -> Any:
            return load(str(tmp_path / "set"), config, split=split, cache_dir=str(tmp_path / "cache"))

        monkeypatch.setattr(datasets, "load_dataset", from_here)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"name: no such file.*'easy', 'hard'.*NAME:CONFIG:SPLIT"):
            read_records(["owner/name"], skip_bad=False)
        with pytest.raises(UserError, match=r'"?no"?.*train'):
            read_records(["owner/name:hard:no"], skip_bad=False)
        assert [r.id for r in read_records(["owner/name:hard"], skip_bad=False)[0]] == ["hard"]
