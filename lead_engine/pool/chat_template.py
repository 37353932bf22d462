"""A tokenizer's chat template: whether it can be used, rendering a conversation with it, and what is mended in it.

What is mended is mended in the template itself, so that a saved tokenizer gives its user the tokens that were trained:
the bos token that the tokenizer puts before other text, and, on request, system messages for templates without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from lead_engine.base.errors import UserError

BOS = "{{- bos_token ~ '' }}"
"""Goes before a template; spelled as no template spells it."""
FOLD = """{%- set folded = namespace(turns=[], system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set folded.system = folded.system + message['content'] + '\\n\\n' -%}
{%- else -%}
{%- if folded.system and message['role'] == 'user' -%}
{%- set message = dict(message, content=folded.system + message['content']) -%}
{%- elif folded.system -%}
{%- set folded.turns = folded.turns + [{'role': 'user', 'content': folded.system.rstrip()}] -%}
{%- endif -%}
{%- set folded.system = '' -%}
{%- set folded.turns = folded.turns + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- if folded.system -%}
{%- set folded.turns = folded.turns + [{'role': 'user', 'content': folded.system.rstrip()}] -%}
{%- endif -%}
{%- set messages = folded.turns -%}
{{- '' }}"""
"""Goes before a template: a system message opens the next user turn, or is one where none comes next."""

PROBES: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}],
)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError unless the tokenizer has a chat template that can be read, and gives character offsets."""
    name = _name(tokenizer)
    if not tokenizer.chat_template:
        raise UserError(
            f"{name} has no chat template; take an instruction-tuned variant of --model, or set `chat_template` "
            "in its tokenizer_config.json (or chat_template.jinja)"
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"{name} is not a fast tokenizer, so it cannot say which characters a token covers; --model needs a "
            "tokenizer.json"
        )
    try:
        render(tokenizer, PROBES[0])
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"{name}: its chat template cannot be read (line {error.lineno}: {error.message}); mend it in "
            "chat_template.jinja or tokenizer_config.json"
        ) from None
    except Exception:  # of this one conversation; records may still fit, and each that does not is named
        try:
            tokenizer.get_chat_template()
        except ValueError as error:  # several templates, and none of them the default
            raise UserError(f"{name}: {str(error).splitlines()[0]}; name one of its chat templates `default`") from None


def render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[dict[str, Any]],
    *,
    prompt: bool = False,
    tools: list[Any] | None = None,
) -> str:
    """The conversation as text; with `prompt`, followed by what asks for the assistant's answer.

    A template may raise anything that Python code can.
    """
    # A batch of one: transformers takes an empty conversation only inside a batch.
    texts: Any = tokenizer.apply_chat_template(
        [list(turns)], tools=tools or None, tokenize=False, add_generation_prompt=prompt
    )
    return str(texts[0])


def mend_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the template write bos first where the tokenizer puts it before any other text and the template does not."""
    if not tokenizer.chat_template or not _puts_bos(tokenizer):
        return
    texts = _probe(tokenizer)
    if texts and not any(text.lstrip().startswith(tokenizer.bos_token) for text in texts):
        _prepend(tokenizer, BOS)


def fold_system(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the template put a system message at the head of the user turn that follows it; twice is as once."""
    if not folds_system(tokenizer):
        _prepend(tokenizer, FOLD)


def folds_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `fold_system` was called for this tokenizer, or for the one it was saved from."""
    return FOLD in str(tokenizer.chat_template)


def notes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a user should know about start, date and system messages in the template's text, a sentence each."""
    template, found = str(tokenizer.chat_template), []
    if BOS in template:
        found.append(
            f"the chat template did not write {tokenizer.bos_token}, which the tokenizer puts before any text: added "
            "once, here and in the template of every model that is saved"
        )
    elif _puts_bos(tokenizer):
        texts, bos = [text.lstrip() for text in _probe(tokenizer)], tokenizer.bos_token
        if any(text.removeprefix(bos).lstrip().startswith(bos) for text in texts):
            found.append(f"the chat template writes {bos} twice at the start of every sample")
        if len({text.startswith(bos) for text in texts}) > 1:
            found.append(f"the chat template writes {bos} first with a system message only, or only without one")
    if folds_system(tokenizer):
        found.append("system messages are folded into the user turn that follows them")
    if "strftime_now" in template:
        found.append("the chat template writes today's date: the same records give other tokens on another day")
    return found


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]


def _probe(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    texts = []
    for turns in PROBES:
        try:
            texts.append(render(tokenizer, turns))
        except Exception:  # not every template takes every conversation; see `render`
            continue
    return texts


def _prepend(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: text + each for name, each in template.items()}
    else:
        tokenizer.chat_template = text + template


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"tokenizer {tokenizer.name_or_path}" if tokenizer.name_or_path else "the tokenizer"
