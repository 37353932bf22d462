"""The loss is on the assistant's contents and end-of-turn tokens, and on nothing else, under any template."""

from __future__ import annotations

import copy
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lead_engine.base.errors import UserError
from lead_engine.pool.chat_template import render
from lead_engine.pool.problems import Problems
from lead_engine.pool.records import Message, Record
from lead_engine.pool.template import Sample, encode, response_mask
from lead_engine.pool.tokenizer import generation_prompt_ids

SINGLE = [("user", "How are you today?"), ("assistant", "I am fine, thank you!")]
MULTI = [
    ("system", "You are a helpful assistant."),
    ("user", "Say: the fox"),
    ("assistant", "The quick fox.\n\n    It jumps  over 3 dogs."),
    ("user", "And the assistant? I am fine."),
    ("assistant", "Grüße, 東京 \N{ROCKET}"),
]
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}


def record(turns: list[tuple[str, str]], line: int = 1) -> Record:
    return Record(f"id{line}", "", tuple(Message(*turn) for turn in turns), "pool.jsonl", line)


def encode_one(tokenizer: PreTrainedTokenizerFast, turns: list[tuple[str, str]], max_length: int = 4096) -> Sample:
    [sample] = encode([record(turns)], tokenizer, max_length)
    return sample


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def learnt_turns(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> list[str]:
    """The text of every run of response tokens."""
    runs: list[list[int]] = []
    previous = False
    for token, learnt in zip(sample.ids, sample.response, strict=True):
        if learnt:
            runs = [*runs, []] if not previous else runs
            runs[-1].append(token)
        previous = learnt
    return [decode(tokenizer, run) for run in runs]


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
@pytest.mark.parametrize("turns", [SINGLE, MULTI, MULTI[1:]], ids=["single", "system and turns", "turns"])
def test_learnt_text_is_the_answers_and_their_ends(
    name: str, turns: list[tuple[str, str]], request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    sample = encode_one(tokenizer, turns)
    # The [INST] template puts a space before the answer, which belongs to the answer's first token.
    learnt = [text.removeprefix(" ") if name == "mistral" else text for text in learnt_turns(tokenizer, sample)]
    assert learnt == [content + ENDS[name] for role, content in turns if role == "assistant"]
    text = render(tokenizer, [{"role": r, "content": c} for r, c in turns])
    assert sample.ids == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
def test_what_stands_before_an_answer_is_what_the_model_is_asked_with(
    name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    sample = encode_one(tokenizer, MULTI)
    asked = render(tokenizer, [{"role": r, "content": c} for r, c in MULTI[:-1]], prompt=True)
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert sample.ids[: len(prompt)] == prompt
    assert not sample.response[len(prompt) - 1]
    assert all(sample.response[len(prompt) : -1])


def test_white_space_after_the_end_of_turn_is_not_learnt(chatml: PreTrainedTokenizerFast) -> None:
    sample = encode_one(chatml, SINGLE)
    assert decode(chatml, sample.ids).endswith("<|im_end|>\n")
    assert sample.response[-2:] == [True, False]


def test_answers_that_end_in_white_space_keep_it(chatml: PreTrainedTokenizerFast) -> None:
    sample = encode_one(chatml, [("user", "q"), ("assistant", "code:\n    \n")])
    assert learnt_turns(chatml, sample) == ["code:\n    \n<|im_end|>"]


def test_white_space_tokens_with_trimmed_offsets_are_learnt(llama3: PreTrainedTokenizerFast) -> None:
    answer = "if a:\n        return a\n                \n    b"
    sample = encode_one(llama3, [("user", "q"), ("assistant", answer)])
    assert learnt_turns(llama3, sample) == [answer + "<|eot_id|>"]


blank_free = st.text(min_size=1, max_size=40).filter(lambda t: t.strip() and not t[0].isspace() and "<|" not in t)


@settings(max_examples=60, deadline=None)
@given(
    system=st.none() | st.text(max_size=20),
    turns=st.lists(st.tuples(st.text(max_size=30), blank_free), min_size=1, max_size=3),
)
def test_any_text_is_split_into_learnt_and_not(
    chatml: PreTrainedTokenizerFast, system: str | None, turns: list[tuple[str, str]]
) -> None:
    messages = [("system", system)] if system is not None else []
    for question, answer in turns:
        messages += [("user", question), ("assistant", answer)]
    sample = encode_one(chatml, messages)
    assert learnt_turns(chatml, sample) == [answer + "<|im_end|>" for _, answer in turns]
    rest = decode(chatml, [t for t, learnt in zip(sample.ids, sample.response, strict=True) if not learnt])
    asked = "".join(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n\n" for q, _ in turns)
    assert rest == ("" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n") + asked


def test_a_token_that_straddles_the_begin_is_learnt() -> None:
    offsets = [(0, 3), (3, 6), (6, 6), (6, 9), (9, 12)]
    assert response_mask(offsets, [(4, 9)]) == [False, True, True, True, False]
    assert response_mask(offsets, [(6, 9)]) == [False, False, False, True, False]
    assert response_mask(offsets, [(0, 3), (9, 12)]) == [True, False, False, False, True]


class TestTruncation:
    def test_samples_are_cut_and_counted(self, chatml: PreTrainedTokenizerFast) -> None:
        whole = encode_one(chatml, SINGLE)
        first = whole.response.index(True)
        problems = Problems()
        [cut] = encode([record(SINGLE)], chatml, first + 2, problems)
        assert cut.truncated
        assert not whole.truncated
        assert (cut.ids, cut.response) == (whole.ids[: first + 2], whole.response[: first + 2])
        assert problems.counts() == {"truncated": 1}

    def test_exactly_long_enough_is_not_cut(self, chatml: PreTrainedTokenizerFast) -> None:
        whole = encode_one(chatml, SINGLE)
        problems = Problems()
        [sample] = encode([record(SINGLE)], chatml, len(whole.ids), problems)
        assert not sample.truncated
        assert not problems.entries

    def test_samples_without_an_answer_before_the_cut_are_left_out(self, chatml: PreTrainedTokenizerFast) -> None:
        first = encode_one(chatml, SINGLE).response.index(True)
        problems = Problems()
        records = [record(SINGLE, 1), record([("assistant", "ok")], 2), record(SINGLE, 3)]
        assert [s.record.line for s in encode(records, chatml, first, problems)] == [2]
        assert [(p.kind, p.line) for p in problems.entries] == [
            ("response_truncated_away", 1),
            ("response_truncated_away", 3),
        ]

    def test_an_answer_of_which_only_the_first_token_is_left_teaches_nothing(
        self, chatml: PreTrainedTokenizerFast
    ) -> None:
        bare = copy.deepcopy(chatml)
        bare.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        problems = Problems()
        assert list(encode([record([("assistant", "fox dog")])], bare, 1, problems)) == []
        assert problems.counts() == {"response_truncated_away": 1}
        assert len(list(encode([record([("assistant", "fox dog")])], bare, 2))) == 1


class TestTemplatesThatDoNotFit:
    def test_none(self) -> None:
        from tokenizers import Tokenizer, models

        bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
        with pytest.raises(UserError, match=r"no chat template.*chat_template"):
            list(encode([record(SINGLE)], bare, 100))

    def test_a_conversation_that_the_template_refuses(self, mistral: PreTrainedTokenizerFast) -> None:
        twice = [("user", "a"), ("user", "b"), ("assistant", "c")]
        records = [record(SINGLE, 1), record(twice, 2), record(SINGLE, 3)]
        with pytest.raises(UserError, match=r"(?s)pool\.jsonl:2.*must alternate.*--skip-bad"):
            list(encode(records, mistral, 100))
        problems = Problems()
        assert [s.record.line for s in encode(records, mistral, 100, problems, skip_bad=True)] == [1, 3]
        assert [(p.kind, p.line) for p in problems.entries] == [("template_refused", 2)]

    def test_a_prefix_that_renders_differently(self, system_last: PreTrainedTokenizerFast) -> None:
        with pytest.raises(UserError, match=r"pool\.jsonl:1.*not a prefix"):
            list(encode([record(MULTI)], system_last, 4096))
        assert len(encode_one(system_last, MULTI[:3]).ids) > 0

    def test_reasoning_shown_only_in_the_last_answer(self, thinking: PreTrainedTokenizerFast) -> None:
        sample = encode_one(thinking, MULTI)
        assert learnt_turns(thinking, sample) == [
            MULTI[2][1] + "<|im_end|>",
            "<think>\n\n</think>\n\n" + MULTI[4][1] + "<|im_end|>",
        ]


def test_batches_change_nothing(chatml: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record([("user", "q " * (i % 7)), ("assistant", f"answer {i}")], i) for i in range(23)]
    whole = list(encode(records, chatml, 64))
    monkeypatch.setattr("lead_engine.pool.template.BATCH", 4)
    assert list(encode(iter(records), chatml, 64)) == whole
    assert [s.record for s in whole] == records


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chatml", "<|im_start|>assistant\n"),
        ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("mistral", "<s>"),
    ],
)
def test_generation_prompt(name: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    ids = generation_prompt_ids(tokenizer)
    assert re.sub(" $", "", decode(tokenizer, ids)) == text
