"""Tasks about numbers: arithmetic, sequences, units."""

from __future__ import annotations

import random

from lead_engine.pool.procedural.question import Question, ask, near
from lead_engine.pool.procedural.world import World

UNITS = {
    "weeks": ("days", 7),
    "metres": ("centimetres", 100),
    "kilograms": ("grams", 1000),
    "dollars": ("cents", 100),
    "hours": ("minutes", 60),
    "days": ("hours", 24),
    "dozens": ("eggs", 12),
    "feet": ("inches", 12),
}
"""Unit -> the smaller unit, and how many of it make one."""
EASY_UNITS = ("metres", "kilograms", "dollars")
COMPOUND_UNITS = ("hours", "feet", "weeks", "days")


# --- arithmetic ---


def arithmetic(rng: random.Random, world: World, level: int) -> Question:
    """Sums and differences; at level 3 sums digit by digit."""
    if level == 0:
        n = rng.randint(10, 999)
        wordings = ("Write the number {n}.", "Say {n}.", "Copy this number.|{n}")
        return ask(rng, ("write", n), wordings, n, near(rng, n), n=n)
    low, high = ((2, 20), (21, 99), (101, 499))[level - 1]
    a, b = rng.randint(low, high), rng.randint(low, high)
    if rng.random() < 0.35 and level < 3:
        return _difference(rng, a + b, a)
    return _sum(rng, a, b, in_columns=level == 3)


def _difference(rng: random.Random, a: int, b: int) -> Question:
    wordings = ("What is {a} - {b}?", "Take {b} away from {a}.", "Compute {a} minus {b}.", "Subtract.|{a} - {b}")
    return ask(rng, ("-", a, b), wordings, a - b, near(rng, a - b), a=a, b=b)


def _sum(rng: random.Random, a: int, b: int, *, in_columns: bool) -> Question:
    wordings = ("What is {a} + {b}?", "Add {a} and {b}.", "Compute {a} plus {b}.", "Find the sum.|{a} + {b}")
    key = ("+", min(a, b), max(a, b))
    right, wrong = a + b, near(rng, a + b)
    if in_columns:
        return ask(rng, key, wordings, column_sum(a, b, right), column_sum(a, b, wrong), a=a, b=b)
    return ask(rng, key, wordings, right, wrong, a=a, b=b)


def column_sum(a: int, b: int, result: int) -> str:
    """Addition digit by digit from the right, with carries, ending in `result`."""
    steps, carry = [], 0
    for x, y in zip(reversed(f"{a}"), reversed(f"{b}"), strict=True):
        total = int(x) + int(y) + carry
        carried = f" + {carry}" if carry else ""
        steps.append(f"{x} + {y}{carried} = {total}")
        carry = total // 10
    return ", ".join(steps) + f". The sum is {result}."


# --- sequences ---


def sequences(rng: random.Random, world: World, level: int) -> Question:
    """The next number of a sequence, or the largest or smallest of several."""
    if level == 0:
        n = rng.randint(2, 999)
        return ask(
            rng, ("same", n), ("Continue: {n}, {n}, {n},", "What comes next?|{n}, {n}, {n}"), n, near(rng, n), n=n
        )
    if rng.random() < 0.5:
        return _extreme(rng, level)
    return _next(rng, level)


def _extreme(rng: random.Random, level: int) -> Question:
    numbers = tuple(rng.sample(range(10, (50, 100, 1000)[level - 1]), level + 1))
    name, answer = rng.choice((("largest", max(numbers)), ("smallest", min(numbers))))
    wordings = (
        "Which number is the {name}: {l}?",
        "Find the {name} number.|{l}",
        "Name the {name} of these numbers: {l}.",
    )
    wrong = rng.choice([n for n in numbers if n != answer])
    return ask(rng, (name, *sorted(numbers)), wordings, answer, wrong, name=name, l=", ".join(map(str, numbers)))


def _next(rng: random.Random, level: int) -> Question:
    step = rng.randint(*((1, 2), (3, 9), (11, 25))[level - 1])
    if level > 1:
        step *= rng.choice((1, -1))
    first = rng.randint(1, 80)
    if step < 0:  # no number of the sequence is negative
        first += 4 * abs(step)
    numbers = tuple(first + i * step for i in range(4))
    answer = numbers[-1] + step
    wordings = ("Continue: {l},", "What comes next?|{l}", "Which number follows {l}?")
    return ask(rng, ("next", numbers), wordings, answer, near(rng, answer), l=", ".join(map(str, numbers)))


# --- units ---


def units(rng: random.Random, world: World, level: int) -> Question:
    """Conversion to a smaller unit."""
    if level == 0:
        unit, n = rng.choice(list(UNITS)), rng.randint(2, 60)
        wordings = ("How many {u} are {n} {u}?", "Give {n} {u} in {u}.")
        return ask(rng, ("same", n, unit), wordings, f"{n} {unit}", f"{near(rng, n)} {unit}", n=n, u=unit)
    if level < 3:
        return _conversion(rng, level)
    return _compound_conversion(rng)


def _conversion(rng: random.Random, level: int) -> Question:
    """5 metres in centimetres."""
    if level == 1:
        choices, most = list(EASY_UNITS), 199
    else:
        choices, most = [unit for unit in UNITS if unit not in EASY_UNITS], 60
    large = rng.choice(choices)
    small, factor = UNITS[large]
    n = rng.randint(2, most)
    wordings = (
        "How many {s} are {n} {u}?",
        "Convert {n} {u} to {s}.",
        "Convert to {s}.|{n} {u}",
        "Give {n} {u} in {s}.",
    )
    wrong = f"{rng.choice((n + factor, n * factor * 10, near(rng, n * factor)))} {small}"
    return ask(rng, ("unit", large, n), wordings, f"{n * factor} {small}", wrong, n=n, u=large, s=small)


def _compound_conversion(rng: random.Random) -> Question:
    """3 hours and 20 minutes in minutes, with the steps."""
    large = rng.choice(COMPOUND_UNITS)
    small, factor = UNITS[large]
    n, rest = rng.randint(2, 12), rng.randint(1, factor - 1)
    total = n * factor + rest
    wordings = (
        "How many {s} are {n} {u} and {r} {s}?",
        "Convert {n} {u} and {r} {s} to {s}.",
        "Convert to {s}.|{n} {u} and {r} {s}",
    )
    answer = f"{n} {large} are {n * factor} {small}, and {rest} more are {{}} {small}."
    wrong = answer.format(near(rng, total))
    return ask(rng, ("units", large, n, rest), wordings, answer.format(total), wrong, n=n, u=large, s=small, r=rest)
