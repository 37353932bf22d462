"""The tasks of the made-up world (see procedural.py): each makes a question of a level, 0 (trivial) to 3 (hard)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lead_engine.pool.procedural_world import ATTRIBUTES, VALUES, WORDS, World, made_up_word


class Question(NamedTuple):
    """`key` is what is asked, whatever the wording; `wrong` a plausible wrong answer."""

    key: tuple[Any, ...]
    instruction: str
    input: str
    output: str
    wrong: str


Task = Callable[[random.Random, World, int], Question]


def _near(rng: random.Random, number: int) -> int:
    """Another number, off by what a slip of a digit makes."""
    return number + rng.choice([d for d in (-10, -2, -1, 1, 2, 10, 100) if number + d >= 0])


def _other(rng: random.Random, values: Sequence[str], value: str) -> str:
    return rng.choice([v for v in values if v != value])


def _ask(
    rng: random.Random, key: tuple[Any, ...], wordings: Sequence[str], output: object, wrong: object, **fields: object
) -> Question:
    """One of the wordings, filled in; what follows a "|" in it is the record's input."""
    instruction, _, addition = rng.choice(wordings).partition("|")
    return Question(key, instruction.format(**fields), addition.format(**fields), str(output), str(wrong))


# --- numbers ---


def arithmetic(rng: random.Random, world: World, level: int) -> Question:
    if level == 0:
        n = rng.randint(10, 999)
        return _ask(
            rng, ("write", n), ("Write the number {n}.", "Say {n}.", "Copy this number.|{n}"), n, _near(rng, n), n=n
        )
    low, high = ((2, 20), (21, 99), (101, 499))[level - 1]
    a, b = rng.randint(low, high), rng.randint(low, high)
    if rng.random() < 0.35 and level < 3:
        a, b = a + b, a
        wordings = ("What is {a} - {b}?", "Take {b} away from {a}.", "Compute {a} minus {b}.", "Subtract.|{a} - {b}")
        return _ask(rng, ("-", a, b), wordings, a - b, _near(rng, a - b), a=a, b=b)
    wordings = ("What is {a} + {b}?", "Add {a} and {b}.", "Compute {a} plus {b}.", "Find the sum.|{a} + {b}")
    key = ("+", min(a, b), max(a, b))
    if level < 3:
        return _ask(rng, key, wordings, a + b, _near(rng, a + b), a=a, b=b)
    return _ask(rng, key, wordings, column_sum(a, b, a + b), column_sum(a, b, _near(rng, a + b)), a=a, b=b)


def column_sum(a: int, b: int, result: int) -> str:
    """Addition digit by digit from the right, with carries, ending in `result`."""
    steps, carry = [], 0
    for x, y in zip(reversed(f"{a}"), reversed(f"{b}"), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x} + {y}" + (f" + {carry}" if carry else "") + f" = {total}")
        carry = total // 10
    return ", ".join(steps) + f". The sum is {result}."


def sequences(rng: random.Random, world: World, level: int) -> Question:
    if level == 0:
        n = rng.randint(2, 999)
        wordings = ("Continue: {n}, {n}, {n},", "What comes next?|{n}, {n}, {n}")
        return _ask(rng, ("same", n), wordings, n, _near(rng, n), n=n)
    if rng.random() < 0.5:
        numbers = tuple(rng.sample(range(10, (50, 100, 1000)[level - 1]), level + 1))
        name, answer = rng.choice((("largest", max(numbers)), ("smallest", min(numbers))))
        wordings = (
            "Which number is the {name}: {l}?",
            "Find the {name} number.|{l}",
            "Name the {name} of these numbers: {l}.",
        )
        wrong = rng.choice([n for n in numbers if n != answer])
        return _ask(rng, (name, *sorted(numbers)), wordings, answer, wrong, name=name, l=", ".join(map(str, numbers)))
    step = rng.randint(*((1, 2), (3, 9), (11, 25))[level - 1]) * (rng.choice((1, -1)) if level > 1 else 1)
    first = rng.randint(1, 80) + (4 * abs(step) if step < 0 else 0)
    numbers = tuple(first + i * step for i in range(4))
    answer = numbers[-1] + step
    wordings = ("Continue: {l},", "What comes next?|{l}", "Which number follows {l}?")
    return _ask(rng, ("next", numbers), wordings, answer, _near(rng, answer), l=", ".join(map(str, numbers)))


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
EASY_UNITS = ("metres", "kilograms", "dollars")
COMPOUND_UNITS = ("hours", "feet", "weeks", "days")


def units(rng: random.Random, world: World, level: int) -> Question:
    if level == 0:
        unit, n = rng.choice(list(UNITS)), rng.randint(2, 60)
        wordings = ("How many {u} are {n} {u}?", "Give {n} {u} in {u}.")
        return _ask(rng, ("same", n, unit), wordings, f"{n} {unit}", f"{_near(rng, n)} {unit}", n=n, u=unit)
    if level < 3:
        large = rng.choice(EASY_UNITS if level == 1 else [u for u in UNITS if u not in EASY_UNITS])
        (small, factor), n = UNITS[large], rng.randint(2, 199 if level == 1 else 60)
        wordings = (
            "How many {s} are {n} {u}?",
            "Convert {n} {u} to {s}.",
            "Convert to {s}.|{n} {u}",
            "Give {n} {u} in {s}.",
        )
        wrong = f"{rng.choice((n + factor, n * factor * 10, _near(rng, n * factor)))} {small}"
        return _ask(rng, ("unit", large, n), wordings, f"{n * factor} {small}", wrong, n=n, u=large, s=small)
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
    key = ("units", large, n, rest)
    return _ask(
        rng, key, wordings, answer.format(total), answer.format(_near(rng, total)), n=n, u=large, s=small, r=rest
    )


# --- words ---


def _word(rng: random.Random, low: int, high: int) -> str:
    """A word of `low` to `high` letters, or, half of the time, a made-up one of an even number, at least 4."""
    if rng.random() < 0.5:
        return rng.choice([w for w in WORDS if low <= len(w) <= high])
    return made_up_word(rng, max(2, rng.randint(low, high) // 2))


def strings(rng: random.Random, world: World, level: int) -> Question:
    if level == 0:
        w = _word(rng, 4, 6)
        return _ask(rng, ("write", w), ("Write the word {w}.", "Repeat this word.|{w}", "Say {w}."), w, w[:-1], w=w)
    if level == 1:
        w = _word(rng, 4, 8)
        if rng.random() < 0.5:
            wordings = (
                "Write {w} in capitals.",
                "Put this word into capital letters.|{w}",
                "What is {w} in upper case?",
            )
            return _ask(rng, ("capitals", w), wordings, w.upper(), w.capitalize(), w=w)
        wordings = (
            "What is the first letter of {w}?",
            "Give the first letter.|{w}",
            "With which letter does {w} begin?",
        )
        return _ask(rng, ("first", w), wordings, w[0], w[-1] if w[-1] != w[0] else w[1], w=w)
    if rng.random() < 0.5:
        w = _word(rng, 3, 5) if level == 2 else _word(rng, 6, 8)
        wrong = w if w != w[::-1] else w + w[0]
        wordings = (
            "Reverse the word {w}.",
            "Write this word backwards.|{w}",
            "Spell {w} from the last letter to the first.",
        )
        return _ask(rng, ("reverse", w), wordings, w[::-1], wrong, w=w)
    if level == 2:
        w = _word(rng, 3, 8)
        wordings = ("How many letters has the word {w}?", "Count the letters.|{w}", "How long is the word {w}?")
        return _ask(rng, ("letters", w), wordings, len(w), _near(rng, len(w)), w=w)
    words = rng.sample(WORDS, rng.randint(3, 7))
    if rng.random() < 0.5:
        wordings = ("How many words are in this list: {l}?", "Count the words.|{l}")
        return _ask(rng, ("words", *words), wordings, len(words), _near(rng, len(words)), l=" ".join(words))
    wordings = ("Take the first letter of each word: {l}.", "Write the first letters of these words.|{l}")
    letters = "".join(w[0] for w in words)
    return _ask(rng, ("initials", *words), wordings, letters, "".join(w[-1] for w in words) + "s", l=" ".join(words))


def sorting(rng: random.Random, world: World, level: int) -> Question:
    if level == 0:
        w = _word(rng, 4, 6)
        return _ask(rng, ("sort", w), ("Sort these words: {w}", "Put into order.|{w}"), w, w[::-1] + w[0], w=w)
    if rng.random() < 0.35:
        numbers = rng.sample(range(10, (30, 100, 1000)[level - 1]), level + 2)
        items, ordered = [str(n) for n in numbers], [str(n) for n in sorted(numbers)]
        wordings = (
            "Sort these numbers: {l}.",
            "Put these numbers into order, the smallest first.|{l}",
            "Order by size: {l}.",
        )
    else:
        items = rng.sample(WORDS, (2, 4, 6)[level - 1])
        ordered = sorted(items)
        wordings = (
            "Sort these words: {l}.",
            "Put these words into alphabetical order.|{l}",
            "Order by the alphabet: {l}.",
        )
    swapped = ordered[:]
    i = rng.randrange(len(ordered) - 1)
    swapped[i], swapped[i + 1] = swapped[i + 1], swapped[i]
    return _ask(rng, ("sort", *ordered), wordings, ", ".join(ordered), ", ".join(swapped), l=", ".join(items))


# --- people and forms ---

FACT_QUESTIONS = {
    "city": ("In which city does {n} live?", "Where does {n} live?", "Name the city of {n}."),
    "job": ("What is the job of {n}?", "What does {n} work as?", "Name the trade of {n}."),
    "colour": (
        "What colour is the house of {n}?",
        "Which colour has the house of {n}?",
        "Name the colour of the house of {n}.",
    ),
    "animal": ("Which animal does {n} keep?", "What pet has {n}?", "Name the pet of {n}."),
    "food": ("What does {n} like to eat?", "Which food does {n} like?", "Name the favourite food of {n}."),
    "friend": ("Who is the best friend of {n}?", "Whom does {n} like most?", "Name the best friend of {n}."),
}


def facts(rng: random.Random, world: World, level: int) -> Question:
    name = rng.choice(world.names)
    person = world.people[name]
    values = {**VALUES, "friend": [n for n in world.names if n != name]}
    attribute = rng.choice(ATTRIBUTES if level == 1 else list(VALUES))
    value, question = person[attribute], FACT_QUESTIONS[attribute]
    if level == 0:
        value = rng.choice(VALUES[attribute])
        wordings = [f"Suppose the {attribute} of {{n}} is {{v}}. {q}" for q in question]
        return _ask(
            rng,
            ("read", name, attribute, value),
            wordings,
            value,
            _other(rng, VALUES[attribute], value),
            n=name,
            v=value,
        )
    if level == 1:
        return _ask(rng, ("fact", name, attribute), question, value, _other(rng, values[attribute], value), n=name)
    if level == 2:
        second = _other(rng, list(VALUES), attribute)
        wordings = (
            "Give the {a} and the {b} of {n}.",
            "Look up {a} and {b}.|{n}",
            "What are the {a} and the {b} of {n}?",
        )
        answer = f"{attribute}: {{}}; {second}: {person[second]}"
        key = ("facts", name, *sorted((attribute, second)))
        wrong = answer.format(_other(rng, values[attribute], value))
        return _ask(rng, key, wordings, answer.format(value), wrong, n=name, a=attribute, b=second)
    friend = person["friend"]
    value = world.people[friend][attribute]
    answer = f"The best friend of {name} is {friend}. The {attribute} of {friend} is {{}}."
    wrong = answer.format(_other(rng, VALUES[attribute], value))
    return _ask(rng, ("hop", name, attribute), question, answer.format(value), wrong, n=f"the best friend of {name}")


def formatting(rng: random.Random, world: World, level: int) -> Question:
    words = rng.sample(WORDS, (1, 3, 4, 3)[level])
    if level == 0:
        w = words[0]
        return _ask(
            rng, ("say", w), ("Say only the word {w}.", "Answer with {w}.", "Your answer is {w}."), w, w + " " + w, w=w
        )
    if level == 1:
        phrase = " ".join(words)
        wordings = ('Repeat exactly: "{p}"', "Copy this text.|{p}", "Say the words {p} again.")
        return _ask(rng, ("copy", *words), wordings, phrase, " ".join(reversed(words)), p=phrase)
    if level == 2:
        wordings = ("Write as a list with dashes: {l}.", "Make a list, one item a line, each after a dash.|{l}")
        output = "\n".join(f"- {w}" for w in words)
        return _ask(rng, ("list", *words), wordings, output, ", ".join(words), l=", ".join(words))
    name, count = rng.choice(world.names), rng.randint(2, 9)
    record = {"name": name, "item": words[0], "count": count}
    wordings = (
        "Write as JSON with name, item and count: {n} buys {c} times {w}.",
        "Turn into JSON (name, item, count).|{n} has {c} of {w}",
    )
    wrong = "; ".join(f"{k}: {v}" for k, v in record.items())
    return _ask(rng, ("json", name, words[0], count), wordings, json.dumps(record), wrong, n=name, c=count, w=words[0])


TASKS: dict[str, Task] = {f.__name__: f for f in (arithmetic, sequences, units, strings, sorting, facts, formatting)}


# --- the same as prose ---


def example(rng: random.Random, taken: set[tuple[Any, ...]]) -> str:
    """A sentence of prose that shows what the tasks are about, of none of the questions in `taken`."""
    while True:
        key, text = rng.choice((_sum_example, _next_example, _unit_example, _word_example, _order_example))(rng)
        if not taken.intersection(key):
            return text


def _sum_example(rng: random.Random) -> tuple[list[tuple[Any, ...]], str]:
    high = rng.choice((20, 99))
    a, b = rng.randint(2, high), rng.randint(2, high)
    text = rng.choice(
        (
            "{a} and {b} together are {c}.",
            "{a} + {b} = {c}.",
            "From {c} take {b}, and {a} are left.",
            "{c} - {b} = {a}.",
        )
    )
    return [("+", min(a, b), max(a, b)), ("-", a + b, a), ("-", a + b, b)], text.format(a=a, b=b, c=a + b)


def _next_example(rng: random.Random) -> tuple[list[tuple[Any, ...]], str]:
    step, first = rng.randint(1, 12), rng.randint(1, 80)
    numbers = [first + i * step for i in range(6)]
    text = "Counting by {s}: {l}." if rng.random() < 0.5 else "The numbers {l} go up by {s}."
    return [("next", tuple(numbers[i : i + 4])) for i in range(2)], text.format(s=step, l=", ".join(map(str, numbers)))


def _unit_example(rng: random.Random) -> tuple[list[tuple[Any, ...]], str]:
    large, n = rng.choice(list(UNITS)), rng.randint(2, 40)
    small, factor = UNITS[large]
    text = rng.choice(("{n} {u} are as much as {t} {s}.", "{t} {s} make {n} {u}."))
    return [("unit", large, n)], text.format(n=n, u=large, s=small, t=n * factor)


def _word_example(rng: random.Random) -> tuple[list[tuple[Any, ...]], str]:
    w = _word(rng, 3, 8)
    text = rng.choice(
        ("The word {w} is spelled {s}.", "Backwards {w} reads {r}.", "In capitals {w} is {u}.", "{w} has {n} letters.")
    )
    keys = [(name, w) for name in ("reverse", "letters", "capitals", "first")]
    return keys, text.format(w=w, s=" ".join(w), r=w[::-1], u=w.upper(), n=len(w))


def _order_example(rng: random.Random) -> tuple[list[tuple[Any, ...]], str]:
    words = sorted(rng.sample(WORDS, rng.randint(2, 6)))
    text = rng.choice(("In alphabetical order: {l}.", "A dictionary has them in this order: {l}."))
    return [("sort", *words)], text.format(l=", ".join(words))
