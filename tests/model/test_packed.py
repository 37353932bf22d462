"""Packed = separate: a sample's loss and gradients do not depend on its neighbours, and are those of transformers' own forward."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lead_engine.config import RuntimeConfig
from lead_engine.errors import UserError
from lead_engine.model.load import build_model
from lead_engine.model.packed import PackedLM, mean_hidden
from lead_engine.pool.store import TokenStore

ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 9},
    "gemma3_text": {"final_logit_softcapping": 5.0, "sliding_window": 7},
}
CPU = torch.device("cpu")


def build(folder: Path, attention: str = "auto", precision: str = "fp32") -> PackedLM:
    return build_model(folder, device=CPU, runtime=RuntimeConfig(precision=precision, attention=attention), max_length=64)


def reference(folder: Path, store: TokenStore, ids: list[int], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Each sample alone through transformers: mean NLL of its response tokens, and the gradients of their token-weighted mean."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    losses, total, count = [], 0, 0
    for i in ids:
        low, high = int(store.offsets[i]), int(store.offsets[i + 1])
        tokens, mask = store.tokens[low:high].long(), store.response[low:high]
        nll = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
        nll = nll[mask[1:]]
        losses.append(nll.mean().detach() if len(nll) else torch.zeros((), dtype=dtype))
        total, count = total + nll.sum(), count + len(nll)
    (total / count).backward()
    return torch.stack(losses), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def batch(store: TokenStore, ids: list[int], slots: int, capacity: int):
    padded = torch.tensor(ids + [store.num_samples] * (slots - len(ids)))
    rows = int(store.response_rows[ids].sum())
    return store.batch(padded, capacity=capacity, num_rows=rows + 5)


@pytest.mark.parametrize("attention", ["segment", "mask"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_equals_separate(kind: str, attention: str, make_model, make_pool) -> None:
    folder, store = make_model(kind, **ARCHITECTURES[kind]), TokenStore.open(make_pool(samples=30) / "store")
    ids = [3, 17, 4, 29, 11]
    exact, exact_grads = reference(folder, store, ids, torch.float64)
    single, single_grads = reference(folder, store, ids, torch.float32)
    model = build(folder, attention)
    out = model(batch(store, ids, slots=8, capacity=int(store.lengths[ids].sum()) + 6))
    out.loss.backward()

    def worst(value: Tensor, truth: Tensor) -> float:
        return float((value.double() - truth).abs().max())

    assert worst(out.sample_nll[: len(ids)], exact) <= 1.2 * worst(single, exact) + 2e-6
    assert not out.sample_nll[len(ids) :].any()
    names = model.checkpoint_names()
    seen = 0
    for name, parameter in model.named_parameters():
        truth = exact_grads[names[name]]
        assert worst(parameter.grad, truth) <= 2 * worst(single_grads[names[name]], truth) + 1e-6 * float(truth.abs().max()) + 1e-8, name
        seen += 1
    assert seen == len(exact_grads)


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
    """Other neighbours, other place in the micro-batch: the same loss. A leak through attention shows in the first digits."""
    folder, store = make_model("llama"), TokenStore.open(make_pool(samples=30) / "store")
    model = build(folder)
    with torch.no_grad():
        here = model(batch(store, [5, 9], 4, 96)).sample_nll[0]
        there = model(batch(store, [21, 5], 4, 96)).sample_nll[1]
    torch.testing.assert_close(here, there, rtol=2e-6, atol=0)


def test_bf16_is_as_near_as_transformers_bf16(make_model, make_pool) -> None:
    folder, store = make_model("llama"), TokenStore.open(make_pool(samples=40) / "store")
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
