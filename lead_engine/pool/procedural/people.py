"""The task about the people of the made-up world: facts."""

from __future__ import annotations

import random

from lead_engine.pool.procedural.question import Question, ask, other
from lead_engine.pool.procedural.world import ATTRIBUTES, VALUES, World

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
    """What a person is like: read off the question (0), known (1), two facts (2), a fact about the best friend (3)."""
    name = rng.choice(world.names)
    attribute = rng.choice(ATTRIBUTES if level == 1 else list(VALUES))
    if level == 0:
        return _read_off(rng, name, attribute)
    if level == 1:
        value = world.people[name][attribute]
        wrong = other(rng, _values(world, name, attribute), value)
        return ask(rng, ("fact", name, attribute), FACT_QUESTIONS[attribute], value, wrong, n=name)
    if level == 2:
        return _two_facts(rng, world, name, attribute)
    return _friends_fact(rng, world, name, attribute)


def _values(world: World, name: str, attribute: str) -> list[str]:
    """What a person's attribute may be."""
    if attribute == "friend":
        return [each for each in world.names if each != name]
    return list(VALUES[attribute])


def _read_off(rng: random.Random, name: str, attribute: str) -> Question:
    value = rng.choice(VALUES[attribute])
    wordings = [f"Suppose the {attribute} of {{n}} is {{v}}. {q}" for q in FACT_QUESTIONS[attribute]]
    wrong = other(rng, VALUES[attribute], value)
    return ask(rng, ("read", name, attribute, value), wordings, value, wrong, n=name, v=value)


def _two_facts(rng: random.Random, world: World, name: str, attribute: str) -> Question:
    person = world.people[name]
    value = person[attribute]
    second = other(rng, list(VALUES), attribute)
    wordings = (
        "Give the {a} and the {b} of {n}.",
        "Look up {a} and {b}.|{n}",
        "What are the {a} and the {b} of {n}?",
    )
    answer = f"{attribute}: {{}}; {second}: {person[second]}"
    key = ("facts", name, *sorted((attribute, second)))
    wrong = answer.format(other(rng, _values(world, name, attribute), value))
    return ask(rng, key, wordings, answer.format(value), wrong, n=name, a=attribute, b=second)


def _friends_fact(rng: random.Random, world: World, name: str, attribute: str) -> Question:
    friend = world.people[name]["friend"]
    value = world.people[friend][attribute]
    answer = f"The best friend of {name} is {friend}. The {attribute} of {friend} is {{}}."
    wrong = answer.format(other(rng, VALUES[attribute], value))
    who = f"the best friend of {name}"
    return ask(rng, ("hop", name, attribute), FACT_QUESTIONS[attribute], answer.format(value), wrong, n=who)
