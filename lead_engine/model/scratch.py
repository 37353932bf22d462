"""Small models that need no download: `scratch:tiny` (about 1M parameters), `mini` (3M), `small` (10M), `100m`.

Llama architecture (transformers' own classes), so that everything that works on them works on Llama checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lead_engine.base.errors import UserError
from lead_engine.base.files import publish
from lead_engine.pool.tokenizer import TEXT_END

PREFIX = "scratch:"
SHAPES = {
    # name: hidden, intermediate, layers, heads, key-value heads, tied embedding
    "tiny": (128, 352, 4, 4, 4, True),
    "mini": (192, 512, 4, 6, 6, False),
    "small": (256, 704, 8, 8, 4, False),
    "100m": (768, 2048, 12, 12, 4, False),
}


def is_scratch(model: str) -> bool:
    return model.startswith(PREFIX)


def make_scratch(
    model: str, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int, max_length: int = 4096
) -> None:
    """Write a randomly initialised model and its tokenizer in Hugging Face format.

    The folder appears whole.

    Raises UserError for an unknown name.
    """
    name = model.removeprefix(PREFIX)
    if name not in SHAPES:
        raise UserError(f"--model {model}: unknown; known: {', '.join(PREFIX + known for known in SHAPES)}")
    hidden, intermediate, layers, heads, kv_heads, tied = SHAPES[name]
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # a multiple of 64 keeps the head's matrix products aligned
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    building = folder.with_name(folder.name + ".writing")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = LlamaForCausalLM(config)
    ends = [tokenizer.eos_token_id, tokenizer.get_vocab().get(TEXT_END)]  # of a turn, of a document of `pretrain`
    built.generation_config.eos_token_id = sorted({end for end in ends if end is not None}) or None
    built.save_pretrained(building)
    tokenizer.save_pretrained(building)
    publish(building, folder)
