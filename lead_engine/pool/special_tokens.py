"""Control tokens: which ones mark up a conversation, and keeping a record's text from forging them."""

from __future__ import annotations

import contextlib
import re

from transformers import PreTrainedTokenizerBase

from lead_engine.pool.chat_template import PROBES, render

REASONING = re.compile(
    r"</?\|?(?:\w+:)?(?:think|thinking|thought)\|?>|\[/?THINK\]|◁/?think▷|<\|(?:START|END)_THINKING\|>"
)
"""What marks reasoning inside an answer. Where these are added tokens, an answer that spells one means that token."""


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Spelling -> id of the added tokens that mark up a conversation: all special ones and, special or not, those that
    the template writes around turns; none of REASONING.
    """
    around = ""
    with contextlib.suppress(Exception):  # as in `render`; then the special ones are all that is known
        around = render(tokenizer, [*PROBES[0], *PROBES[0]])
    return {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if (token.special or token.content in around)
        and not token.content.isspace()
        and not REASONING.fullmatch(token.content)
    }


def any_of(spellings: dict[str, int]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or r"(?!)")


def spell(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of `text`, which stands inside other text, as if no added token could be spelled."""
    # SentencePiece puts a space before the start of a text, but not behind a line break; transformers'
    # apply_chat_template(sanitize_control_tokens=True) does the same and gives the same tokens.
    newline, ids = _plain(tokenizer, "\n"), _plain(tokenizer, "\n" + text)
    return ids[len(newline) :] if ids[: len(newline)] == newline else _plain(tokenizer, text)


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    core = tokenizer.backend_tokenizer
    text = core.normalizer.normalize_str(text) if core.normalizer is not None else text
    parts = [(text, None)] if core.pre_tokenizer is None else core.pre_tokenizer.pre_tokenize_str(text)
    return [token.id for part, _ in parts for token in core.model.tokenize(part)]
