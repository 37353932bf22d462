"""Files, folders, patterns and hub names stand for the files that they should; nothing is passed over unsaid."""

from __future__ import annotations

from pathlib import Path

import pytest

from lead_engine.base.errors import UserError
from lead_engine.pool.sources import HubName, expand, has_lines, hub_name, kind


def touch(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [str(folder / name) for name in names]


class TestExpand:
    def test_a_folder_stands_for_its_known_files_in_order(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = touch(tmp_path, "a.JSONL", "b.csv.gz", "c.parquet", "d.tsv", "e.ndjson.zst", "f.json")
        other = touch(tmp_path, "README.md", "sub/x.jsonl", "z.parquet.gz")
        touch(tmp_path, ".hidden.jsonl")
        for _ in range(2):
            assert expand([str(tmp_path)], "--pool") == files
        unread = ", ".join([other[0], str(tmp_path / "sub"), other[2]])
        assert capsys.readouterr().err == f"warning: --pool: not read, being of no known kind: {unread}\n"

    def test_a_pattern_stands_for_what_it_matches(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        touch(tmp_path, "a.jsonl", "b.jsonl", "b.txt", "sub/c.jsonl")
        assert expand([f"{tmp_path}/*.jsonl"], "--pool") == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
        assert len(expand([f"{tmp_path}/**/*.jsonl"], "--pool")) == 3
        assert expand([f"{tmp_path}/b*"], "--pool") == [str(tmp_path / "b.jsonl")]
        assert f"not read, being of no known kind: {tmp_path / 'b.txt'}" in capsys.readouterr().err

    def test_a_file_whose_name_looks_like_a_pattern(self, tmp_path: Path) -> None:
        [file] = touch(tmp_path, "a[1].jsonl")
        assert expand([file], "--pool") == [file]
        [folder_file] = touch(tmp_path, "f[2]/x.jsonl")
        assert expand([str(tmp_path / "f[2]")], "--pool") == [folder_file]

    def test_hub_names_and_standard_input_pass_through(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        names = ["-", "owner/name", "name", "owner/name:main:train[:10%]"]
        assert expand(names, "--pool") == names

    @pytest.mark.parametrize(
        ("source", "match"),
        [
            ("missing.jsonl.gz", "--data missing.jsonl.gz: no such file"),
            ("*.jsonl", r"--data \*\.jsonl: no file of a known kind"),
            ("empty", "--data empty: no file of a known kind"),
            ("full", r"full: no file .*\(it has note\.txt\); known are \.jsonl"),
            ("full/note.txt", "note.txt: unknown kind of file; known are .*csv"),
        ],
    )
    def test_what_cannot_be_read_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, match: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        touch(tmp_path, "full/note.txt")
        with pytest.raises(UserError, match=match):
            expand([source], "--data")

    def test_a_file_that_is_named_twice(self, tmp_path: Path) -> None:
        [file] = touch(tmp_path, "a.jsonl")
        for sources in ([file, str(tmp_path)], [f"{tmp_path}/*", f"{tmp_path}/../{tmp_path.name}/a.jsonl"], ["-", "-"]):
            with pytest.raises(UserError, match=r"--pool .*given 2 times"):
                expand(sources, "--pool")
        with pytest.raises(UserError, match="--pool: name at least one"):
            expand([], "--pool")


def test_kinds() -> None:
    names = ["a.jsonl", "a.Ndjson.GZ", "x/a.csv.zst", "a.json.bz2", "a.parquet", "a.parquet.gz", "a.gz", "a", "a.txt"]
    assert [kind(name) for name in names] == [".jsonl", ".ndjson", ".csv", ".json", ".parquet", None, None, None, None]
    assert [has_lines(name) for name in ["-", *names]] == [True, True, True, True, *[False] * 6]


def test_hub_names() -> None:
    assert hub_name("name") == HubName("name", None, "train")
    assert hub_name("owner/name:main") == HubName("owner/name", "main", "train")
    assert hub_name("owner/name:main:test") == HubName("owner/name", "main", "test")
    assert hub_name("owner/name::train[:10%]") == HubName("owner/name", None, "train[:10%]")
    for path in ("a/b/c", "/name", "x.jsonl", "owner/x.csv.gz", "data/*", "a[1]:b"):
        assert hub_name(path) is None
