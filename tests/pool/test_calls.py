"""Templates that take tool calls and end answers in ways of their own: DeepSeek, SmolLM3, Gemma 4, gpt-oss."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from lead_engine.pool.marks import Misfit
from lead_engine.pool.problems import Problems
from lead_engine.pool.records import Message, Record
from lead_engine.pool.rendering import Renderer
from lead_engine.pool.template import encode
from tests.pool.templates import Family, tokenizer_of

CALL = {"function": {"name": "get_weather", "arguments": {"city": 'Lille "Nord"'}}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
QUESTION = Message("user", "Weather?")
CALLING = Message("assistant", "", extra={"tool_calls": [CALL]})
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|return|>", "<|quote|>", "<|result|>")


def family(calls: str, end: str = "<|im_end|>") -> Family:
    """Tools first, as Python writes them; `calls` is what is written of one of `call`, `end` what ends an answer."""
    template = (
        "{{ tools | string if tools else '' }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
        "{{ message.content }}{% for call in message.tool_calls or [] %}" + calls + "{% endfor %}"
        "{% if message.role == 'assistant' and not message.tool_calls %}" + end + "{% elif not message.tool_calls %}"
        "{{ '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return Family(template, SPECIAL, "<|im_end|>", "<|im_end|>")


@pytest.mark.parametrize("calls", ["{{ call.function.arguments + '' }}", "{{ call.function.arguments }}"])
def test_arguments_are_json_text_where_the_template_takes_or_writes_no_object(
    chatml: PreTrainedTokenizerFast, calls: str
) -> None:
    renderer = Renderer(tokenizer_of(chatml, family("{{ call.function.name }}" + calls + "{{ '<|im_end|>' }}")))
    rendered = renderer.record(Record("", "", (QUESTION, CALLING), "pool.jsonl", 1, tools=[TOOL]))
    [(begin, end)] = rendered.answers
    assert rendered.text[begin:end] == 'get_weather{"city": "Lille \\"Nord\\""}<|im_end|>'
    assert rendered.text.startswith(str([TOOL]))


def test_a_call_closed_by_control_tokens_ends_at_the_last(chatml: PreTrainedTokenizerFast) -> None:
    city = "{{ call.function.name + '<|quote|>' + call.function.arguments.city + '<|quote|><|result|>' }}"
    renderer = Renderer(tokenizer_of(chatml, family(city)))
    rendered = renderer.record(Record("", "", (QUESTION, CALLING), "pool.jsonl", 1))
    [(begin, end)] = rendered.answers
    assert rendered.text[begin:end] == 'get_weather<|quote|>Lille "Nord"<|quote|><|result|>'


def test_another_end_behind_an_earlier_answer_is_not_learned(chatml: PreTrainedTokenizerFast) -> None:
    end = "{{ '<|return|>' if loop.last else '<|im_end|>' }}"
    tokenizer = tokenizer_of(chatml, family("", end))
    messages = (QUESTION, Message("assistant", "Sun."), QUESTION, Message("assistant", "Rain."))
    problems = Problems()
    [sample] = encode([Record("", "", messages, "pool.jsonl", 1)], tokenizer, 512, problems)
    learned = [index for index, response in zip(sample.ids, sample.response, strict=True) if response]
    assert tokenizer.decode(learned) == "Sun.Rain.<|return|>"
    assert problems.counts() == {"ended_otherwise": 1}


def test_a_tools_result_is_never_learned(chatml: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer_of(chatml, family("{{ call.function.name + call.function.arguments.city }}")))
    messages = (QUESTION, CALLING, Message("tool", "Rain."), Message("assistant", "It rains."))
    with pytest.raises(Misfit, match="no end of turn stands before the next turn"):
        renderer.record(Record("", "", messages, "pool.jsonl", 1))
