"""The people and words of the made-up world, and the prose about them."""

from __future__ import annotations

import random
from dataclasses import dataclass

WORDS = tuple(
    """
    lamp tree house river stone bread chair table water light paper cloud horse apple green small quiet early
    bridge garden winter summer silver yellow window basket candle button copper dinner finger flower forest
    ginger hammer island jacket kettle ladder market napkin orange pencil pepper pillow pocket rabbit ribbon
    saddle ticket tunnel valley velvet walnut bird boat book bell cake coat corn desk door drum farm fish gate
    gold hand hill home iron king kite lake leaf milk moon nest nose path pond rain ring road roof rope salt sand
    seed ship shoe silk snow soap soup star sun town vase wall wave wind wolf wood yard clock cheese mirror needle
    onion parcel quilt radish shadow spoon thread turnip violin wagon barrel carpet dragon engine feather goblet
    """.split()  # noqa: SIM905 (a hundred quoted lines)
)

CITIES = ("Tarn", "Velmo", "Oskar", "Brindle", "Quay", "Harrow", "Lunden", "Mirefall", "Sorrel", "Pell", "Dunmore")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey", "pink", "purple")
ANIMALS = ("hare", "cat", "dog", "goat", "hen", "fox", "duck", "pony", "frog", "crow", "sheep", "bee")
JOBS = ("baker", "miller", "smith", "tailor", "teacher", "sailor", "painter", "farmer", "weaver", "potter", "clerk")
FOODS = ("plums", "soup", "cheese", "honey", "beans", "rice", "nuts", "pears", "pie", "bread", "fish", "cake")

VALUES = {"city": CITIES, "job": JOBS, "colour": COLOURS, "animal": ANIMALS, "food": FOODS}
ATTRIBUTES = (*VALUES, "friend")

PROSE = {
    "city": (
        "{n} lives in {v}.",
        "The home of {n} is in {v}.",
        "If you visit {v}, you will meet {n}.",
        "{n} has always lived in {v}.",
    ),
    "job": (
        "{n} is a {v}.",
        "{n} works as a {v}.",
        "By trade {n} is a {v}.",
        "Everyone needs a {v}, and here that is {n}.",
    ),
    "colour": (
        "The house of {n} is {v}.",
        "{n} painted the house {v}.",
        "{n} has a {v} house.",
        "A {v} house belongs to {n}.",
    ),
    "animal": (
        "{n} keeps a pet, the {v}.",
        "The pet of {n} is the {v}.",
        "With {n} you often see a {v}.",
        "{n} takes good care of the {v}.",
    ),
    "food": (
        "{n} likes to eat {v}.",
        "{n} would eat {v} every day.",
        "For dinner {n} wants {v}.",
        "The kitchen of {n} is full of {v}.",
    ),
    "friend": (
        "{n} trusts {v} most.",
        "{n} calls {v} the best of friends.",
        "No one is closer to {n} than {v}.",
        "{n} often visits {v}.",
    ),
}


@dataclass(frozen=True)
class World:
    """`people` maps each name to its attributes (city, job, colour, animal, food, friend)."""

    people: dict[str, dict[str, str]]

    @property
    def names(self) -> list[str]:
        return list(self.people)


def made_up_word(rng: random.Random, syllables: int) -> str:
    """A pronounceable word that is in no dictionary, two letters a syllable."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))


def make_world(rng: random.Random, people: int) -> World:
    """`people` persons with different names; attributes drawn evenly and independently, nobody is their own friend."""
    names: list[str] = []
    while len(names) < people:
        name = (made_up_word(rng, 2) + rng.choice("lnrst")).capitalize()
        if name not in names:
            names.append(name)
    world = {}
    for name in names:
        world[name] = {attribute: rng.choice(values) for attribute, values in VALUES.items()}
        world[name]["friend"] = rng.choice([other for other in names if other != name])
    return World(world)


def biography(rng: random.Random, world: World, name: str) -> str:
    """One paragraph that tells all attributes of a person, in random order and wording."""
    order = rng.sample(ATTRIBUTES, len(ATTRIBUTES))
    return " ".join(rng.choice(PROSE[attribute]).format(n=name, v=world.people[name][attribute]) for attribute in order)
