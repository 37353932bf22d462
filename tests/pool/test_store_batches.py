"""Micro-batches of a token store: equal from every placement, in the order asked for, and no thread is left."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lead_engine.pool import prefetch
from lead_engine.pool.store import TokenStore
from tests.pool.stores import PLACEMENTS, Samples


def prefetch_threads() -> int:
    return sum(thread.name == "lead-engine-prefetch" for thread in threading.enumerate())


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
