"""Records to tokens through the tokenizer's chat template, with a mask of the tokens on which the loss is taken.

The loss is on every assistant turn, its content and its end-of-turn token, and on nothing else. Where a turn lies in
the text is found by rendering prefixes of the conversation: turn i begins where the rendering of messages[:i] with the
generation prompt ends, because that is the text which the model answers when it is used, and ends where the rendering
of messages[:i + 1] ends. Characters become tokens by the fast tokenizer's offsets. White space after the end-of-turn
token belongs to the template, not to the response.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from lead_engine.errors import UserError
from lead_engine.pool.problems import Problems, place
from lead_engine.pool.records import Message, Record

BATCH = 256
"""Records tokenised by one call; the tokenizer spreads them over the cores."""


class Sample(NamedTuple):
    """One record as tokens. `response` marks the tokens to learn; `truncated` says whether the sample was cut at
    max_length.
    """

    ids: list[int]
    response: list[bool]
    record: Record
    truncated: bool


class Unrenderable(UserError):
    """The chat template and the conversation do not fit together."""


def encode(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    problems: Problems | None = None,
    *,
    skip_bad: bool = False,
) -> Iterator[Sample]:
    """Tokens and response mask of each record, in order, cut at `max_length` tokens.

    Adds to `problems`: `truncated` (the sample is yielded, cut), `response_truncated_away` (no learnable token is left
    before the cut; the record is left out) and, only with `skip_bad`, `template_refused` (left out). Raises UserError
    where the tokenizer has no chat template or gives no offsets, and, without `skip_bad`, where the template refuses a
    conversation or renders it so that the answers cannot be found in the text.
    """
    check_tokenizer(tokenizer)
    problems = Problems() if problems is None else problems
    iterator = iter(records)
    while batch := list(islice(iterator, BATCH)):
        rendered = []
        for record in batch:
            try:
                rendered.append((record, *answer_spans(tokenizer, record.messages)))
            except Unrenderable as error:
                if not skip_bad:
                    raise UserError(
                        f"{place(record.file, record.line)}: {error}; use a model with another chat template, "
                        "mend the record, or leave such records out with --skip-bad"
                    ) from None
                problems.add("template_refused", record.file, record.line, str(error))
        if rendered:
            yield from _tokenise(rendered, tokenizer, max_length, problems)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError unless the tokenizer has a chat template and gives character offsets."""
    name = f"tokenizer {tokenizer.name_or_path}" if tokenizer.name_or_path else "the tokenizer"
    if not tokenizer.chat_template:
        raise UserError(
            f"{name} has no chat template; take an instruction-tuned variant of --model, or set `chat_template` "
            "in its tokenizer_config.json (or chat_template.jinja)"
        )
    if not tokenizer.is_fast:
        raise UserError(f"{name} is not a fast tokenizer, so it cannot say which characters a token covers; --model needs a tokenizer.json")


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, prompt: bool = False) -> str:
    """The conversation as text; with `prompt`, followed by what asks for the assistant's answer."""
    # A batch of one: transformers takes an empty conversation only inside a batch.
    return tokenizer.apply_chat_template([list(messages)], tokenize=False, add_generation_prompt=prompt)[0]


def answer_spans(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and for every assistant turn the characters [begin, end) of its content and end-of-turn
    token.

    Raises Unrenderable (a UserError) where the template refuses the conversation or the answers cannot be found in it.
    """
    turns = [m.as_turn() for m in messages]
    try:
        text = render(tokenizer, turns)
        spans = []
        for i, message in enumerate(messages):
            if message.role == "assistant":
                prompt = render(tokenizer, turns[:i], prompt=True)
                through = text if i + 1 == len(turns) else render(tokenizer, turns[: i + 1])
                spans.append(_span(text, prompt, through, message.content))
    except jinja2.TemplateError as error:
        raise Unrenderable(f"the chat template refuses the conversation ({error})") from None
    return text, spans


def _span(text: str, prompt: str, through: str, content: str) -> tuple[int, int]:
    begin, end = len(prompt), len(through.rstrip())
    if text.startswith(prompt):
        if text.startswith(through[:end]) and begin < end:
            return begin, end
        # Templates such as Qwen3's render the last answer differently (with its reasoning) from the same answer further
        # up, so that `through` is no prefix. Then the answer itself must stand at `begin`, followed by what follows it
        # in `through`.
        content = content.strip()
        begin_content = begin + len(text[begin:]) - len(text[begin:].lstrip())
        end_of_turn = through[:end].rpartition(content)[2]
        if content and end_of_turn and text.startswith(content + end_of_turn, begin_content):
            return begin, begin_content + len(content) + len(end_of_turn)
    raise Unrenderable(
        "the chat template's rendering of the first turns is not a prefix of its rendering of the whole conversation, "
        "so the answer cannot be told from the rest"
    )


def _tokenise(
    rendered: list[tuple[Record, str, list[tuple[int, int]]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    problems: Problems,
) -> Iterator[Sample]:
    # The template has written the special tokens already.
    tokens = tokenizer(
        [text for _, text, _ in rendered],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    for (record, _, spans), ids, offsets in zip(rendered, tokens["input_ids"], tokens["offset_mapping"], strict=True):
        response = response_mask(offsets[:max_length], spans)
        length = len(ids)
        if not any(response[1:]):  # the first token is predicted by nothing
            problems.add("response_truncated_away", record.file, record.line, f"no answer within {max_length} of {length} tokens")
            continue
        if length > max_length:
            problems.add("truncated", record.file, record.line, f"{length} tokens, cut at {max_length}")
        yield Sample(ids[:max_length], response, record, length > max_length)


def response_mask(offsets: Sequence[tuple[int, int]], spans: Iterable[tuple[int, int]]) -> list[bool]:
    """Which tokens overlap one of the spans, given each token's characters [start, stop).

    Tokenizers that trim offsets give a token of spaces the empty range at its end; it counts as the character before
    that place.
    """
    starts, stops = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    response = np.zeros(len(starts), dtype=bool)
    for begin, end in spans:
        response |= (stops > begin) & (starts < end)
    return response.tolist()
