"""Reading instruction records from files, standard input and hub data sets. docs/POOLS.md says what may stand in them.

A record that cannot be used is never dropped in silence: it becomes a `Problem` with its file and line. Without
`skip_bad`, any problem refuses the whole pool, after reading all of it, so that one run names everything there is to
mend. Fields that mean nothing here are named once, each with the number of records that have it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lead_engine.base.console import warn
from lead_engine.base.errors import UserError
from lead_engine.config.bounds import PathText
from lead_engine.config.options import argument
from lead_engine.pool.fields import Bad, identifier, present, text, type_name
from lead_engine.pool.forms import read_conversation
from lead_engine.pool.message import Message, Record
from lead_engine.pool.problems import UNREAD, Problems, place
from lead_engine.pool.readers import read_values
from lead_engine.pool.sources import STDIN, expand, some

__all__ = ["Message", "Record", "iter_records", "read_records"]


def read_records(
    sources: Sequence[str | Path] | str | Path, *, skip_bad: bool, flag: str = "--pool"
) -> tuple[list[Record], Problems]:
    """All usable records of the sources, in order, and what is wrong with the others.

    `sources` are files, folders, patterns, "-" (standard input) and hub data sets, as `pool.sources.expand` takes them;
    `flag` is what the user named them with. Raises UserError for a source that cannot be read, for bad records unless
    `skip_bad`, and where no usable record is left. Warns of fields and files that are not read.
    """
    # A name alone is one source, not as many as it has letters.
    names: tuple[str, ...] = argument(tuple[PathText, ...], sources, "read_records(sources)")
    problems = Problems()
    records = list(iter_records(names, problems, skip_bad=skip_bad, flag=flag))
    return records, problems


def iter_records(
    sources: Sequence[str], problems: Problems, *, skip_bad: bool, flag: str = "--pool"
) -> Iterator[Record]:
    """The records of `read_records`, one at a time.

    What is wrong is added to `problems`, and raises UserError only after the last record.
    """
    seen: dict[str, tuple[str, int]] = {}  # id -> source and line
    unread: dict[str, _Unread] = {}
    for source, label in _labelled(expand(sources, flag)):
        for line, value in read_values(source, problems):
            try:
                record, unknown = _record(value, source, line, label)
                if record.id in seen:
                    raise Bad("duplicate_id", f"id {record.id!r} was used before, in {place(*seen[record.id])}")
            except Bad as bad:
                problems.add(bad.args[0], source, line, bad.args[1])
                continue
            seen[record.id] = (source, line)
            for name in unknown:
                unread.setdefault(name, _Unread(source, line)).count += 1
            yield record
    if not skip_bad:
        problems.refuse()
    if not seen:
        found = f" ({problems})" if problems else "; the input is empty"
        raise UserError(f"{flag} {', '.join(map(str, sources))}: no usable record{found}")
    _tell_unread(unread, problems, flag)


@dataclass
class _Unread:
    """A field that is not read: the first record that has it, and how many do."""

    source: str
    line: int
    count: int = 0


def _tell_unread(unread: dict[str, _Unread], problems: Problems, flag: str) -> None:
    for name, field in unread.items():
        told = f"{name!r} of {field.count:,} record(s) is not read; this is the first"
        problems.add(UNREAD, field.source, field.line, told)
    if unread:
        by_count = sorted(unread.items(), key=lambda item: -item[1].count)
        names = [f"{name!r} ({field.count:,})" for name, field in by_count]
        warn(f"{flag}: fields that are not read, with the number of records that have them: {some(names)}")


def _labelled(sources: Sequence[str]) -> list[tuple[str, str]]:
    """Each source with the name used in generated ids.

    That is the file's name, or its whole path where two files share a name.
    """
    names = Counter(Path(s).name for s in sources)
    labels = {s: Path(s).name if names[Path(s).name] == 1 else s for s in sources}
    return [(s, "stdin" if s == STDIN else label) for s, label in labels.items()]


def _record(value: Any, source: str, line: int, label: str) -> tuple[Record, list[str]]:
    """The record, and the names of its fields that were not read."""
    if not isinstance(value, dict):
        raise Bad("not_a_record", f"expected an object, found {type_name(value)}")
    fields = present(value)
    identity = identifier(fields.get("id", f"{label}:{line}"), "id")
    dataset = text(fields.get("dataset", ""), "dataset")
    messages, tools, unread = read_conversation(fields)
    messages = _to_the_last_answer(messages)
    for number, message in enumerate(messages, 1):
        says = message.content.strip() or "tool_calls" in (message.extra or {})
        if message.role == "assistant" and message.train and not says:
            raise Bad("no_response", f"the answer is empty (message {number} of {len(messages)})")
    return Record(identity, dataset, tuple(messages), source, line, tools), unread


def _to_the_last_answer(messages: list[Message]) -> list[Message]:
    """Turns after the last trained answer carry no loss, and no token that does sees them."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise Bad("no_response", "no message has the role assistant")
    trained = [i for i in answers if messages[i].train]
    if not trained:
        raise Bad("no_trained_answer", "every answer is marked as not trained")
    return messages[: trained[-1] + 1]
