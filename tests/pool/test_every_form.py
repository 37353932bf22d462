"""One conversation, in whatever form and kind of file and with its fields in any order, is one record."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lead_engine.pool.records import Message, read_records

pytestmark = pytest.mark.slow


def turns(*messages: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(*message) for message in messages)


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() and not text.lstrip().startswith(("[", "{")) and "\r" not in text and "\0" not in text
)


def sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {"user": "Human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


def parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def forms(system: str | None, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """The conversation as every form writes it; only a single pair has those of one question."""
    said = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    first = [] if system is None else [{"role": "system", "content": system}]
    *history, (question, answer) = pairs
    with_system = {} if system is None else {"system": system}
    before = {**with_system, **({"history": [list(pair) for pair in history]} if history else {})}
    found = [{"messages": first + said}, {"messages": said, **with_system}, {"messages": parts(first + said)}]
    found += [{"messages": json.dumps(first + said)}, {"conversations": sharegpt(first + said)}]
    found += [{"conversation": sharegpt(said), **with_system}]
    found += [{"prompt": first + said[:-1], "completion": said[-1:]}] if not history else []
    for asked in ("instruction", "prompt", "question", "query", "problem", "input"):
        found += [
            {asked: question, answered: answer, **before}
            for answered in ("output", "completion", "response", "answer", "solution")
        ]
    return [{**form, "id": str(number), "dataset": "d"} for number, form in enumerate(found)]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """The records in the kind of file that the path names, written by other hands than the reader's."""
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    columns = list(dict.fromkeys(name for r in records for name in r))
    if ".jsonl" in path.name or ".ndjson" in path.name:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in records)
    else:
        pq.write_table(pa.Table.from_pylist([{**dict.fromkeys(columns), **r} for r in records]), path)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    system=st.none() | WORDS,
    pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3),
    seed=st.integers(0, 999),
)
def test_one_conversation_in_every_form_and_file(
    tmp_path: Path, system: str | None, pairs: list[tuple[str, str]], seed: int
) -> None:
    wanted = turns(*([] if system is None else [("system", system)]))
    wanted += turns(*(turn for q, a in pairs for turn in (("user", q), ("assistant", a))))
    records, order = forms(system, pairs), random.Random(seed)
    for name in ("x.jsonl", "x.jsonl.gz", "x.ndjson", "x.json", "x.csv", "x.tsv", "x.parquet"):
        shuffled = [dict(order.sample(list(r.items()), len(r))) for r in records]
        if name == "x.parquet":  # a column has one type: lists of parts and JSON text stand in files of their own
            shuffled = [r for r in shuffled if all(isinstance(r.get(k, ""), str) for k in ("prompt", "completion"))]
            shuffled = [r for r in shuffled if not isinstance(r.get("messages"), str) and not parts_in(r)]
        write(tmp_path / name, shuffled)
        found, problems = read_records([str(tmp_path / name)], skip_bad=False)
        assert not problems.entries
        assert [(r.id, r.dataset) for r in found] == [(r["id"], "d") for r in shuffled]
        for record in found:
            assert record.messages == wanted, (name, record.id)


def parts_in(record: dict[str, Any]) -> bool:
    return any(isinstance(turn.get("content"), list) for turn in record.get("messages", []))


NAMES = ["messages", "conversations", "prompt", "completion", "instruction", "output", "input", "context", "system"]
NAMES += ["history", "tools", "functions", "weight", "train", "images", "id", "dataset", "reasoning", "topic"]
TURN_NAMES = ["role", "from", "content", "value", "weight", "masked", "tool_calls", "function_call", "name", "thinking"]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", "user", "gpt", "[1]", "{}"])
)
CALLS = st.fixed_dictionaries(
    {}, optional={"function": SCALARS, "name": SCALARS, "arguments": SCALARS, "type": SCALARS}
)
VALUES = st.recursive(SCALARS | CALLS, lambda inner: st.lists(inner, max_size=2), max_leaves=4)
TURNS = st.dictionaries(st.sampled_from(TURN_NAMES), VALUES, max_size=5)
RECORDS = st.dictionaries(st.sampled_from(NAMES), VALUES | st.lists(TURNS, max_size=3), max_size=6)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(RECORDS | VALUES, min_size=10, max_size=10))
def test_whatever_stands_in_a_record_it_is_read_or_named(tmp_path: Path, records: list[Any]) -> None:
    good = {"prompt": "a", "completion": "b", "id": "good"}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*records, good]))
    read, problems = read_records([str(tmp_path / "x.jsonl")], skip_bad=True)
    named = [p.line for p in problems.entries if p.kind != "unread_field"]
    assert sorted([r.line for r in read] + named) == list(range(1, 12))
    for record in read:
        assert all(isinstance(m.content, str) for m in record.messages)
        assert record.messages[-1].role == "assistant"
        assert record.messages[-1].train
