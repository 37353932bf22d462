"""Where an answer is learned: from where the request for it ends to its end of turn, whatever the template."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from transformers import PreTrainedTokenizerFast

from lead_engine.pool.records import Message, Record
from lead_engine.pool.rendering import Renderer
from tests.pool.conversations import (
    QUESTION,
    Turns,
    conversations,
    learned,
    misfit,
    record_of,
    with_template,
)
from tests.pool.templates import FAMILIES, tokenizer_of

OPENS = "{{'<|im_start|>assistant\\n<think>\\n'}}"


@pytest.mark.parametrize(
    ("answer", "text", "unasked"),
    [
        ("<think>\nTwo.</think>Four.", "Two.</think>Four.<|im_end|>", ""),
        ("<think>Two.</think>Four.", "Two.</think>Four.<|im_end|>", ""),
        ("Four.", "Four.<|im_end|>", "<think>\n"),
        ("<b>Four.</b>", "<b>Four.</b><|im_end|>", "<think>\n"),
    ],
)
def test_a_generation_prompt_that_opens_the_reasoning(
    chatml: PreTrainedTokenizerFast, answer: str, text: str, unasked: str
) -> None:
    template = FAMILIES["chatml"].template.replace("{{ '<|im_start|>assistant\\n' }}", OPENS)
    rendered = with_template(chatml, template).record(record_of([QUESTION[0], ("assistant", answer), *QUESTION]))
    assert learned(rendered) == [text, "It is four.<|im_end|>"]
    assert rendered.unasked == "<think>\n" if unasked else rendered.unasked


def test_a_prompt_that_the_answer_does_not_follow_is_refused(chatml: PreTrainedTokenizerFast) -> None:
    template = FAMILIES["chatml"].template.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>bot\\n' }}")
    error = misfit(with_template(chatml, template), record_of(QUESTION))
    assert error.kind == "answer_not_found"
    assert "'bot\\n'" in str(error)
    assert "'assistant\\nIt is four." in str(error)


@pytest.mark.parametrize("name", ["chatml", "llama3", "phi3", "gemma", "zephyr", "smollm"])
@settings(max_examples=10, deadline=None)
@given(turns=conversations())
def test_a_template_that_always_asks_is_cut_to_the_end_of_turn(
    renderers: dict[str, Renderer], chatml: PreTrainedTokenizerFast, name: str, turns: Turns
) -> None:
    turns = [turn for turn in turns if FAMILIES[name].system or turn[0] != "system"]
    template = FAMILIES[name].template.replace("add_generation_prompt", "true")
    rendered = with_template(chatml, template, name).record(record_of(turns))
    whole = renderers[name].record(record_of(turns))
    assert learned(rendered) == [text.removesuffix("\n<|endoftext|>") for text in learned(whole)]
    assert rendered.text == whole.text.removesuffix("<|endoftext|>")


def test_always_asking_with_a_default_system_prompt_and_another_eos_is_refused(chatml: PreTrainedTokenizerFast) -> None:
    family = FAMILIES["smollm"]
    template = family.template.replace("add_generation_prompt", "true")
    renderer = Renderer(tokenizer_of(chatml, family._replace(template=template, eos="<|endoftext|>")))
    error = misfit(renderer, record_of(QUESTION))
    assert error.kind == "text_behind_answer"
    assert "<|im_start|>assistant" in str(error)


def test_always_asking_in_plain_text_is_refused_for_one_turn_and_for_more(chatml: PreTrainedTokenizerFast) -> None:
    renderer = with_template(chatml, FAMILIES["alpaca"].template.replace("add_generation_prompt", "true"), "alpaca")
    for turns in (QUESTION, QUESTION + QUESTION):
        error = misfit(renderer, record_of(turns))
        assert error.kind == "text_behind_answer"
        assert "### Response" in str(error)


def test_turns_that_are_not_trained_are_no_answers(renderers: dict[str, Renderer]) -> None:
    wrong = Message("assistant", "wrong", train=False)
    messages = (Message("user", "q"), wrong, Message("user", "r"), Message("assistant", "right"))
    rendered = renderers["chatml"].record(Record("", "", messages, "pool.jsonl", 1))
    assert learned(rendered) == ["right<|im_end|>"]
    assert "wrong" in rendered.text
