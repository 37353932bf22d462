"""Whatever the template: each text of the record stands in what is trained, each answer in its span, or it is said."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from transformers import PreTrainedTokenizerFast

from lead_engine.pool.chat_template import fold_system
from lead_engine.pool.marks import Misfit
from lead_engine.pool.records import Message, Record
from lead_engine.pool.rendering import Renderer
from tests.pool.conversations import (
    QUESTION,
    SYSTEM,
    THINKING,
    Turns,
    answers,
    conversations,
    learned,
    misfit,
    record_of,
    thoughts,
    with_template,
)
from tests.pool.templates import FAMILIES, Family, tokenizer_of


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(turns=conversations())
def test_no_family_gives_a_false_alarm(renderers: dict[str, Renderer], name: str, turns: Turns) -> None:
    family = FAMILIES[name]
    if not family.system:
        turns = [turn for turn in turns if turn[0] != "system"]
    rendered = renderers[name].record(record_of(turns))
    given = [content.strip() for role, content in turns if role == "assistant"]
    for text, answer in zip(learned(rendered), given, strict=True):
        text = text.removeprefix("<think>\n\n</think>\n\n").removesuffix("\n<|endoftext|>" if name == "phi3" else "")
        assert text.endswith(family.end)
        assert text.removesuffix(family.end).strip() == answer
    places = sorted(rendered.contents)
    assert [rendered.text[b:e].strip() for b, e in places] == [text.strip() for _, text in turns if text.strip()]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
    assert bool(rendered.unasked) == (name == "deepseek-r1")
    assert rendered.open_end == (name == "alpaca")


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(turns=conversations(thoughts | answers))
def test_reasoning_is_learned_whole_or_refused(renderers: dict[str, Renderer], name: str, turns: Turns) -> None:
    if not FAMILIES[name].system:
        turns = [turn for turn in turns if turn[0] != "system"]
    cuts = {"qwen3": turns[:-1], "deepseek-r1": turns}.get(name, [])
    cut = any("</think>" in content for role, content in cuts if role == "assistant")
    if cut:
        assert misfit(renderers[name], record_of(turns)).kind in ("template_changes_text", "template_drops_text")
        return
    blank_free = ["".join(text.split()) for text in learned(renderers[name].record(record_of(turns)))]
    for (_, answer), text in zip([turn for turn in turns if turn[0] == "assistant"], blank_free, strict=True):
        assert "".join(answer.split()).removeprefix("<think>") in text


EATERS = {
    "drops system": ("{% for message in messages", "{% for message in messages if message['role'] != 'system'"),
    "drops users": ("{% for message in messages", "{% for message in messages if message['role'] != 'user'"),
    "upper": ("message['content']", "message['content'] | upper"),
    "escape": ("message['content']", "message['content'] | escape"),
    "tojson": ("message['content']", "(message['content'] | tojson)[1:-1]"),
    "cuts": ("message['content']", "message['content'][:12]"),
    "cuts the start": ("message['content']", "message['content'][1:]"),
    "one line": ("message['content']", "message['content'] | replace('\\n', ' ')"),
    "first word": ("message['content']", "message['content'].split(' ')[0]"),
    "last word": ("message['content']", "message['content'].split(' ')[-1]"),
    "parts": ("message['content']", "message['content'][0]['text']"),
    "reversed": ("{% for message in messages", "{% for message in messages[::-1]"),
}


@pytest.mark.parametrize("eater", ["drops system", "drops users"])
def test_what_a_template_drops_is_refused_in_every_record(chatml: PreTrainedTokenizerFast, eater: str) -> None:
    """What is kept of one record's rendering must not let the next one of its shape lose a text."""
    renderer = with_template(chatml, FAMILIES["chatml"].template.replace(*EATERS[eater]))
    for word in "abc":
        turns = [(role, f"{content} {word}") for role, content in SYSTEM]
        assert misfit(renderer, record_of(turns)).kind == "template_drops_text"


@pytest.mark.parametrize("eater", EATERS)
@settings(max_examples=25, deadline=None)
@given(turns=conversations())
def test_what_a_template_eats_or_changes_is_refused(chatml: PreTrainedTokenizerFast, eater: str, turns: Turns) -> None:
    template = FAMILIES["chatml"].template
    renderer = with_template(chatml, template.replace(*EATERS[eater]))
    try:
        rendered = renderer.record(record_of(turns))
    except Misfit:
        return
    true = Renderer(tokenizer_of(chatml, FAMILIES["chatml"])).record(record_of(turns))
    answers = [[text.removesuffix("<|im_end|>").strip() for text in learned(each)] for each in (rendered, true)]
    assert answers[0] == answers[1]
    standing = [rendered.text[b:e].strip() for b, e in sorted(rendered.contents)]
    assert standing == [text.strip() for _, text in turns if text.strip()]


def test_messages_name_the_turn_and_show_where_the_texts_part(chatml: PreTrainedTokenizerFast) -> None:
    template = FAMILIES["chatml"].template
    upper = with_template(chatml, template.replace(*EATERS["upper"]))
    error = misfit(upper, record_of(QUESTION))
    assert error.kind == "template_changes_text"
    assert "turn 1 (user): the record has 'What is two" in str(error)
    assert "the text 'WHAT IS TWO" in str(error)
    error = misfit(with_template(chatml, template.replace(*EATERS["drops system"])), record_of(SYSTEM))
    assert error.kind == "template_drops_text"
    assert "turn 1 (system)" in str(error)
    assert "'Answer in French only.'" in str(error)


def test_reasoning_that_a_template_cuts_is_refused(renderers: dict[str, Renderer]) -> None:
    assert misfit(renderers["deepseek-r1"], record_of(THINKING)).kind == "template_changes_text"
    assert "<think>" in str(misfit(renderers["deepseek-r1"], record_of(THINKING)))
    assert misfit(renderers["qwen3"], record_of([*THINKING, *QUESTION])).kind == "template_changes_text"
    assert learned(renderers["qwen3"].record(record_of([*QUESTION, *THINKING])))[1] == (
        "<think>\nTwo and two.\n</think>\n\nIt is four.<|im_end|>"
    )


CALL = {"function": {"name": "get_weather", "arguments": {"city": 'Li"lle', "days": 2}}}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": {}}}


def tool_record(**more: Any) -> Record:
    messages = (
        Message("user", "Weather?"),
        Message("assistant", "", extra={"tool_calls": [CALL]}),
        Message("tool", "Rain.", extra={"name": "get_weather"}),
        Message("assistant", "It rains."),
    )
    return Record("", "", messages, "pool.jsonl", 1, **more)


def test_tools_calls_and_their_results_stand_in_the_text(renderers: dict[str, Renderer]) -> None:
    rendered = renderers["qwen2.5"].record(tool_record(tools=[TOOL]))
    assert '"name": "get_weather", "description"' in rendered.text
    call, answer = learned(rendered)
    assert '{"name": "get_weather", "arguments": {"city": "Li\\"lle", "days": 2}}' in call
    assert answer == "It rains.<|im_end|>"


@pytest.mark.parametrize(
    ("cut", "name"),
    [
        ("tool | tojson", "a tool's name in the record's tools"),
        ("call.arguments | tojson", "a tool call's argument"),
        ("call.name", "a tool's name in turn 2"),
        ("message.content }}{{- '\\n</tool_response>'", "turn 3 (tool)"),
    ],
)
def test_a_template_that_ignores_part_of_a_tool_call(chatml: PreTrainedTokenizerFast, cut: str, name: str) -> None:
    kept = "'' }}{{- '\\n</tool_response>'" if "response" in cut else "''"
    renderer = with_template(chatml, FAMILIES["qwen2.5"].template.replace(cut, kept), "qwen2.5")
    error = misfit(renderer, tool_record(tools=[TOOL]))
    assert error.kind == "template_drops_text"
    assert name in str(error)


def test_reasoning_content_stands_in_the_text_or_is_missed(renderers: dict[str, Renderer]) -> None:
    messages = (Message("user", "q"), Message("assistant", "Four.", extra={"reasoning_content": "Two and two."}))
    record = Record("", "", messages, "pool.jsonl", 1)
    assert learned(renderers["qwen3"].record(record)) == ["<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>"]
    assert "the reasoning_content of turn 2" in str(misfit(renderers["chatml"], record))


ERRORS = {
    "{{ raise_exception('no') }}": r"refuses the conversation \(no\)",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ messages[99]['role'] + 'x' }}": "UndefinedError",
    "{{ messages[0]['content'] + 1 }}": "TypeError",
    "{{ messages[0]['content'].index('\\0') }}": "ValueError",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "RecursionError",
    "{{ range(999999999) }}": "OverflowError",
    "{{ messages.append(1) }}": "SecurityError",
}


@pytest.mark.parametrize("template", ERRORS)
def test_whatever_a_template_raises_is_the_records_problem(chatml: PreTrainedTokenizerFast, template: str) -> None:
    with pytest.raises(Misfit, match=ERRORS[template]) as caught:
        with_template(chatml, template).record(record_of(QUESTION))
    assert caught.value.kind == "template_refused"


def test_who_has_no_system_message_is_told_how_to_fold_it(chatml: PreTrainedTokenizerFast) -> None:
    asked = (("system", "Be brief."), *QUESTION)
    drops = "{% for m in messages if m.role != 'system' %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + drops
    for template in (drops, refuses):
        with pytest.raises(Misfit, match="--fold-system"):
            with_template(chatml, template).record(record_of(asked))


@settings(max_examples=20, deadline=None)
@given(turns=conversations())
def test_system_messages_are_folded_on_request(chatml: PreTrainedTokenizerFast, turns: Turns) -> None:
    tokenizer = tokenizer_of(chatml, FAMILIES["gemma"])
    fold_system(tokenizer)
    folded = Renderer(tokenizer).record(record_of(turns))
    if turns[0][0] == "system":
        turns = [("user", turns[0][1] + "\n\n" + turns[1][1]), *turns[2:]]
    by_hand = Renderer(tokenizer_of(chatml, FAMILIES["gemma"])).record(record_of(turns))
    assert folded.text == by_hand.text
    assert folded.answers == by_hand.answers


def test_many_conversations_of_one_shape_are_as_each_alone(chatml: PreTrainedTokenizerFast) -> None:
    family: Family = FAMILIES["qwen3"]
    one = Renderer(tokenizer_of(chatml, family))
    for turns in (THINKING, QUESTION, [*SYSTEM, *QUESTION], [*SYSTEM, *THINKING], QUESTION):
        alone = Renderer(tokenizer_of(chatml, family)).record(record_of(turns))
        assert one.record(record_of(turns)) == alone
