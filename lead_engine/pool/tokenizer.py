"""A byte-level BPE tokenizer with a ChatML template, for models that start from scratch."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lead_engine.base.errors import UserError
from lead_engine.pool.chat_template import check_tokenizer, render

PAD, START, END, TEXT_END = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL = (PAD, START, END, TEXT_END)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Words with their leading space, digits one at a time (so that arithmetic is learnable), punctuation, white space:
# Qwen2's split.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on `texts`; any text can be encoded and decodes to itself.

    The special tokens have ids 0 to 3: <|pad|>, <|im_start|>, <|im_end|> (eos, ends a turn), <|endoftext|> (ends a
    document of plain text); there is no bos. The vocabulary is smaller than `vocab_size` where the texts hold too few
    different pairs to merge. Raises UserError where `vocab_size` cannot hold the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL)
    if vocab_size < smallest:
        rule = f"at least {smallest} (256 bytes and {len(SPECIAL)} special tokens)"
        raise UserError(f"--vocab-size {vocab_size}: must be {rule}")
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, TEXT_END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def generation_prompt_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that stand before an answer when there is no instruction: what the chat template adds to ask for one.

    Templates without such a text ([INST] style) give the bos token, or else eos, so that the answer's first token is
    predicted from something. Never empty. Raises UserError where the tokenizer has no chat template.
    """
    check_tokenizer(tokenizer)
    question = [{"role": "user", "content": "?"}]
    asked, plain = render(tokenizer, question, prompt=True), render(tokenizer, question)
    if asked.startswith(plain) and asked != plain:
        return list(tokenizer(asked[len(plain) :], add_special_tokens=False)["input_ids"])
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise UserError(f"tokenizer {tokenizer.name_or_path or ''}: has neither a generation prompt nor a bos or eos token")
