"""A small made-up world as an instruction pool: data for the quickstart and the tests that needs no network.

`make_pool` writes three files, wholly determined by its arguments:

- pool.jsonl: records with id, dataset (the task), instruction, input, output, and two fields which the engine never reads: level (0 to 3,
  the difficulty within the task) and note ("", "wrong_answer" or "near_duplicate").
- heldout.jsonl: the same form, all answers right, no near-duplicates. No question of it, in whatever wording, occurs in the pool.
- text.txt: prose of the same world to pre-train on, a paragraph a line: what the people in it are like, and worked examples of the
  tasks. Sums, words and lists that the held-out questions ask about do not occur there as examples. Facts about people do, in prose,
  since nobody could know them otherwise; the held-out question and answer pairs themselves do not.

Tasks: arithmetic (sums, differences), sequences (next number, largest, comparison), strings (reverse, capitals, counting, first letters),
sorting (words, numbers), facts (people of the world; level 3 takes two steps), units (conversion), formatting (copying, lists, records).
Of the pool's records, by default, 8 % have a wrong answer, 15 % are near-duplicates (another record with small changes of wording), and 8 %
are trivial (level 0: the answer stands in the question). The shares are exact up to rounding.

A Llama of about 1M parameters with a vocabulary of 1k to 2k tokens learns it in part within a minute on a CPU: copying and formats soon,
one-step facts and short sums later, long sums and two-step facts hardly.
"""
from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lead_engine.pool.procedural_world import World, make_world

LEVEL_SHARES = (0.40, 0.35, 0.25)
"""Of the records that are not trivial: levels 1, 2, 3."""
ATTEMPTS = 60


class Question(NamedTuple):
    """`key` is what is asked, whatever the wording: the pool and the held-out questions have no key in common."""

    key: tuple[Any, ...]
    instruction: str
    input: str
    output: str
    wrong: str
    """A plausible wrong answer."""


Task = Callable[[random.Random, World, int], Question]


def make_pool(
    out_dir: Path | str,
    *,
    samples: int = 4000,
    heldout: int = 400,
    seed: int = 0,
    wrong_share: float = 0.08,
    duplicate_share: float = 0.15,
    trivial_share: float = 0.08,
    text_kib: int = 450,
) -> None:
    """Write pool.jsonl (`samples` records), heldout.jsonl (`heldout` records) and text.txt (about `text_kib` KiB) to `out_dir`.

    The same arguments give the same bytes. Each file appears complete or not at all.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    world = make_world(random.Random(f"{seed} world"))
    held = _questions(random.Random(f"{seed} heldout"), world, heldout, trivial_share, set())
    taken = {q.key for _, _, q in held}
    copies = round(samples * duplicate_share)
    fresh = _questions(random.Random(f"{seed} pool"), world, samples - copies, trivial_share, taken)
    rng = random.Random(f"{seed} noise")
    records = _with_noise(rng, fresh, copies, round(samples * wrong_share))
    _write_records(out / "heldout.jsonl", "heldout", [_record(*q) for q in held])
    _write_records(out / "pool.jsonl", "pool", records)
    _write(out / "text.txt", "".join(_text(random.Random(f"{seed} text"), world, taken, text_kib * 1024)))
