"""A tiny chat model on disk, and a few records in a world so small that the model can learn it by heart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lead_engine.pool.tokenizer import train_tokenizer

RECORDS = [
    {"id": "a1", "dataset": "sums", "prompt": "What is 2 + 3?", "completion": "2 + 3 makes 5.\n#### 5"},
    {"id": "a2", "dataset": "sums", "prompt": "What is 4 + 4?", "completion": "4 + 4 makes 8.\n#### 8"},
    {"id": "b1", "dataset": "capitals", "prompt": "Capital of France?", "completion": "Paris"},
    {"id": "b2", "dataset": "capitals", "prompt": "Capital of the Netherlands, please?", "completion": "Amsterdam"},
    {"id": "c1", "prompt": "Say something longer than the others do.", "completion": "The long and winding road."},
]


@pytest.fixture(scope="session")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    texts = [text for record in RECORDS for text in (record["prompt"], record["completion"])]
    return train_tokenizer(texts * 4, 400)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """An untrained two-layer Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.2,  # losses that differ between samples
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
