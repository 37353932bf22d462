"""What all contenders of bench/training.py train: a model of random weights, a pool, and the steps' micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHAPES = {
    # name: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embedding
    "mini": (192, 512, 4, 6, 6, 4096, False),  # scratch:mini
    "small": (256, 704, 8, 8, 4, 4096, False),  # scratch:small
    "1b": (2048, 8192, 16, 32, 8, 128256, True),  # Llama 3.2 1B
    "3b": (3072, 8192, 28, 24, 8, 128256, True),  # Llama 3.2 3B
}
SAMPLES = 4096
GROUP = 32
"""Steps among whose samples the padded batches are grouped by length (Trainer's own grouping looks at 50 batches)."""


@dataclass(frozen=True)
class Setting:
    """One comparison."""

    model: str
    """A name in SHAPES, or a Hugging Face folder."""
    capacity: int
    micro_batches: int
    turns: int
    steps: int
    """Of a contender in one turn. The engine trains two rounds; on a CPU, those that do not group by length train half
    as many: by so much do they differ."""
    round_steps: int = 4
    """Of the engine's rounds, as by default."""


def make_data(folder: Path, setting: Setting) -> dict[str, Any]:
    """Model, pool and steps in `folder`; returns the model FLOPs and real tokens of one step, on average."""
    from transformers import AutoModelForCausalLM

    from lead_engine.model.packed import PackedLM
    from lead_engine.pool.store import TokenStore
    from lead_engine.pool.tokenizer import train_tokenizer
    from lead_engine.training.flops import ModelFlops

    if setting.model in SHAPES:
        model = make_model(setting.model)
        model.save_pretrained(folder / "model")
        train_tokenizer(["a few words are enough for a vocabulary of bytes"] * 3, 300).save_pretrained(folder / "model")
    else:
        (folder / "model").symlink_to(Path(setting.model).resolve(), target_is_directory=True)
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    vocabulary = model.config.get_text_config().vocab_size
    flops = ModelFlops.of(PackedLM(model, attention="mask", max_length=1024, chunk_bytes=None))
    make_pool(folder / "pool", vocabulary, min(1024, setting.capacity))
    store = TokenStore.open(folder / "pool" / "store")
    steps = make_steps(store, setting)
    torch.save(steps, folder / "steps.pt")
    ids = steps["ids"][steps["ids"] < store.num_samples]
    count = len(steps["ids"])
    return {
        "flops_per_step": float(flops.samples(store.lengths[ids], store.response_rows[ids]).sum()) / count,
        "tokens_per_step": int(store.lengths[ids].sum()) / count,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def make_model(shape: str) -> torch.nn.Module:
    """A Llama of random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.06,  # wide enough for losses to depend on what a token may see
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def make_pool(folder: Path, vocabulary: int, longest: int) -> None:
    from lead_engine.pool.state import PoolState
    from lead_engine.pool.store import TokenStore

    random = np.random.default_rng(0)
    lengths = np.clip(np.round(random.lognormal(np.log(115), 0.62, SAMPLES)), 16, longest).astype(int)
    TokenStore.write(
        folder / "store", ((random.integers(4, vocabulary, n), np.arange(n) >= 2 * n // 5) for n in lengths)
    )
    PoolState(
        utility=torch.from_numpy(random.uniform(3, 6, SAMPLES)).float(),
        difficulty=torch.from_numpy(random.uniform(0.3, 1.0, SAMPLES)).float(),
        answer_nll=torch.full((SAMPLES,), 5.0),
        cluster=torch.from_numpy(random.integers(0, 7, SAMPLES)),
        task=torch.from_numpy(random.integers(0, 12, SAMPLES)),
        dropped=torch.zeros(SAMPLES, dtype=torch.bool),
        task_names=[f"task {i}" for i in range(12)],
        num_clusters=7,
    ).save(folder)


def make_steps(store, setting: Setting) -> dict[str, torch.Tensor]:
    """The micro-batches of the steps.

    ids: int64 [steps, micro-batches, slots], N in empty slots. tokens, rows: [steps, micro-batches], their tokens and
    response rows. grouped: the same samples in micro-batches of like length.
    """
    from lead_kernels import pack_plan

    slots, per_step = setting.capacity // 32, setting.micro_batches
    whole = int(store.lengths.sum()) // (setting.capacity * per_step)
    steps = min(whole // setting.round_steps * setting.round_steps, GROUP)
    order = torch.randperm(store.num_samples, generator=torch.Generator().manual_seed(1))

    def pack(order: torch.Tensor) -> torch.Tensor:
        plan = pack_plan(
            order, store.lengths, num_bins=steps * per_step, capacity=setting.capacity, slots=slots, max_tokens=1 << 40
        )
        return plan.sample_ids.view(steps, per_step, slots)

    ids = pack(order)
    used = ids[ids < store.num_samples]
    by_length = used[store.lengths[used].argsort(stable=True)]
    rows, tokens = (torch.cat([x, x.new_zeros(1)])[ids].sum(-1) for x in (store.response_rows, store.lengths))
    return {
        "ids": ids,
        "tokens": tokens,
        "rows": rows,
        "grouped": group(by_length, store.lengths, ids.shape, store.num_samples),
    }


def group(by_length: torch.Tensor, lengths: torch.Tensor, shape: torch.Size, empty: int) -> torch.Tensor:
    """Sorted samples, cut into micro-batches of as many tokens each, give or take a sample, in random order."""
    bins = shape[0] * shape[1]
    before = lengths[by_length].cumsum(0) - lengths[by_length]
    place = (before * bins // int(lengths[by_length].sum())).clamp(max=bins - 1)
    parts = [by_length[place == i] for i in range(bins)]
    most = max(shape[2], *map(len, parts))
    grid = torch.full((bins, most), empty)
    for i, part in enumerate(parts):
        grid[i, : len(part)] = part
    return grid[torch.randperm(bins, generator=torch.Generator().manual_seed(2))].view(shape[0], shape[1], most)
