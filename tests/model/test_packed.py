"""Packed micro-batches: accumulation, neighbours, bf16, what cannot run. Packed = separate: test_architectures.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lead_engine.base.errors import UserError
from lead_engine.config import RuntimeConfig
from lead_engine.model.load import build_model
from lead_engine.model.packed import PackedLM, mean_hidden
from lead_engine.pool.store import TokenStore
from model_kinds import KINDS
from separate import reference

CPU = torch.device("cpu")


def build(folder: Path, attention: str = "auto", precision: str = "fp32") -> PackedLM:
    return build_model(
        folder, device=CPU, runtime=RuntimeConfig(precision=precision, attention=attention), max_length=64
    )


def batch(store: TokenStore, ids: list[int], slots: int, capacity: int):
    padded = torch.tensor(ids + [store.num_samples] * (slots - len(ids)))
    rows = int(store.response_rows[ids].sum())
    return store.batch(padded, capacity=capacity, num_rows=rows + 5)


def test_one_large_micro_batch_is_eight_small_ones(make_model, make_pool) -> None:
    folder, store = make_model("llama"), TokenStore.open(make_pool(samples=30) / "store")
    ids = list(range(16))
    weight = 1.0 / float(store.response_rows[ids].sum())
    large, small = build(folder), build(folder)
    large(batch(store, ids, 20, int(store.lengths[ids].sum())), token_weight=weight).loss.backward()
    for pair in zip(ids[::2], ids[1::2], strict=True):
        small(batch(store, list(pair), 2, 96), token_weight=weight).loss.backward()
    for (name, a), b in zip(large.named_parameters(), small.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * a.grad.abs().max(), name


def test_neighbours_do_not_leak(make_model, make_pool) -> None:
    """Other neighbours, other place in the micro-batch: the same loss.

    A leak through attention shows in the first digits.
    """
    folder, store = make_model("llama"), TokenStore.open(make_pool(samples=30) / "store")
    model = build(folder)
    with torch.no_grad():
        here = model(batch(store, [5, 9], 4, 96)).sample_nll[0]
        there = model(batch(store, [21, 5], 4, 96)).sample_nll[1]
    torch.testing.assert_close(here, there, rtol=2e-6, atol=0)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "phi", "qwen3_moe"])
def test_bf16_is_as_near_as_transformers_bf16(kind: str, make_model, make_pool) -> None:
    folder, store = make_model(kind, **KINDS[kind]), TokenStore.open(make_pool(samples=40) / "store")
    ids = list(range(20))
    exact, _ = reference(folder, store, ids, torch.float64)
    half, _ = reference(folder, store, ids, torch.bfloat16)
    model = build_model(folder, device=CPU, runtime=RuntimeConfig(precision="bf16"), max_length=64, trainable=False)
    with torch.no_grad():
        ours = model(batch(store, ids, 24, int(store.lengths[ids].sum()) + 3)).sample_nll[: len(ids)]
    rms = [float((x.double() - exact).pow(2).mean().sqrt()) for x in (ours, half)]
    assert rms[0] <= 1.2 * rms[1] + 1e-3, rms


def test_mean_hidden(make_model, make_pool) -> None:
    folder, store = make_model("llama"), TokenStore.open(make_pool(samples=30) / "store")
    model = build(folder)
    ids = [7, 2]
    means = mean_hidden(model, batch(store, ids, 4, 96))
    for place, i in enumerate(ids):
        alone = model.hidden(batch(store, [i], 1, int(store.lengths[i])))
        torch.testing.assert_close(means[place], alone.mean(0).detach(), rtol=1e-4, atol=1e-6)
    assert not means[2:].any()


def test_attention_that_cannot_run_is_refused(make_model) -> None:
    with pytest.raises(UserError, match=r"--runtime.attention varlen: cannot run here \(cpu"):
        build(make_model("llama"), "varlen")


def test_architecture_without_the_needed_parts_is_refused(make_model) -> None:
    with pytest.raises(UserError, match="gpt2"):
        build(make_model("gpt2"))
