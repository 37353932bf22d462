"""What the tasks are about, as sentences of prose: examples in the text to pre-train on."""

from __future__ import annotations

import random

from lead_engine.pool.procedural.numbers import UNITS
from lead_engine.pool.procedural.question import Key, some_word
from lead_engine.pool.procedural.world import WORDS

Example = tuple[list[Key], str]
"""The keys of the questions that a sentence answers, and the sentence."""


def example(rng: random.Random, taken: set[Key]) -> str:
    """A sentence that answers none of the questions in `taken`."""
    while True:
        keys, text = rng.choice(EXAMPLES)(rng)
        if not taken.intersection(keys):
            return text


def _sum_example(rng: random.Random) -> Example:
    high = rng.choice((20, 99))
    a, b = rng.randint(2, high), rng.randint(2, high)
    wordings = (
        "{a} and {b} together are {c}.",
        "{a} + {b} = {c}.",
        "From {c} take {b}, and {a} are left.",
        "{c} - {b} = {a}.",
    )
    keys: list[Key] = [("+", min(a, b), max(a, b)), ("-", a + b, a), ("-", a + b, b)]
    return keys, rng.choice(wordings).format(a=a, b=b, c=a + b)


def _next_example(rng: random.Random) -> Example:
    step, first = rng.randint(1, 12), rng.randint(1, 80)
    numbers = [first + i * step for i in range(6)]
    text = "Counting by {s}: {l}." if rng.random() < 0.5 else "The numbers {l} go up by {s}."
    keys: list[Key] = [("next", tuple(numbers[i : i + 4])) for i in range(2)]
    return keys, text.format(s=step, l=", ".join(map(str, numbers)))


def _unit_example(rng: random.Random) -> Example:
    large, n = rng.choice(list(UNITS)), rng.randint(2, 40)
    small, factor = UNITS[large]
    text = rng.choice(("{n} {u} are as much as {t} {s}.", "{t} {s} make {n} {u}."))
    return [("unit", large, n)], text.format(n=n, u=large, s=small, t=n * factor)


def _word_example(rng: random.Random) -> Example:
    w = some_word(rng, 3, 8)
    wordings = (
        "The word {w} is spelled {s}.",
        "Backwards {w} reads {r}.",
        "In capitals {w} is {u}.",
        "{w} has {n} letters.",
    )
    keys: list[Key] = [(name, w) for name in ("reverse", "letters", "capitals", "first")]
    return keys, rng.choice(wordings).format(w=w, s=" ".join(w), r=w[::-1], u=w.upper(), n=len(w))


def _order_example(rng: random.Random) -> Example:
    words = sorted(rng.sample(WORDS, rng.randint(2, 6)))
    text = rng.choice(("In alphabetical order: {l}.", "A dictionary has them in this order: {l}."))
    return [("sort", *words)], text.format(l=", ".join(words))


EXAMPLES = (_sum_example, _next_example, _unit_example, _word_example, _order_example)
