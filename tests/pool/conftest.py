"""Tokenizers with the templates of real model families, trained on a little text; a written token store."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lead_engine.pool.rendering import Renderer
from lead_engine.pool.store import TokenStore
from lead_engine.pool.tokenizer import train_tokenizer
from tests.pool.stores import Samples, make_samples
from tests.pool.templates import FAMILIES, tokenizer_of

CORPUS = [
    "The quick brown fox jumps over the lazy dog. How are you today? I am fine, thank you very much!",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "You are a helpful assistant. user system assistant instruction answer question",
    "Grüße aus München, 東京 and Санкт-Петербург \N{ROCKET}",
] * 4

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set offset = 0 %}{% set system = '' %}"
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set offset = 1 %}{% set system = messages[0]['content'] + '\n\n' %}{% endif %}"
    "{% for message in messages[offset:] %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_LAST = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (messages[0]['content'] + '\n\n' if loop.last or loop.index == messages | length - 1 else '') "
    "+ message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""As some [INST] templates do, the system message goes before the last user message."""
THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen3: only the answer to the last question shows its (empty) reasoning."""


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    return train_tokenizer(CORPUS, 420)


def _with_template(template: str, bos: str, eos: str, special: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer.from_str(train_tokenizer(CORPUS, 420).backend_tokenizer.to_str())
    core.post_processor = processors.ByteLevel(trim_offsets=True)  # as Llama 3 and GPT-2 have it
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, additional_special_tokens=special, chat_template=template
    )


@pytest.fixture(scope="session")
def llama3() -> PreTrainedTokenizerFast:
    special = ["<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = _with_template(LLAMA3, "<|begin_of_text|>", "<|eot_id|>", special)
    _add_bos(tokenizer.backend_tokenizer, "<|begin_of_text|>")
    return tokenizer


def _add_bos(core: Tokenizer, bos: str) -> None:
    """As real tokenizers do, put bos before any text, on top of the one that the template writes."""
    add = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    core.post_processor = processors.Sequence([core.post_processor, add]) if core.post_processor else add


@pytest.fixture(scope="session")
def mistral() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE: spaces become part of the next word, unknown characters fall back to bytes."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add_bos(core, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=MISTRAL
    )


@pytest.fixture(scope="session")
def system_last() -> PreTrainedTokenizerFast:
    return _with_template(SYSTEM_LAST, "<s>", "</s>", [])


@pytest.fixture(scope="session")
def thinking() -> PreTrainedTokenizerFast:
    return _with_template(THINKING, "<|endoftext|>", "<|im_end|>", ["<|im_start|>"])


@pytest.fixture(scope="module")
def renderers(chatml: PreTrainedTokenizerFast) -> dict[str, Renderer]:
    return {name: Renderer(tokenizer_of(chatml, family)) for name, family in FAMILIES.items()}


@pytest.fixture(scope="module")
def samples() -> Samples:
    return make_samples()


@pytest.fixture(scope="module")
def folder(samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "store"
    TokenStore.write(path, iter(samples))
    return path
