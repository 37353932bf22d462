"""A question of the made-up world, and what the tasks make questions with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lead_engine.pool.procedural.world import WORDS, World, made_up_word

Key = tuple[Any, ...]
"""What is asked, whatever the wording."""


class Question(NamedTuple):
    """An instruction with its answer; `wrong` is a plausible wrong answer."""

    key: Key
    instruction: str
    input: str
    output: str
    wrong: str


Task = Callable[[random.Random, World, int], Question]
"""Makes a question of a level, 0 (trivial) to 3 (hard)."""


def ask(
    rng: random.Random, key: Key, wordings: Sequence[str], output: object, wrong: object, **fields: object
) -> Question:
    """One of the wordings, filled in; what follows a "|" in it is the record's input."""
    instruction, _, addition = rng.choice(wordings).partition("|")
    return Question(key, instruction.format(**fields), addition.format(**fields), str(output), str(wrong))


def near(rng: random.Random, number: int) -> int:
    """Another number, off by what a slip of a digit makes."""
    return number + rng.choice([d for d in (-10, -2, -1, 1, 2, 10, 100) if number + d >= 0])


def other(rng: random.Random, values: Sequence[str], value: str) -> str:
    """Another of the values."""
    return rng.choice([v for v in values if v != value])


def some_word(rng: random.Random, low: int, high: int) -> str:
    """A word of `low` to `high` letters, or, half of the time, a made-up one of an even number, at least 4."""
    if rng.random() < 0.5:
        return rng.choice([w for w in WORDS if low <= len(w) <= high])
    return made_up_word(rng, max(2, rng.randint(low, high) // 2))
