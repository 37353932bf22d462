"""Comparison of generated answers with reference answers: as a whole, and by the final answer alone.

*Whole*: the two texts are equal after `normalise` (case, white space, one trailing period).

*Final*: only for samples whose reference has a final answer. These forms are tried in this order:
  1. `#### X` (GSM8K's form)                           -> X, to the end of the line
  2. `The answer is X` (the form of chain-of-thought data) -> X, to the end of the sentence or line
  3. a last line that is a number, or ends in "= number"  -> that number
A number that merely ends a sentence ("... in 1815") or a formula is no final answer.

In the generated text, the same two markers introduce the final answer; the last one counts. Without a marker, the last
number counts if the reference's final answer is a number, so that a model is not marked down for the form alone.
Otherwise the text has no final answer and is wrong. Numbers are compared by value ($1,234.00 = 1234). Of text around a
number ("#### 12 apples") the last number counts. A choice may stand in brackets: "(A)" = "A".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from typing import NamedTuple

from lead_engine.base.statistics import wilson_interval

HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
ANSWER_IS = re.compile(r"\bthe answer is:?[ \t]*(\S[^\n]*?)(?=\.?[ \t]*(?:\n|$)|\.\s)", re.IGNORECASE)
MINUS = "\u2212"  # the typographic minus sign
# A sign counts where it cannot be an operator or a hyphen; digits may be grouped by commas in threes.
NUMBER = re.compile(rf"(?:(?<![\w)\]])[-{MINUS}])?(?<!\w)(?:(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
CURRENCY = re.compile(rf"^([-{MINUS}]?)\s*[$\u20ac\u00a3]\s*")


class Match(NamedTuple):
    """How one generated answer compares; `final` is None where the reference has no final answer."""

    whole: bool
    final: bool | None


def normalise(text: str) -> str:
    """Casefolded, runs of white space as one space, ends stripped, one trailing period removed."""
    folded = " ".join(text.casefold().split())
    return folded.removesuffix(".").rstrip()


def parse_number(text: str) -> Decimal | None:
    """The value of a text that is one number, perhaps with currency or percent sign or trailing period; else None."""
    bare = CURRENCY.sub(r"\1", text.strip()).rstrip("%. ")
    if not NUMBER.fullmatch(bare):
        return None
    return Decimal(bare.replace(",", "").replace(MINUS, "-"))


def final_answer(reference: str) -> str | None:
    """The final answer of a reference, by the three rules above; None if it has none."""
    marked = _marked_answer(reference)
    if marked is not None:
        return marked
    last_line = reference.rstrip().rpartition("\n")[2]
    after_equals = last_line.rpartition("=")[2].strip()
    return after_equals if parse_number(after_equals) is not None else None


def compare(generated: str, reference: str) -> Match:
    """Both comparisons of one generated answer with its reference."""
    whole = normalise(generated) == normalise(reference)
    wanted = final_answer(reference)
    if wanted is None:
        return Match(whole, None)
    number = parse_number(wanted)
    found = _marked_answer(generated)
    if number is None:
        return Match(whole, found is not None and _choice(found) == _choice(wanted))
    if found is None or parse_number(found) is None:
        # "#### 12 apples": the number within the marked answer, else the last number of the text.
        numbers = NUMBER.findall(generated if found is None else found)
        found = numbers[-1] if numbers else ""
    return Match(whole, parse_number(found) == number)


def summarise(matches: Iterable[tuple[str, Match]]) -> dict[str, object]:
    """Shares with Wilson's 95 % intervals, overall (all samples pooled) and per task.

    matches: (task, Match) of every sample. Returns {"overall": SHARES, "tasks": {task: SHARES}} with SHARES =
    {"whole": {...}, "final": {...} | None}, each {"mean", "low", "high", "n"}. "final" counts only samples whose
    reference has a final answer, and is None if none has.
    """
    by_task: dict[str, list[Match]] = {}
    for task, match in matches:
        by_task.setdefault(task, []).append(match)
    everything = [match for group in by_task.values() for match in group]
    return {"overall": _shares(everything), "tasks": {task: _shares(by_task[task]) for task in sorted(by_task)}}


def _shares(matches: list[Match]) -> dict[str, object]:
    finals = [match.final for match in matches if match.final is not None]
    return {
        "whole": wilson_interval(sum(match.whole for match in matches), len(matches)).to_json(),
        "final": wilson_interval(sum(finals), len(finals)).to_json() if finals else None,
    }


def _marked_answer(text: str) -> str | None:
    """What follows the last `####` or, without any, the last `The answer is`."""
    found: list[str] = HASHES.findall(text) or ANSWER_IS.findall(text)
    return found[-1] if found else None


def _choice(text: str) -> str:
    return normalise(text).strip("()[] ")
