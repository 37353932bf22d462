"""Whether the trainer's tokens mean what the pool's do: its rows may be the pool's own, and its model another one's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lead_engine.base import fingerprint
from lead_engine.pool.identity import tokenizer_parts

CORE = ("merges", "model", "normalizer", "pre-tokenizer")
"""What must be equal beside the vocabulary. The template need not be: the rows are there, and are compared with the
pool's.
"""


def check_tokenizer(pool: Path, tokenizer: Any, model: nn.Module) -> None:
    """UserError where the pool was prepared with another tokenizer; more tokens than the pool's (a pad token, say)
    are fine.

    tokenizer: the trainer's. Where it has none, it is the one in the folder that the model was loaded from, if that
    is a folder.
    """
    kept, given = pool / "tokenizer", "processing_class"
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        source = Path(str(getattr(getattr(model, "config", None), "_name_or_path", "") or ""))
        if not (source / "tokenizer_config.json").is_file():
            return
        tokenizer, given = AutoTokenizer.from_pretrained(source), f"model {source}"
    if not kept.is_dir():
        return
    own = AutoTokenizer.from_pretrained(kept)
    vocabulary, theirs = own.get_vocab(), tokenizer.get_vocab()
    others = [token for token, number in vocabulary.items() if theirs.get(token) != number]
    found = []
    if others:
        sizes = f"{len(own):,} tokens in the pool, {len(tokenizer):,} here"
        found.append(f"{len(others):,} tokens of the pool are others here, such as {others[0]!r} ({sizes})")
    before, now = (
        {key: parts.get(key) for key in CORE} for parts in (tokenizer_parts(own), tokenizer_parts(tokenizer))
    )
    found += fingerprint.differences({"tokenizer": before}, {"tokenizer": now}, "in the pool", "here")
    way_out = "Prepare the pool with this model, or give the model and tokenizer that it was prepared with"
    fingerprint.refuse(
        f"{given}: its tokenizer is not the one that lead(pool={str(pool)!r}) was prepared with", found, way_out
    )
