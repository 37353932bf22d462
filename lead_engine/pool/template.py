"""Records to tokens through the tokenizer's chat template, with a mask of the tokens on which the loss is taken.

The loss is on every assistant turn that is to be learned, its content and its end-of-turn token, and on nothing else;
`rendering` finds them in the text. Characters become tokens by the fast tokenizer's offsets. White space after the
end-of-turn token belongs to the template, not to the response. A control token that a record's text spells is text:
it becomes the tokens of its characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lead_engine.base.errors import UserError
from lead_engine.pool.chat_template import check_tokenizer
from lead_engine.pool.marks import Misfit
from lead_engine.pool.problems import Problems, place
from lead_engine.pool.records import Record
from lead_engine.pool.rendering import Rendered, Renderer
from lead_engine.pool.special_tokens import spell

BATCH = 256
"""Records tokenised by one call; the tokenizer spreads them over the cores."""


class Sample(NamedTuple):
    """One record as tokens."""

    ids: list[int]
    response: list[bool]
    """Which tokens are learned."""
    record: Record
    truncated: bool
    """Whether the sample was cut at max_length."""


def encode(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    problems: Problems | None = None,
    *,
    skip_bad: bool = False,
) -> Iterator[Sample]:
    """Tokens and response mask of each record, in order, cut at `max_length` tokens.

    What the template makes of records is added to `problems` (the class describes the kinds):
    - left out: template_refused, template_drops_text, template_changes_text, answer_not_found, text_behind_answer,
      control_token_in_text;
    - left out, and counted only: response_truncated_away, nothing_to_learn;
    - yielded, and counted only: truncated, spelled_control_token, asked_otherwise, ended_otherwise, no_end_of_turn.
    Raises UserError where the tokenizer has no chat template that can be read or gives no offsets, and, without
    `skip_bad`, after the last record if any was refused: the message names up to 5 of a kind.
    """
    check_tokenizer(tokenizer)
    problems = Problems() if problems is None else problems
    renderer = Renderer(tokenizer)
    remaining, any_refused, yielded = iter(records), False, 0
    while batch := list(islice(remaining, BATCH)):
        rendered = _rendered(batch, renderer, problems)
        any_refused = any_refused or len(rendered) < len(batch)
        if rendered and (skip_bad or not any_refused):  # once one is refused, the others are only looked at
            for sample in _samples(rendered, renderer, max_length, problems):
                yielded += 1
                yield sample
    if any_refused and not (skip_bad and yielded):
        problems.refuse("No record is left." if skip_bad else "")


def _rendered(batch: list[Record], renderer: Renderer, problems: Problems) -> list[tuple[Record, Rendered]]:
    """The records that the template renders as they are; the others become problems."""
    rendered = []
    for record in batch:
        try:
            rendered.append((record, renderer.record(record)))
        except Misfit as misfit:
            problems.add(misfit.kind, record.file, record.line, str(misfit))
    return rendered


def prompt_ids(renderer: Renderer, record: Record) -> list[int]:
    """The tokens with which the record's last answer is asked for.

    Raises UserError where the template does not render the turns before it as they are.
    """
    try:
        [tokens] = _tokenise([renderer.prompt(record.messages[:-1], record.tools)], renderer)
    except Misfit as misfit:
        raise UserError(f"{place(record.file, record.line)}: {misfit}") from None
    return tokens.ids


class _Tokens(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]
    spelled: list[str]
    """Control tokens that the record's own text spells; their characters were tokenised."""


def _samples(
    rendered: list[tuple[Record, Rendered]], renderer: Renderer, max_length: int, problems: Problems
) -> Iterator[Sample]:
    """The samples that have something to learn."""
    tokenised = _tokenise([text for _, text in rendered], renderer)
    for (record, text), tokens in zip(rendered, tokenised, strict=True):
        length = len(tokens.ids)
        if not text.answers:
            reason = "every answer is marked as not to be trained"
            problems.add("nothing_to_learn", record.file, record.line, reason)
            continue
        response = response_mask(tokens.offsets[:max_length], text.answers)
        if not any(response[1:]):  # nothing predicts the first token
            reason = f"no answer within {max_length} of {length} tokens"
            problems.add("response_truncated_away", record.file, record.line, reason)
            continue
        for kind, detail in _notes(text, tokens.spelled):
            problems.add(kind, record.file, record.line, detail)
        if length > max_length:
            problems.add("truncated", record.file, record.line, f"{length} tokens, cut at {max_length}")
        yield Sample(tokens.ids[:max_length], response, record, length > max_length)


def _notes(text: Rendered, spelled: list[str]) -> Iterator[tuple[str, str]]:
    """(kind, detail) of what is counted and refuses nothing."""
    if spelled:
        yield "spelled_control_token", f"its text spells {', '.join(spelled)}: tokenised as text"
    if text.unasked:
        yield "asked_otherwise", f"the model is asked with {text.unasked!r}, the answer begins without"
    if text.other_end:
        behind = f"{text.other_end} stands behind an earlier answer, another token behind the last"
        yield "ended_otherwise", f"{behind}: learned to its text's end"
    if text.open_end:
        yield "no_end_of_turn", "no control token ends its answers: a model learns no end from it"


def _tokenise(rendered: list[Rendered], renderer: Renderer) -> Iterator[_Tokens]:
    # The template has written the special tokens already.
    tokens = renderer.tokenizer(
        [each.text for each in rendered],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    for each, ids, offsets in zip(rendered, tokens["input_ids"], tokens["offset_mapping"], strict=True):
        forged = [m for begin, end in each.contents for m in renderer.control_pattern.finditer(each.text, begin, end)]
        yield _spelled_out(ids, offsets, forged, renderer) if forged else _Tokens(ids, offsets, [])


def _spelled_out(
    ids: list[int], offsets: list[tuple[int, int]], forged: list[re.Match[str]], renderer: Renderer
) -> _Tokens:
    """The tokens, with those of their characters in the place of the control tokens `forged`."""
    match_of = {match.start(): match for match in forged}
    new_ids: list[int] = []
    new_offsets: list[tuple[int, int]] = []
    for index, (start, stop) in zip(ids, offsets, strict=True):
        match = None
        if index in renderer.control_ids:  # a token may take white space with it, so it need not begin at `start`
            match = next((match_of[place] for place in range(start, stop) if place in match_of), None)
        spelled = [index] if match is None else spell(renderer.tokenizer, match.string[start:stop])
        new_ids += spelled
        new_offsets += [(start, stop)] * len(spelled)
    return _Tokens(new_ids, new_offsets, sorted({match[0] for match in forged}))


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
