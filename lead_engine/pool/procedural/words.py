"""Tasks about words and lists: strings, sorting, formatting."""

from __future__ import annotations

import json
import random

from lead_engine.pool.procedural.question import Question, ask, near, some_word
from lead_engine.pool.procedural.world import WORDS, World

# --- strings ---


def strings(rng: random.Random, world: World, level: int) -> Question:
    """Copying, capitals, first letters, reversing, counting."""
    if level == 0:
        w = some_word(rng, 4, 6)
        wordings = ("Write the word {w}.", "Repeat this word.|{w}", "Say {w}.")
        return ask(rng, ("write", w), wordings, w, w[:-1], w=w)
    if level == 1:
        return _capitals_or_first_letter(rng)
    if rng.random() < 0.5:
        return _reversed(rng, some_word(rng, 3, 5) if level == 2 else some_word(rng, 6, 8))
    if level == 2:
        w = some_word(rng, 3, 8)
        wordings = ("How many letters has the word {w}?", "Count the letters.|{w}", "How long is the word {w}?")
        return ask(rng, ("letters", w), wordings, len(w), near(rng, len(w)), w=w)
    return _count_or_initials(rng, rng.sample(WORDS, rng.randint(3, 7)))


def _capitals_or_first_letter(rng: random.Random) -> Question:
    w = some_word(rng, 4, 8)
    if rng.random() < 0.5:
        wordings = ("Write {w} in capitals.", "Put this word into capital letters.|{w}", "What is {w} in upper case?")
        return ask(rng, ("capitals", w), wordings, w.upper(), w.capitalize(), w=w)
    wordings = ("What is the first letter of {w}?", "Give the first letter.|{w}", "With which letter does {w} begin?")
    wrong = w[-1] if w[-1] != w[0] else w[1]
    return ask(rng, ("first", w), wordings, w[0], wrong, w=w)


def _reversed(rng: random.Random, w: str) -> Question:
    wrong = w if w != w[::-1] else w + w[0]
    wordings = (
        "Reverse the word {w}.",
        "Write this word backwards.|{w}",
        "Spell {w} from the last letter to the first.",
    )
    return ask(rng, ("reverse", w), wordings, w[::-1], wrong, w=w)


def _count_or_initials(rng: random.Random, words: list[str]) -> Question:
    shown = " ".join(words)
    if rng.random() < 0.5:
        wordings = ("How many words are in this list: {l}?", "Count the words.|{l}")
        return ask(rng, ("words", *words), wordings, len(words), near(rng, len(words)), l=shown)
    wordings = ("Take the first letter of each word: {l}.", "Write the first letters of these words.|{l}")
    right, wrong = "".join(w[0] for w in words), "".join(w[-1] for w in words) + "s"
    return ask(rng, ("initials", *words), wordings, right, wrong, l=shown)


# --- sorting ---


def sorting(rng: random.Random, world: World, level: int) -> Question:
    """Numbers by size, or words by the alphabet; the wrong answer has two neighbours in each other's place."""
    if level == 0:
        w = some_word(rng, 4, 6)
        return ask(rng, ("sort", w), ("Sort these words: {w}", "Put into order.|{w}"), w, w[::-1] + w[0], w=w)
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
    return ask(rng, ("sort", *ordered), wordings, ", ".join(ordered), ", ".join(swapped), l=", ".join(items))


# --- formatting ---


def formatting(rng: random.Random, world: World, level: int) -> Question:
    """Copying, lists, JSON."""
    words = rng.sample(WORDS, (1, 3, 4, 3)[level])
    if level == 0:
        w = words[0]
        wordings: tuple[str, ...] = ("Say only the word {w}.", "Answer with {w}.", "Your answer is {w}.")
        return ask(rng, ("say", w), wordings, w, f"{w} {w}", w=w)
    if level == 1:
        phrase = " ".join(words)
        wordings = ('Repeat exactly: "{p}"', "Copy this text.|{p}", "Say the words {p} again.")
        return ask(rng, ("copy", *words), wordings, phrase, " ".join(reversed(words)), p=phrase)
    if level == 2:
        listed = ", ".join(words)
        wordings = ("Write as a list with dashes: {l}.", "Make a list, one item a line, each after a dash.|{l}")
        return ask(rng, ("list", *words), wordings, "\n".join(f"- {w}" for w in words), listed, l=listed)
    return _json_record(rng, rng.choice(world.names), words[0], rng.randint(2, 9))


def _json_record(rng: random.Random, name: str, item: str, count: int) -> Question:
    record = {"name": name, "item": item, "count": count}
    wordings = (
        "Write as JSON with name, item and count: {n} buys {c} times {w}.",
        "Turn into JSON (name, item, count).|{n} has {c} of {w}",
    )
    wrong = "; ".join(f"{key}: {value}" for key, value in record.items())
    return ask(rng, ("json", name, item, count), wordings, json.dumps(record), wrong, n=name, c=count, w=item)
