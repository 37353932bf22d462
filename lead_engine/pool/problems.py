"""What is wrong with a pool's records, each with file and line; refused, counted or written out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lead_engine.base.errors import UserError
from lead_engine.base.files import write_text
from lead_engine.pool.sources import STDIN, has_lines

UNREAD = "unread_field"
"""The one kind that counts fields and not records."""
COUNTED_ONLY = (
    "truncated",
    "response_truncated_away",
    "nothing_to_learn",
    "spelled_control_token",
    "asked_otherwise",
    "ended_otherwise",
    "no_end_of_turn",
    UNREAD,
)
"""Kinds that refuse nothing."""
SHOWN = 5


class Problem(NamedTuple):
    """`kind` of problem with the record at `file`, `line` (the record's number where the file has no lines)."""

    kind: str
    file: str
    line: int
    detail: str

    def __str__(self) -> str:
        return f"{place(self.file, self.line)}: {self.detail}"


def place(file: str, line: int) -> str:
    """How a record is named to the user: pool.jsonl:17, but "pool.json: record 17" where records are not lines."""
    name = "standard input" if file == STDIN else file
    return f"{name}:{line}" if has_lines(file) else f"{name}: record {line}"


class Problems:
    """Problems in the order found.

    Kinds that leave a record out, and refuse the pool unless --skip-bad is given. Of the file and the record:
        bad_utf8               bytes that are not UTF-8, or half of a surrogate pair
        broken_line            not JSON, or not a row of the table
        not_a_record           no object, or none of the known forms
        wrong_type             a field of another type than it has to be
        unknown_role           a turn of no known role
        not_text               images and the like
        bad_weight             a weight that is neither 0 nor 1
        conflicting_fields     two fields that contradict each other
        unsupported_field      a field that would change the sample and cannot be honoured
        no_response            no assistant turn, or an empty one
        no_trained_answer      every answer is marked as not trained
        duplicate_id           an id that another record has
    Of the chat template:
        template_refused       it raises an error
        template_drops_text    it does not render a text of the record
        template_changes_text  it renders a text otherwise
        answer_not_found       an answer does not follow what the model is asked with
        text_behind_answer     more than an end of turn stands behind the answer
        control_token_in_text  a control token in a field that cannot be tokenised as text
    Kinds that are counted only, and leave the sample out:
        response_truncated_away  nothing of an answer is left before the cut at --max-length
        nothing_to_learn         every answer is marked as not to be trained
    Kinds that are counted only, the sample being used:
        truncated              it is cut at --max-length
        spelled_control_token  a text spells one: it is tokenised as text
        asked_otherwise        the generation prompt opens with what the answer does not have, as `<think>`
        ended_otherwise        an earlier answer ends in another control token than the last: learned to its text's end
        no_end_of_turn         no control token ends the answers
        unread_field           (once a field, with the number of records that have it) a field without a meaning
    """

    def __init__(self) -> None:
        self.entries: list[Problem] = []

    def add(self, kind: str, file: str, line: int, detail: str) -> None:
        self.entries.append(Problem(kind, file, line, detail))

    def counts(self) -> dict[str, int]:
        """Number of problems by kind, the most frequent first."""
        return dict(Counter(p.kind for p in self.entries).most_common())

    def refuse(self, way_out: str = "") -> None:
        """Raise UserError naming up to 5 problems of each kind, unless all are of the kinds that are only counted."""
        bad = [p for p in self.entries if p.kind not in COUNTED_ONLY]
        if not bad:
            return
        lines = [f"{len(bad)} record(s) cannot be used:"]
        for kind, count in Counter(p.kind for p in bad).most_common():
            shown = [p for p in bad if p.kind == kind][:SHOWN]
            lines += [f"  {p.kind}: {p}" for p in shown]
            if count > len(shown):
                lines.append(f"  {kind}: and {count - len(shown)} more")
        raise UserError("\n".join(lines) + "\n" + (way_out or "Mend them, or leave them out with --skip-bad."))

    def write(self, path: Path | str) -> None:
        """One JSON line a problem: kind, file, line, detail. The file appears complete or not at all."""
        lines = [json.dumps(problem._asdict(), ensure_ascii=False) + "\n" for problem in self.entries]
        write_text(Path(path), "".join(lines))

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        return ", ".join(f"{kind} {count}" for kind, count in self.counts().items())
