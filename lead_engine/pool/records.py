"""Reading instruction records from JSON, JSONL and Parquet files and from hub data sets.

Three forms are read: `messages` (a list of {role, content}; roles system, user, assistant; any number of turns),
`instruction` / `input` / `output`, and `prompt` / `completion`. `id` and `dataset` are optional. A field that is null
counts as absent, as Parquet fills missing fields with null. Where a record has the fields of several forms, the first
of this list is taken.

A record that cannot be used is never dropped in silence: it becomes a `Problem` with its file and line. Without
`skip_bad`, any problem refuses the whole pool, after reading all of it, so that one run names everything there is to
mend.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lead_engine.bounds import PathText
from lead_engine.errors import UserError
from lead_engine.options import argument
from lead_engine.pool.problems import Problems, place

ROLES = ("system", "user", "assistant")
SUFFIXES = (".jsonl", ".json", ".parquet")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str
    train: bool = True
    """Whether an assistant's turn is learned. Other turns never are."""
    extra: dict[str, Any] | None = None
    """Further fields that the chat template gets: tool_calls, tool_call_id, name, reasoning_content."""

    def as_turn(self) -> dict[str, Any]:
        """The message as a chat template takes it."""
        return {"role": self.role, "content": self.content, **(self.extra or {})}


class Record(NamedTuple):
    """One usable sample; `dataset` is "" where the record names none, `line` is the line (.jsonl) or the record's
    number (else).
    """

    id: str
    dataset: str
    messages: tuple[Message, ...]
    file: str
    line: int
    tools: list[Any] | None = None
    """The tools that the chat template is given, as JSON schemas."""


class _Bad(Exception):
    """Why a record cannot be used: (kind, detail)."""


def read_records(sources: Sequence[str | Path] | str | Path, *, skip_bad: bool) -> tuple[list[Record], Problems]:
    """All usable records of the sources, in order, and what is wrong with the others.

    `sources` are paths of .json (a list, or {"data": [...]}), .jsonl and .parquet files, or names of hub data sets.
    Raises UserError for a source that cannot be read, for bad records unless `skip_bad`, and where no usable record is
    left.
    """
    sources = argument(tuple[PathText, ...], sources, "read_records(sources)")  # a name alone is one source, not its letters
    problems = Problems()
    records = list(iter_records(sources, problems, skip_bad=skip_bad))
    return records, problems


def iter_records(sources: Sequence[str], problems: Problems, *, skip_bad: bool) -> Iterator[Record]:
    """As `read_records`, one record at a time; problems are added to `problems`, and refused only after the last
    record.
    """
    seen: dict[str, tuple[str, int]] = {}
    for source, label in _labelled(sources):
        for line, value in _read(source, problems):
            try:
                record = _record(value, source, line, label)
                if record.id in seen:
                    raise _Bad("duplicate_id", f"id {record.id!r} was used before, in {place(*seen[record.id])}")
            except _Bad as bad:
                problems.add(bad.args[0], source, line, bad.args[1])
                continue
            seen[record.id] = (source, line)
            yield record
    if not skip_bad:
        problems.refuse()
    if not seen:
        raise UserError(f"{', '.join(sources)}: no usable record" + (f" ({problems})" if problems else "; the input is empty"))


def _labelled(sources: Sequence[str]) -> list[tuple[str, str]]:
    """Each source with the name used in generated ids: the file's name, or its whole path where two files share a
    name.
    """
    if not sources:
        raise UserError("--pool: name at least one file or hub data set")
    for path, count in Counter(os.path.realpath(s) for s in sources).items():
        if count > 1:
            raise UserError(f"{path}: given {count} times; name every file once")
    names = Counter(Path(s).name for s in sources)
    return [(s, Path(s).name if names[Path(s).name] == 1 else s) for s in sources]


# --- one record ---


def _record(value: Any, source: str, line: int, label: str) -> Record:
    if not isinstance(value, dict):
        raise _Bad("not_a_record", f"expected an object, found {_type(value)}")
    fields = {key: v for key, v in value.items() if v is not None}
    identity = fields.get("id", f"{label}:{line}")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    messages = _messages(fields)
    # Turns after the last answer carry no loss and no token that does sees them.
    messages = messages[: 1 + max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)]
    if not messages:
        raise _Bad("no_response", "no message has the role assistant")
    for number, message in enumerate(messages, 1):
        if message.role == "assistant" and not message.content.strip():
            raise _Bad("no_response", f"the answer is empty (message {number} of {len(messages)})")
    return Record(_text(identity, "id"), _text(fields.get("dataset", ""), "dataset"), messages, source, line)


def _messages(fields: dict[str, Any]) -> tuple[Message, ...]:
    if "messages" in fields:
        return _conversation(fields["messages"])
    if "instruction" in fields and ("output" in fields or "prompt" not in fields):
        prompt, addition = _text(fields["instruction"], "instruction"), _text(fields.get("input", ""), "input")
        if addition.strip():
            prompt += "\n\n" + addition
        return _question(prompt, fields, "output")
    if "prompt" in fields:
        return _question(_text(fields["prompt"], "prompt"), fields, "completion")
    keys = ", ".join(sorted(map(str, fields))[:8]) or "nothing"
    raise _Bad("not_a_record", f"needs messages, or instruction and output, or prompt and completion; has {keys}")


def _question(prompt: str, fields: dict[str, Any], answer: str) -> tuple[Message, ...]:
    if answer not in fields:
        raise _Bad("no_response", f"{answer!r} is missing")
    return Message("user", prompt), Message("assistant", _text(fields[answer], answer))


def _conversation(turns: Any) -> tuple[Message, ...]:
    if not isinstance(turns, list):
        raise _Bad("wrong_type", f"'messages' must be a list, found {_type(turns)}")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or turn.get("role") is None or turn.get("content") is None:
            raise _Bad("wrong_type", f"message {number} must be an object with 'role' and 'content'")
        if turn["role"] not in ROLES:
            raise _Bad("unknown_role", f"message {number} has the role {turn['role']!r}; known are {', '.join(ROLES)}")
        messages.append(Message(turn["role"], _text(turn["content"], f"content of message {number}")))
    return tuple(messages)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _Bad("wrong_type", f"{field!r} must be text, found {_type(value)}")
    try:
        value.encode()  # JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes
    except UnicodeEncodeError as error:
        raise _Bad("bad_utf8", f"{field!r} holds an unpaired surrogate at character {error.start}") from None
    return value


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


# --- sources: each yields (line or record number, value) ---


def _read(source: str, problems: Problems) -> Iterator[tuple[int, Any]]:
    path = Path(source)
    suffix = path.suffix.lower()
    if not path.exists():
        if suffix not in SUFFIXES and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
            return _read_hub(source)
        raise UserError(f"{source}: no such file")
    if path.is_dir():
        raise UserError(f"{source}: is a folder; name the {', '.join(SUFFIXES)} files in it")
    if suffix not in SUFFIXES:
        raise UserError(f"{source}: unknown kind of file; give {', '.join(SUFFIXES)}")
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}[suffix]
    return _readable(source, reader(source, problems))


def _readable(source: str, values: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    try:
        yield from values
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from None


def _read_jsonl(source: str, problems: Problems) -> Iterator[tuple[int, Any]]:
    with open(source, "rb") as file:
        yield from _parse_lines(source, enumerate(file, 1), problems)


def _parse_lines(source: str, lines: Iterator[tuple[int, bytes]], problems: Problems) -> Iterator[tuple[int, Any]]:
    """Decoded line by line, so that bytes that are not UTF-8 spoil only the line they stand in, and it can be named."""
    for number, line in lines:
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            problems.add("bad_utf8", source, number, f"byte {error.start + 1} of the line is not UTF-8")
        except (
            ValueError,
            RecursionError,
        ) as error:  # ValueError: broken JSON, or an integer beyond Python's digit limit
            problems.add("broken_line", source, number, f"not valid JSON: {error}")
        else:
            yield number, value


def _read_json(source: str, problems: Problems) -> Iterator[tuple[int, Any]]:
    raw = Path(source).read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        values = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}:{line}: not UTF-8 text; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and raw.lstrip()[:1] == b"{":  # one object a line: JSONL under the name .json
            yield from _parse_lines(source, enumerate((x for x in raw.splitlines() if x.strip()), 1), problems)
            return
        raise UserError(f"{source}:{error.lineno}: not valid JSON ({error.msg}); one record a line belongs in a .jsonl file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({error})") from None
    if isinstance(values, dict):
        values = values.get("data")
    if not isinstance(values, list):
        raise UserError(f'{source}: expected a list of records or {{"data": [...]}}')
    yield from enumerate(values, 1)


def _read_parquet(source: str, problems: Problems) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=1024)
        number = 0
        for batch in batches:
            for row in range(batch.num_rows):
                number += 1
                try:
                    value = batch.slice(row, 1).to_pylist()[0]
                except UnicodeDecodeError as error:  # Arrow does not check its strings
                    problems.add("bad_utf8", source, number, f"text that is not UTF-8 ({error.reason})")
                else:
                    yield number, value
    except pyarrow.ArrowException as error:
        raise UserError(f"{source}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _read_hub(name: str) -> Iterator[tuple[int, Any]]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{name}: no such file; to read it as a hub data set install the package `datasets` (pip install datasets)"
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub's client raises many unrelated types: network, missing set, missing split, broken files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: no such file, and the hub data set of that name could not be loaded ({reason})") from None
    return enumerate(rows, 1)
