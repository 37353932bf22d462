"""Whether a model has an embedding for every token that it is about to be given."""

from __future__ import annotations

from typing import Any

from lead_engine.base.errors import UserError


def rows_of(config: Any) -> int:
    """Embeddings of a model, by its transformers config."""
    return int(config.get_text_config().vocab_size)


def check_vocabulary(largest: int, rows: int, *, model: str, source: str, tokens: int | None = None) -> None:
    """UserError if `source` holds a token that the model has no embedding for: on a GPU it would end the process.

    largest: the largest token id in the source. rows: embeddings that the model has. tokens: those of the model's own
    tokenizer, where it is known. model, source: what the message calls them, with their flag. Rows without a token are
    padding, and fine; so is a token without a row as long as it never occurs.
    """
    if largest < rows:
        return
    resize = "model.resize_token_embeddings(len(tokenizer)) in transformers, and save model and tokenizer together"
    again = "prepare the pool with this model's tokenizer"
    if tokens is None:
        why = f"if tokens were added to its tokenizer, call {resize}; else {again}"
    elif tokens > rows:
        why = f"its tokenizer has {tokens:,}: tokens were added and the embeddings not resized. Call {resize}"
    else:
        why = f"its tokenizer has {tokens:,}, so the tokens are another one's: {again}"
    raise UserError(f"{model}: has embeddings for {rows:,} tokens, but {source} holds token {largest:,}; {why}")
