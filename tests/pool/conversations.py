"""Conversations and records that the tests of rendering make, and what they ask of a rendering."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lead_engine.pool.marks import Misfit
from lead_engine.pool.records import Message, Record
from lead_engine.pool.rendering import Rendered, Renderer
from tests.pool.templates import FAMILIES, tokenizer_of

Turns = list[tuple[str, str]]
QUESTION: Turns = [("user", "What is two plus two?"), ("assistant", "It is four.")]
THINKING: Turns = [QUESTION[0], ("assistant", "<think>\nTwo and two.</think>It is four.")]
SYSTEM: Turns = [("system", "Answer in French only."), *QUESTION]

words = st.sampled_from(
    [
        "a",
        "e",
        "|",
        "user",
        "assistant",
        "model",
        "system",
        "[INST]",
        "<|im_end|>",
        "<|user|>",
        "</s>",
        "User:",
        "\n",
        " x\n",
        "It is four.",
        "  indented",
        "trailing \n\n",
        "Grüße 東京 \N{ROCKET}",
        "{{ bos_token }}",
        "\\n",
        '"quoted"',
        "\U000f0000",
    ]
)
texts = st.lists(words | st.text(max_size=8), min_size=1, max_size=3).map("".join)
answers = texts.filter(lambda text: text.strip())
thoughts = st.builds("<think>{}</think>{}".format, texts, answers)


@st.composite
def conversations(draw: st.DrawFn, answer: st.SearchStrategy[str] = answers) -> Turns:
    turns: Turns = [("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [("user", draw(texts)), ("assistant", draw(answer))]
    return turns


def record_of(turns: Turns, **more: Any) -> Record:
    return Record("id", "", tuple(Message(*turn) for turn in turns), "pool.jsonl", 1, **more)


def learned(rendered: Rendered) -> list[str]:
    return [rendered.text[begin:end] for begin, end in rendered.answers]


def misfit(renderer: Renderer, record: Record) -> Misfit:
    with pytest.raises(Misfit) as caught:
        renderer.record(record)
    return caught.value


def with_template(chatml: PreTrainedTokenizerFast, template: str, family: str = "chatml") -> Renderer:
    return Renderer(tokenizer_of(chatml, FAMILIES[family]._replace(template=template)))
