"""What is written is what is read, from every placement; nothing half-written or damaged is taken for a store."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lead_engine.base.errors import UserError
from lead_engine.pool import prefetch
from lead_engine.pool.store import TokenStore

PLACEMENTS = ("device", "pinned", "mmap")
Samples = list[tuple[list[int], list[bool]]]

sample = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=12)
pools = st.lists(sample, min_size=1, max_size=8).map(
    lambda pool: [([t for t, _ in s], [r for _, r in s]) for s in pool]
)


def make_samples(count: int = 60, seed: int = 0, longest: int = 40) -> Samples:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest, count)
    return [(rng.integers(0, 5000, n).tolist(), (rng.random(n) < 0.5).tolist()) for n in sizes]


@pytest.fixture(scope="module")
def samples() -> Samples:
    return make_samples()


@pytest.fixture(scope="module")
def folder(samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "store"
    TokenStore.write(path, iter(samples))
    return path


def prefetch_threads() -> int:
    return sum(thread.name == "lead-engine-prefetch" for thread in threading.enumerate())


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


class TestBatches:
    CAPACITY, SLOTS = 320, 8

    def plan(self, samples: Samples, count: int = 25, seed: int = 1) -> torch.Tensor:
        """Micro-batches with empty slots at their ends, in the middle, and everywhere (the first)."""
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, len(samples) + 1, (count, self.SLOTS))
        ids[0] = len(samples)
        ids[1:, 3] = len(samples)
        return torch.from_numpy(ids)

    def gather(self, store: TokenStore, plan: torch.Tensor) -> list:
        store.prefetch(plan)
        return [store.batch(ids, capacity=self.CAPACITY, num_rows=self.CAPACITY) for ids in plan]

    def test_placements_give_equal_batches(self, folder: Path, samples: Samples) -> None:
        plan = self.plan(samples)
        stores = [TokenStore.open(folder, placement) for placement in PLACEMENTS]
        first, *others = [self.gather(store, plan) for store in stores]
        for other in others:
            for a, b in zip(first, other, strict=True):
                for name, x, y in zip(a._fields, a, b, strict=True):
                    assert x.dtype == y.dtype, name
                    assert torch.equal(x, y), name
        for store in stores:
            store.close()
        assert first[0].targets.eq(-100).all()  # the batch of empty slots

    @pytest.mark.parametrize("placement", PLACEMENTS)
    def test_batches_hold_the_samples(self, placement: str, folder: Path, samples: Samples) -> None:
        plan = self.plan(samples)
        with TokenStore.open(folder, placement) as store:
            for ids, batch in zip(plan.tolist(), self.gather(store, plan), strict=True):
                bounds = batch.cu_seqlens.tolist()
                wanted = [samples[i] if i < len(samples) else ([], []) for i in ids]
                segments = [batch.input_ids[a:b].tolist() for a, b in itertools.pairwise(bounds[:-1])]
                assert segments == [tokens for tokens, _ in wanted]
                targets = [t for ids_, mask in wanted for t, r in zip(ids_[1:], mask[1:], strict=True) if r]
                assert batch.targets[batch.targets != -100].tolist() == targets
                assert batch.sample_ids.tolist() == ids

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_placements_give_equal_batches_on_a_gpu(self, folder: Path, samples: Samples) -> None:
        plan = self.plan(samples)
        wanted = self.gather(TokenStore.open(folder, "device", "cpu"), plan)
        for placement in PLACEMENTS:
            with TokenStore.open(folder, placement, "cuda") as store:
                assert {x.is_pinned() for x in (store.tokens, store.response, store.offsets)} == {placement == "pinned"}
                store.prefetch(plan)
                on_device = plan.cuda()
                torch.cuda.set_sync_debug_mode("error")
                got = [store.batch(ids, capacity=self.CAPACITY, num_rows=self.CAPACITY) for ids in on_device]
                torch.cuda.set_sync_debug_mode("default")
                for a, b in zip(wanted, got, strict=True):
                    assert all(torch.equal(x, y.cpu()) for x, y in zip(a, b, strict=True))

    def test_batches_keep_their_values_when_buffers_are_used_again(self, folder: Path, samples: Samples) -> None:
        plan = self.plan(samples, 40)
        with TokenStore.open(folder, "mmap") as store:
            batches = self.gather(store, plan)
        with TokenStore.open(folder, "mmap") as store:
            for ids, batch in zip(plan, batches, strict=True):
                store.prefetch(ids[None])
                again = store.batch(ids, capacity=self.CAPACITY, num_rows=self.CAPACITY)
                assert all(torch.equal(x, y) for x, y in zip(batch, again, strict=True))

    def test_requests_queue_up_behind_one_another(self, folder: Path, samples: Samples) -> None:
        plan = self.plan(samples, 20)
        with TokenStore.open(folder, "mmap") as store:
            store.prefetch(plan[:12])
            for ids in plan[:5]:
                store.batch(ids, capacity=self.CAPACITY, num_rows=self.CAPACITY)
            store.prefetch(plan[12:])
            for ids in plan[5:]:
                assert store.batch(ids, capacity=self.CAPACITY, num_rows=self.CAPACITY).sample_ids.equal(ids)

    def test_only_a_few_batches_are_made_ahead(self, folder: Path, samples: Samples) -> None:
        with TokenStore.open(folder, "mmap") as store:
            store.prefetch(self.plan(samples, 200))
            ready = store._prefetcher._ready
            deadline = time.monotonic() + 10
            while ready.qsize() < prefetch.DEPTH and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.05)
            assert ready.qsize() == prefetch.DEPTH

    @pytest.mark.parametrize("placement", ["device", "pinned"])
    def test_a_pool_in_memory_needs_no_prefetch(self, placement: str, folder: Path, samples: Samples) -> None:
        before, plan = prefetch_threads(), self.plan(samples, 5)
        with TokenStore.open(folder, "mmap") as mapped, TokenStore.open(folder, placement) as store:
            assert (mapped.wants_prefetch, store.wants_prefetch) == (True, False)
            wanted = self.gather(mapped, plan)
            threads = prefetch_threads()
            for place in (3, 0, 4, 3):  # in any order
                batch = store.batch(plan[place], capacity=self.CAPACITY, num_rows=self.CAPACITY)
                assert all(torch.equal(x, y) for x, y in zip(batch, wanted[place], strict=True))
            store.prefetch(plan)
            assert prefetch_threads() == threads == before + 1

    def test_out_of_order(self, folder: Path, samples: Samples) -> None:
        with TokenStore.open(folder, "mmap") as store:
            store.prefetch(torch.tensor([[0, 1], [2, 3]]))
            with pytest.raises(RuntimeError, match="order of prefetch"):
                store.batch(torch.tensor([2, 3]), capacity=100, num_rows=100)

    def test_without_prefetch(self, folder: Path) -> None:
        with TokenStore.open(folder, "mmap") as store:
            with pytest.raises(RuntimeError, match="prefetch"):
                store.batch(torch.tensor([0]), capacity=100, num_rows=100)
            store.prefetch(torch.tensor([[0]]))
            store.batch(torch.tensor([0]), capacity=100, num_rows=100)
            with pytest.raises(RuntimeError, match="prefetch"):
                store.batch(torch.tensor([0]), capacity=100, num_rows=100)

    @pytest.mark.parametrize("bad", [61, -1])
    def test_failures_of_the_thread_arrive_in_order(self, folder: Path, bad: int) -> None:
        before = prefetch_threads()
        store = TokenStore.open(folder, "mmap")
        store.prefetch(torch.tensor([[0, 1], [2, bad], [3, 4]]))
        store.batch(torch.tensor([0, 1]), capacity=100, num_rows=100)
        with pytest.raises(IndexError, match=str(bad)):
            store.batch(torch.tensor([2, bad]), capacity=100, num_rows=100)
        assert prefetch_threads() == before

    @pytest.mark.parametrize("ids", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int32)])
    def test_requests_of_the_wrong_form(self, folder: Path, ids: torch.Tensor) -> None:
        with TokenStore.open(folder, "mmap") as store, pytest.raises(ValueError, match="int64"):
            store.prefetch(ids)

    def test_threads_end(self, folder: Path, samples: Samples) -> None:
        before = prefetch_threads()
        store = TokenStore.open(folder, "mmap")
        assert prefetch_threads() == before  # none before it is needed
        store.prefetch(self.plan(samples, 200))  # never taken
        assert prefetch_threads() == before + 1
        store.close()
        store.close()
        assert prefetch_threads() == before
        with pytest.raises(RuntimeError, match="closed"):
            store.prefetch(torch.tensor([[0]]))
        assert store.tokens[0] == samples[0][0][0]

    def test_forgotten_stores_end_their_threads(self, folder: Path, samples: Samples) -> None:
        before = prefetch_threads()
        store = TokenStore.open(folder, "mmap")
        store.prefetch(self.plan(samples))
        del store
        gc.collect()
        assert prefetch_threads() == before


def test_auto_takes_the_device_where_the_pool_is_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(np.load(folder / f"{name}.npy").nbytes for name in ("tokens", "response", "offsets"))
    monkeypatch.setattr("lead_engine.pool.store._free_bytes", lambda device: 4 * size)
    assert TokenStore.open(folder, "auto").placement == "device"
    monkeypatch.setattr("lead_engine.pool.store._free_bytes", lambda device: 4 * size - 4)
    assert TokenStore.open(folder, "auto").placement == "mmap"
