"""The trained tokenizer loses nothing, is the same on every training, and survives saving."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lead_engine.base.errors import UserError
from lead_engine.pool.tokenizer import train_tokenizer

CONVERSATION = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "Hello"}]


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_decodes_to_itself(chatml: PreTrainedTokenizerFast, text: str) -> None:
    assert chatml.decode(chatml(text)["input_ids"]) == text


def test_special_tokens(chatml: PreTrainedTokenizerFast) -> None:
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    assert chatml.convert_tokens_to_ids(specials) == [0, 1, 2, 3]
    assert (chatml.pad_token_id, chatml.eos_token_id, chatml.bos_token) == (0, 2, None)
    assert chatml("<|im_start|>a<|im_end|>")["input_ids"][::2] == [1, 2]


def test_template(chatml: PreTrainedTokenizerFast) -> None:
    text = chatml.apply_chat_template(CONVERSATION[:1], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n"
    whole = chatml.apply_chat_template(CONVERSATION, tokenize=False)
    assert whole == text + "Hello<|im_end|>\n"


def test_digits_stand_alone() -> None:
    tokenizer = train_tokenizer(["1234 1234 12 12 12"] * 50, 300)
    assert [tokenizer.decode(i) for i in tokenizer("12 34")["input_ids"]] == ["1", "2", " ", "3", "4"]


def test_size(chatml: PreTrainedTokenizerFast) -> None:
    assert len(chatml) == 420
    assert 260 <= len(train_tokenizer(["ab"], 5000)) < 300
    with pytest.raises(UserError, match="--vocab-size 259"):
        train_tokenizer(["text"], 259)


def test_training_twice_gives_the_same_and_saving_keeps_it(tmp_path: Path) -> None:
    texts = [f"sample {i} {i * 7919 % 101} lorem ipsum dolor" for i in range(200)]
    first, second = (train_tokenizer(iter(texts), 400) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    first.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = loaded.apply_chat_template(CONVERSATION, tokenize=False)
    assert text == first.apply_chat_template(CONVERSATION, tokenize=False)
    assert loaded(text)["input_ids"] == first(text)["input_ids"]
    assert loaded.is_fast
    assert (loaded.eos_token_id, loaded.pad_token_id) == (first.eos_token_id, first.pad_token_id)
