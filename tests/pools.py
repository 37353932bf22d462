"""Fixtures with small real models and prepared pools, for every test that trains."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

VOCAB = 300
TASKS = ["chat", "code", "maths"]

ModelMaker = Callable[..., Path]
PoolMaker = Callable[..., Path]


def _tokenizer():
    from lead_engine.pool.tokenizer import train_tokenizer

    return train_tokenizer(["a few words are enough for a vocabulary of bytes and some merges of them"] * 3, VOCAB)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """make_model("llama", hidden_size=32, ...) -> folder of a randomly initialised Hugging Face model (made once a configuration)."""
    made: dict[str, Path] = {}

    def make(kind: str = "llama", **options: object) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        key = f"{kind} {sorted(options.items())}"
        if key not in made:
            tokenizer = _tokenizer()
            shape = {
                "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "tie_word_embeddings": False,
                "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
            }  # fmt: skip
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **options}))
            with torch.no_grad():  # larger weights than usual: differences must show
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.normal_(0, 0.15)
            made[key] = tmp_path_factory.mktemp("model")
            model.save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_pool(tmp_path_factory: pytest.TempPathFactory) -> PoolMaker:
    """make_pool(samples=200, seed=0, longest=40) -> prepared pool folder of random tokens, with clusters, tasks and drops."""

    def make(samples: int = 200, seed: int = 0, longest: int = 40) -> Path:
        from lead_engine.pool.state import PoolState
        from lead_engine.pool.store import TokenStore

        folder = tmp_path_factory.mktemp("pool")
        random = np.random.default_rng(seed)
        lengths = random.integers(4, longest + 1, samples)
        parts = []
        for n in lengths:
            mask = random.random(n) < 0.6
            mask[-1] = True
            parts.append((random.integers(4, VOCAB, n), mask))
        TokenStore.write(folder / "store", parts)
        names = [f"s{i}" for i in range(samples)]
        pq.write_table(pa.table({"id": names}), folder / "records.parquet")
        PoolState(
            utility=torch.from_numpy(random.uniform(3, 6, samples)).float(),
            difficulty=torch.from_numpy(random.uniform(0.3, 1.05, samples)).float(),
            cluster=torch.from_numpy(random.integers(0, 3, samples)),
            task=torch.from_numpy(random.integers(0, 3, samples)),
            dropped=torch.from_numpy(random.random(samples) < 0.1),
            task_names=TASKS,
            num_clusters=3,
        ).save(folder)
        _tokenizer().save_pretrained(folder / "tokenizer")
        return folder

    return make
