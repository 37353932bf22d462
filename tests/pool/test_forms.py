"""What changes a sample is honoured, or refused by its name; any other field is named once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lead_engine.base.errors import UserError
from lead_engine.pool import forms as forms_module
from lead_engine.pool import sources
from lead_engine.pool import turns as turns_module
from lead_engine.pool.records import Message, Record, read_records

QUESTION = {"role": "user", "content": "What is two plus two?"}
ANSWER = {"role": "assistant", "content": "It is four."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add"}}


def read_one(tmp_path: Path, record: Any) -> Record:
    (tmp_path / "one.jsonl").write_text(json.dumps(record))
    [found], problems = read_records([str(tmp_path / "one.jsonl")], skip_bad=False)
    assert not problems.entries
    return found


def turns(*messages: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(*message) for message in messages)


def refused(tmp_path: Path, record: Any) -> tuple[str, str]:
    """Kind and detail of the problem that the record is."""
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({**record, "id": "bad"}) + "\n" + json.dumps({"messages": [QUESTION, ANSWER]}))
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        read_records([str(path)], skip_bad=False)
    records, problems = read_records([str(path)], skip_bad=True)
    assert len(records) == 1
    return problems.entries[0].kind, problems.entries[0].detail


class TestFieldsThatChangeWhatIsTrained:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *(("weight", value) for value in (0, 0.0, False, "0")),
            *((name, False) for name in ("train", "training", "trainable", "loss")),
            ("loss_mask", 0),
            ("masked", True),
        ],
    )
    def test_a_turn_that_is_not_trained(self, tmp_path: Path, field: str, value: Any) -> None:
        wrong = {"role": "assistant", "content": "WRONG", field: value}
        learned = {**ANSWER, field: not value if isinstance(value, bool) else 1}
        record = read_one(tmp_path, {"messages": [QUESTION, wrong, QUESTION, learned]})
        assert [m.train for m in record.messages if m.role == "assistant"] == [False, True]
        assert record.messages[1] == Message("assistant", "WRONG", train=False)
        # What follows the last trained answer bears no loss; the record ends there.
        record = read_one(tmp_path, {"messages": [QUESTION, learned, QUESTION, wrong]})
        assert record.messages == turns(("user", QUESTION["content"]), ("assistant", ANSWER["content"]))

    @pytest.mark.parametrize(
        ("record", "kind", "detail"),
        [
            ({"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}, "bad_weight", "'weight' of message 2 is 0.5"),
            ({"messages": [QUESTION, {**ANSWER, "train": "yes"}]}, "bad_weight", "'train' of message 2 is 'yes'"),
            ({"messages": [QUESTION, {**ANSWER, "weight": [1]}]}, "bad_weight", "'weight'"),
            (
                {"messages": [QUESTION, {**ANSWER, "weight": 0, "train": True}]},
                "conflicting_fields",
                "'weight' and 'train'",
            ),
            ({"messages": [{**QUESTION, "train": True}, ANSWER]}, "unsupported_field", "message 1 asks for a loss"),
            ({"messages": [QUESTION, {**ANSWER, "weight": 0}]}, "no_trained_answer", "every answer"),
            ({"messages": [QUESTION, ANSWER], "weight": 0}, "no_trained_answer", "'weight' is 0"),
            ({"messages": [QUESTION, ANSWER], "train": False}, "no_trained_answer", "'train' is False"),
            ({"messages": [QUESTION, ANSWER], "weight": 2.5}, "bad_weight", "'weight' is 2.5"),
            (
                {"messages": [QUESTION, ANSWER], "chat_template_kwargs": {"a": 1}},
                "unsupported_field",
                "chat_template_kwargs",
            ),
            ({"messages": [QUESTION, ANSWER], "images": ["a.png"]}, "not_text", "'images'"),
            ({"messages": [{**QUESTION, "images": ["a.png"]}, ANSWER]}, "not_text", "'images' of message 1"),
            ({"messages": [{**QUESTION, "tool_calls": [CALL]}, ANSWER]}, "unsupported_field", "tool_calls"),
            ({"messages": [QUESTION, {**ANSWER, "tool_calls": [{"id": "1"}]}]}, "wrong_type", "name of a function"),
            ({"messages": [QUESTION, {**ANSWER, "tool_calls": "add(2)"}]}, "wrong_type", "tool_calls of message 2"),
            (
                {"messages": [QUESTION, {**ANSWER, "reasoning_content": 3}]},
                "wrong_type",
                "reasoning_content of message 2",
            ),
            (
                {"messages": [QUESTION, {**ANSWER, "thinking": "a", "reasoning": "b"}]},
                "conflicting_fields",
                "'thinking'",
            ),
            ({"messages": [QUESTION, ANSWER], "tools": "add"}, "wrong_type", "'tools' must be a list"),
            ({"messages": [QUESTION, ANSWER], "tools": ["add"]}, "wrong_type", "'tools' must be a list of objects"),
            ({"messages": [QUESTION, ANSWER], "system": ["Count."]}, "wrong_type", "'system'"),
            (
                {"messages": [{"role": "system", "content": "A"}, QUESTION, ANSWER], "system": "B"},
                "conflicting_fields",
                "'system'",
            ),
            (
                {"messages": [QUESTION, ANSWER], "history": [["a", "b"]]},
                "conflicting_fields",
                "'history' and 'messages'",
            ),
            (
                {"messages": [QUESTION, ANSWER], "conversations": [ANSWER]},
                "conflicting_fields",
                "'messages' and 'conversations'",
            ),
            ({"prompt": "a", "completion": "b", "history": [["a"]]}, "wrong_type", "pair 1 of 'history'"),
            ({"prompt": "a", "completion": "b", "history": [["a", None]]}, "wrong_type", "history, pair 1"),
            (
                {"instruction": "a", "input": "b", "context": "c", "output": "d"},
                "conflicting_fields",
                "'input' and 'context'",
            ),
            (
                {"question": "a", "answer": "4", "solution": "2 + 2 = 4"},
                "conflicting_fields",
                "'answer' and 'solution'",
            ),
            ({"prompt": "a", "question": "b", "response": "c"}, "conflicting_fields", "'prompt' and 'question'"),
            ({"prompt": "a", "chosen": "b", "rejected": "c"}, "no_response", "preference pair"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
                "not_text",
                "part 1 of content of message 1 is of the type 'image_url'",
            ),
            (
                {"conversations": [{"from": "human", "value": "a"}, {"from": "narrator", "value": "b"}]},
                "unknown_role",
                "'narrator'",
            ),
            (
                {"conversations": [{"from": "function_call", "value": "add(2)"}]},
                "wrong_type",
                "tool_calls of message 1",
            ),
        ],
    )
    def test_what_cannot_be_honoured_is_named(self, tmp_path: Path, record: Any, kind: str, detail: str) -> None:
        found = refused(tmp_path, record)
        assert found[0] == kind
        assert detail in found[1]

    @pytest.mark.parametrize("as_text", [False, True])
    def test_tools_and_calls_reach_the_template(self, tmp_path: Path, as_text: bool) -> None:
        spell = json.dumps if as_text else lambda value: value
        calls = spell(
            [{"type": "function", "id": "1", "function": {"name": "add", "arguments": spell({"a": 2, "b": 2})}}]
        )
        asks = {"role": "assistant", "content": None, "tool_calls": calls, "name": ""}
        result = {"role": "tool", "tool_call_id": "1", "name": "add", "content": "4"}
        record = read_one(tmp_path, {"messages": [QUESTION, asks, result, ANSWER], "tools": spell([TOOL])})
        assert record.tools == [TOOL]
        assert record.messages[1] == Message("assistant", "", extra={"tool_calls": [{**CALL, "id": "1"}]})
        assert record.messages[2].as_turn() == {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"}

    def test_older_spellings_of_calls(self, tmp_path: Path) -> None:
        call = {"name": "add", "arguments": '{"a": 2, "b": 2}'}
        wanted = Message("assistant", "", extra={"tool_calls": [CALL]})
        openai = {"role": "assistant", "content": None, "function_call": call}
        record = read_one(tmp_path, {"messages": [QUESTION, openai], "functions": [TOOL["function"]]})
        assert record.messages[1] == wanted
        assert record.tools == [TOOL]
        asked = {"from": "human", "value": QUESTION["content"]}
        for value in (call, [call]):
            record = read_one(
                tmp_path, {"conversations": [asked, {"from": "function_call", "value": json.dumps(value)}]}
            )
            assert record.messages[1] == wanted

    def test_system_history_and_context_are_turns(self, tmp_path: Path) -> None:
        record = {"instruction": "And one more?", "context": "Numbers.", "output": "Five."}
        record |= {"system": "Count.", "history": [["What is two plus two?", "Four."]]}
        wanted = [("system", "Count."), ("user", QUESTION["content"]), ("assistant", "Four.")]
        wanted += [("user", "And one more?\n\nNumbers."), ("assistant", "Five.")]
        assert read_one(tmp_path, record).messages == turns(*wanted)
        same = {"system": "Count.", "messages": [{"role": "developer", "content": "Count."}, QUESTION, ANSWER]}
        assert [m.role for m in read_one(tmp_path, same).messages] == ["system", "user", "assistant"]
        nothing = {
            "system": " ",
            "history": [],
            "context": "",
            "images": [],
            "tools": [],
            "prompt": "a",
            "completion": "b",
        }
        assert read_one(tmp_path, nothing) == read_one(tmp_path, {"prompt": "a", "completion": "b"})

    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
    def test_reasoning_is_the_templates(self, tmp_path: Path, name: str) -> None:
        wanted = Message("assistant", "It is four.", extra={"reasoning_content": "Two and two."})
        assert read_one(tmp_path, {"messages": [QUESTION, {**ANSWER, name: "Two and two."}]}).messages[1] == wanted
        record = {"question": "?", "answer": "It is four.", name: "Two and two."}
        assert read_one(tmp_path, record).messages[1] == wanted

    def test_answers_within_a_prompt_are_not_trained(self, tmp_path: Path) -> None:
        shown = {"role": "assistant", "content": "Yes?"}
        record = read_one(tmp_path, {"prompt": [QUESTION, shown, QUESTION], "completion": [ANSWER]})
        assert [m.train for m in record.messages] == [True, False, True, True]
        record = read_one(tmp_path, {"prompt": [{**shown, "train": True}, QUESTION], "completion": "It is four."})
        assert [m.train for m in record.messages] == [True, True, True]


class TestUnreadFields:
    def test_are_named_once_with_their_counts(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
        records = [
            {"messages": [QUESTION, ANSWER], "source": "x", "score": 0.5},
            {"messages": [{**QUESTION, "emotion": "joy"}, {**ANSWER, "emotion": "awe"}], "source": "y", "note": ""},
            {"messages": [{**QUESTION, "content": [part]}, ANSWER], "prompt": "p", "completion": "c"},
            {"instruction": "a", "prompt": "a, rendered", "output": "b", "note": None},
            {"nothing": "to be read"},
        ]
        path = tmp_path / "x.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        read, problems = read_records([str(path)], skip_bad=True)
        assert [m.content for m in read[3].messages] == ["a", "b"]
        found = {
            p.detail.split("'")[1]: (p.line, p.detail.split("' of ")[1][0])
            for p in problems.entries
            if p.kind == "unread_field"
        }
        wanted = {
            "source": (1, "2"),
            "score": (1, "1"),
            "messages.emotion": (2, "1"),
            "prompt": (3, "2"),
            "completion": (3, "1"),
        }
        assert found == {**wanted, "messages.content.cache_control": (3, "1")}
        [warning] = capsys.readouterr().err.splitlines()
        assert "fields that are not read" in warning
        for name, (_, count) in found.items():
            assert f"'{name}' ({count})" in warning


def test_the_documentation_names_everything_that_is_read(repository: Path) -> None:
    page = (repository / "docs" / "POOLS.md").read_text(encoding="utf-8")
    questions_and_answers = [name for pair in forms_module.PAIRS for name in pair]
    names = [*questions_and_answers, *forms_module.CONVERSATIONS, *forms_module.ADDITIONS, *forms_module.SYSTEMS]
    names += [*forms_module.WEIGHTS, *forms_module.TEMPLATE_OPTIONS, *forms_module.MESSAGE_LISTS, *sources.COMPRESSED]
    names += [name for known in turns_module.ROLES.values() for name in known]
    names += [*turns_module.CALLS, *turns_module.ROLE_FIELDS, *turns_module.CONTENT_FIELDS, *turns_module.MEDIA]
    names += [*turns_module.REASONING_FIELDS, *turns_module.LEARNED_FIELDS, turns_module.MASKED]
    names += [f"x{ending}" for ending in sources.SUFFIXES]
    assert [name for name in names if f"`{name}`" not in page] == []
