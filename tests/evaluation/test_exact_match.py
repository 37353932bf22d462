from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from lead_engine.evaluation.exact_match import Match, compare, final_answer, normalise, parse_number, summarise

DATA = Path(__file__).parents[3] / "shared" / "data" / "heldout.jsonl"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Answer\n is  YES. ", "the answer is yes"),
        ("3.5", "3.5"),
        ("Stra\u00dfe", "strasse"),
        ("wait..", "wait."),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(normalise("A  b")) == normalise("a b")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("165", "165"),
        ("$1,234.00", "1234"),
        ("-5", "-5"),
        ("\u22120.85", "-0.85"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("18%.", "18"),
        (".5", "0.5"),
        ("1,23", None),
        ("12 apples", None),
        ("(A)", None),
        ("", None),
        ("$", None),
    ],
)
def test_parse_number(text: str, value: str | None) -> None:
    assert parse_number(text) == (None if value is None else Decimal(value))


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("7+5 = 12 feet.\n#### 12", "12"),
        ("Area is 3.\nThe answer is (A).", "(A)"),
        ("So the answer is 3.5. That was easy.", "3.5"),
        ("The answer is: no", "no"),
        ("The answer is yes.\nNo: the answer is no.", "no"),
        ("The answer is 5.\n#### 6", "6"),
        ("57.00", "57.00"),
        ("first\n$57.00\n", "$57.00"),
        ("P(R) = 0.25", "0.25"),
        ("It was founded in 1815.", None),
        ("4x(4x^2 + 2x - 3)", None),
        ("K = 1.2 x 10^(-2)", None),
        ("12\nis the number", None),
        ("virology", None),
        ("", None),
    ],
)
def test_final_answer(reference: str, answer: str | None) -> None:
    assert final_answer(reference) == answer


@pytest.mark.parametrize(
    ("generated", "reference", "expected"),
    [
        ("Her height is 12 feet.\n#### 12", "7+5 = 12 feet.\n#### 12", Match(False, True)),
        ("7+5 = 12 FEET.\n####  12.", "7+5 = 12 feet.\n#### 12", Match(True, True)),
        ("#### 12 feet", "#### 12", Match(False, True)),
        ("so 3 + 9 makes $12.00", "#### 12", Match(False, True)),  # no marker, the last number
        ("12, or perhaps 13", "#### 12", Match(False, False)),
        ("10-12", "#### -12", Match(False, False)),  # a minus between numbers is no sign
        ("#### 13 because 12", "#### 12", Match(False, True)),  # text around a number: its last number
        ("I do not know", "#### 12", Match(False, False)),
        ("The answer is A", "x\nThe answer is (A).", Match(False, True)),
        ("the answer is (b)", "x\nThe answer is (A).", Match(False, False)),
        ("(A)", "x\nThe answer is (A).", Match(False, False)),  # a choice must be marked
        ("", "x\nThe answer is (A).", Match(False, False)),
        ("Virology.", "virology", Match(True, None)),
        ("virus", "virology", Match(False, None)),
        ("#### 1,000,000", "1000000", Match(False, True)),
    ],
)
def test_compare(generated: str, reference: str, expected: Match) -> None:
    assert compare(generated, reference) == expected


def test_summary_counts_final_answers_only_where_the_reference_has_one() -> None:
    shares = summarise(
        [("b", Match(True, None)), ("a", Match(False, True)), ("a", Match(True, False)), ("b", Match(False, None))]
    )
    assert list(shares["tasks"]) == ["a", "b"]
    assert shares["overall"]["whole"]["mean"] == 0.5
    assert shares["overall"]["whole"]["n"] == 4
    assert shares["overall"]["final"]["n"] == 2
    assert shares["tasks"]["b"]["final"] is None
    assert 0 < shares["tasks"]["a"]["final"]["low"] < 0.5 < shares["tasks"]["a"]["final"]["high"] < 1
    json.dumps(shares, allow_nan=False)


def test_every_real_reference_matches_itself() -> None:
    if not DATA.exists():
        pytest.skip(f"needs {DATA}")
    marked = {"gsm8k": 0, "cot_aqua": 0}
    for line in DATA.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        answer = record["output"] if "output" in record else record["messages"][-1]["content"]
        match = compare(answer, answer)
        assert match.whole
        assert match.final in (None, True), answer
        if record["dataset"] in marked:
            assert match.final, answer
            marked[record["dataset"]] += 1
    assert all(count > 100 for count in marked.values())
