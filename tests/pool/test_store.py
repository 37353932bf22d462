"""What is written is what is read, from every placement; nothing half-written or damaged is taken for a store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lead_engine.base.errors import UserError
from lead_engine.pool.store import TokenStore
from tests.pool.stores import PLACEMENTS, Samples

sample = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=12)
pools = st.lists(sample, min_size=1, max_size=8).map(
    lambda pool: [([t for t, _ in s], [r for _, r in s]) for s in pool]
)


class TestRoundTrip:
    @settings(max_examples=40, deadline=None)
    @given(pool=pools)
    @pytest.mark.parametrize("placement", PLACEMENTS)
    def test_arrays(self, placement: str, pool: Samples, tmp_path_factory: pytest.TempPathFactory) -> None:
        path = tmp_path_factory.mktemp("round") / "store"
        TokenStore.write(path, iter(pool))
        store = TokenStore.open(path, placement, "cpu")
        assert (store.tokens.dtype, store.response.dtype, store.offsets.dtype) == (torch.int32, torch.bool, torch.int64)
        assert (store.lengths.dtype, store.response_rows.dtype) == (torch.int64, torch.int64)
        assert store.tokens.tolist() == [t for ids, _ in pool for t in ids]
        assert store.response.tolist() == [r for _, mask in pool for r in mask]
        assert store.offsets.tolist() == [sum(len(ids) for ids, _ in pool[:i]) for i in range(len(pool) + 1)]
        assert store.lengths.tolist() == [len(ids) for ids, _ in pool]
        assert store.response_rows.tolist() == [sum(mask[1:]) for _, mask in pool]
        assert (store.num_samples, store.num_tokens) == (len(pool), sum(len(ids) for ids, _ in pool))
        assert store.max_token_id == max(t for ids, _ in pool for t in ids)
        assert store.placement == placement
        shutil.rmtree(path.parent)

    def test_files_are_plain_numpy(self, folder: Path, samples: Samples) -> None:
        assert {p.name for p in folder.iterdir()} == {
            "tokens.npy",
            "response.npy",
            "offsets.npy",
            "response_rows.npy",
            "meta.json",
        }
        assert np.load(folder / "tokens.npy").tolist() == [t for ids, _ in samples for t in ids]
        assert np.load(folder / "response.npy").dtype == np.bool_

    def test_samples_may_carry_more_and_be_arrays(self, tmp_path: Path) -> None:
        TokenStore.write(tmp_path / "s", [(np.array([5, 6], dtype=np.int32), np.array([0, 1], dtype=bool), "a record")])
        store = TokenStore.open(tmp_path / "s")
        assert store.tokens.tolist() == [5, 6]
        assert store.response.tolist() == [False, True]

    def test_mapped_tokens_cannot_be_changed_on_disk(self, folder: Path) -> None:
        before = (folder / "tokens.npy").read_bytes()
        copy = TokenStore.open(folder, "pinned")
        copy.tokens.zero_()
        TokenStore.open(folder, "device").tokens.zero_()
        assert (folder / "tokens.npy").read_bytes() == before


class TestWriting:
    def test_it_streams(self, tmp_path: Path) -> None:
        path, sizes = tmp_path / "store.partial" / "tokens.npy", []

        def samples() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for _ in range(6):
                yield np.zeros(200_000, dtype=np.int32), np.ones(200_000, dtype=bool)
                sizes.append(path.stat().st_size)

        TokenStore.write(tmp_path / "store", samples())
        assert sizes[0] < sizes[2] < sizes[-1]
        assert sizes[-1] >= 4 * 200_000 * 5

    def test_an_interrupted_write_leaves_no_store_and_keeps_an_older_one(self, tmp_path: Path) -> None:
        def broken() -> Iterator[tuple[list[int], list[bool]]]:
            yield [1, 2], [True, True]
            raise KeyboardInterrupt

        path = tmp_path / "store"
        with pytest.raises(KeyboardInterrupt):
            TokenStore.write(path, broken())
        with pytest.raises(UserError, match="interrupted"):
            TokenStore.open(path)
        TokenStore.write(path, [([7], [True])])
        with pytest.raises(KeyboardInterrupt):
            TokenStore.write(path, broken())
        assert TokenStore.open(path).tokens.tolist() == [7]
        TokenStore.write(path, [([8, 9], [True, True])])
        assert TokenStore.open(path).tokens.tolist() == [8, 9]
        assert [p.name for p in tmp_path.iterdir()] == ["store"]

    def test_no_samples(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no sample"):
            TokenStore.write(tmp_path / "store", [])
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("bad", [([], []), ([1], [True, True]), ([-1], [True]), ([2**31], [True])])
    def test_samples_that_do_not_fit_the_format(self, tmp_path: Path, bad: tuple[list[int], list[bool]]) -> None:
        with pytest.raises(ValueError, match="sample 1"):
            TokenStore.write(tmp_path / "store", [([1], [True]), bad])


def rewrite(path: Path, change) -> None:
    np.save(path, change(np.load(path)))


def set_meta(folder: Path, **values: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **values}))


DAMAGE = {
    "cut tokens": ("tokens.npy", lambda f: (f / "tokens.npy").write_bytes((f / "tokens.npy").read_bytes()[:-8])),
    "empty tokens": ("tokens.npy", lambda f: (f / "tokens.npy").write_bytes(b"")),
    "no numpy": ("response.npy", lambda f: (f / "response.npy").write_bytes(b"hello" * 50)),
    "short tokens": ("tokens.npy", lambda f: rewrite(f / "tokens.npy", lambda x: x[:-1])),
    "wrong type": ("tokens.npy", lambda f: rewrite(f / "tokens.npy", lambda x: x.astype(np.int64))),
    "two dimensions": ("response.npy", lambda f: rewrite(f / "response.npy", lambda x: x[None])),
    "offsets fall": ("offsets.npy", lambda f: rewrite(f / "offsets.npy", lambda x: np.r_[x[:3], x[1], x[4:]])),
    "offsets end early": ("offsets.npy", lambda f: rewrite(f / "offsets.npy", lambda x: np.r_[x[:-1], x[-1] - 1])),
    "rows": ("response_rows.npy", lambda f: rewrite(f / "response_rows.npy", lambda x: np.roll(x, 1) + 1)),
    "missing offsets": ("offsets.npy", lambda f: (f / "offsets.npy").unlink()),
    "missing meta": ("meta.json", lambda f: (f / "meta.json").unlink()),
    "broken meta": ("meta.json", lambda f: (f / "meta.json").write_text('{"version": 1,')),
    "meta without counts": ("meta.json", lambda f: (f / "meta.json").write_text('{"version": 1}')),
    "other version": ("meta.json", lambda f: set_meta(f, version=99)),
    "other count": ("offsets.npy", lambda f: set_meta(f, num_samples=3)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "store")
    TokenStore.open(tmp_path / "store")
    name, damage = DAMAGE[kind]
    damage(tmp_path / "store")
    with pytest.raises(UserError, match=name) as error:
        TokenStore.open(tmp_path / "store", "mmap")
    assert "prepare" in str(error.value)


def test_auto_takes_the_device_where_the_pool_is_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(np.load(folder / f"{name}.npy").nbytes for name in ("tokens", "response", "offsets"))
    monkeypatch.setattr("lead_engine.pool.store._free_bytes", lambda device: 4 * size)
    assert TokenStore.open(folder, "auto").placement == "device"
    monkeypatch.setattr("lead_engine.pool.store._free_bytes", lambda device: 4 * size - 4)
    assert TokenStore.open(folder, "auto").placement == "mmap"
