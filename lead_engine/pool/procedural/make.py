"""`lead-engine make-pool`: the three files of the made-up world (see the package for what they hold)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lead_engine.base.errors import UserError
from lead_engine.base.files import write_text
from lead_engine.config import MakePoolConfig
from lead_engine.pool.procedural.prose import example
from lead_engine.pool.procedural.question import Key, Question
from lead_engine.pool.procedural.tasks import TASKS
from lead_engine.pool.procedural.world import World, biography, make_world

LEVEL_SHARES = (0.40, 0.35, 0.25)
"""Levels 1, 2 and 3, of the records that are not trivial."""
ATTEMPTS = 100
TEXT_SHARES = (0.35, 0.25, 0.40)
"""Shares of the text's paragraphs: about people, examples in prose, questions with answers."""


class Item(NamedTuple):
    """A question with its place in the pool."""

    task: str
    level: int
    question: Question
    note: str = ""

    @property
    def prompt(self) -> tuple[str, str]:
        return self.question.instruction, self.question.input


def run(config: MakePoolConfig) -> None:
    """`lead-engine make-pool`."""
    make_pool(config.out, samples=config.samples, seed=config.seed)


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
    """Write pool.jsonl (`samples` records), heldout.jsonl (`heldout` records) and text.txt (`text_kib` KiB).

    The same arguments give the same bytes. Each file appears complete or not at all. The world has 90 people, more for
    more than 4,500 samples. Raises UserError where more different questions are asked for than the world has (it has
    enough for 20,000 samples), and where a file is there with other contents.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    # One stream of random numbers for each part: changing the size of one leaves the others as they are.
    parts = ("world", "heldout", "pool", "noise", "text")
    world_rng, held_rng, pool_rng, noise_rng, text_rng = (random.Random(f"{seed} {part}") for part in parts)
    world = make_world(world_rng, max(90, samples // 50))
    held = _items(held_rng, world, heldout, trivial_share, set())
    taken = {item.question.key for item in held}
    copies, wrong = round(samples * duplicate_share), round(samples * wrong_share)
    fresh = _items(pool_rng, world, samples - copies, trivial_share, taken)
    pool = _with_noise(noise_rng, fresh, copies, wrong)
    texts = {
        out / "heldout.jsonl": "".join(_lines("heldout", held)),
        out / "pool.jsonl": "".join(_lines("pool", pool)),
        out / "text.txt": "".join(_text(text_rng, world, taken, text_kib * 1024)),
    }
    for path, text in texts.items():
        if path.exists() and path.read_bytes() != text.encode():
            raise UserError(f"{path}: is there with other contents, and would be lost; name another folder for --out")
    for path, text in texts.items():
        write_text(path, text)


def _items(rng: random.Random, world: World, count: int, trivial_share: float, taken: set[Key]) -> list[Item]:
    """`count` questions with different prompts and no key in `taken`, the tasks in equal parts."""
    trivial = round(count * trivial_share)
    rest = [round((count - trivial) * share) for share in LEVEL_SHARES[:2]]
    counts = [trivial, *rest, count - trivial - sum(rest)]
    levels = [level for level, n in enumerate(counts) for _ in range(n)]
    items: dict[tuple[str, str], Item] = {}
    for i, level in enumerate(levels):
        task = list(TASKS)[i % len(TASKS)]
        item = _new_item(rng, world, task, level, taken, items)
        items[item.prompt] = item
    shuffled = list(items.values())
    rng.shuffle(shuffled)
    return shuffled


def _new_item(rng: random.Random, world: World, task: str, level: int, taken: set[Key], items: dict[Any, Item]) -> Item:
    for _ in range(ATTEMPTS):
        item = Item(task, level, TASKS[task](rng, world, level))
        if item.question.key not in taken and item.prompt not in items:
            return item
    raise UserError(
        f"--samples: the world has too few different questions of task {task}, level {level}; ask for fewer"
    )


def _with_noise(rng: random.Random, fresh: list[Item], copies: int, wrong: int) -> list[Item]:
    """Some answers made wrong, and near-duplicates of right ones (up to four of the same record) mixed in."""
    items = list(fresh)
    for i in rng.sample(range(len(fresh)), wrong):
        question = fresh[i].question
        items[i] = fresh[i]._replace(question=question._replace(output=question.wrong), note="wrong_answer")
    originals = rng.sample([item for item in items if not item.note], -(-copies // 4))
    variants = [(original, vary) for original in originals for vary in rng.sample(VARIATIONS, 4)][:copies]
    for original, vary in variants:
        question = original.question._replace(instruction=vary(original.question.instruction))
        items.append(original._replace(question=question, note="near_duplicate"))
    rng.shuffle(items)
    return items


VARIATIONS: tuple[Callable[[str], str], ...] = (
    lambda text: f"Please {text[0].lower()}{text[1:]}",
    lambda text: f"{text} Thank you.",
    lambda text: f"{text[0].lower()}{text[1:]}",
    lambda text: f"Question: {text}",
    lambda text: f"{text}  ",
    lambda text: f"Hello! {text}",
)
"""Small changes of wording that leave the answer as it is; no task words its questions like this."""


def _text(rng: random.Random, world: World, taken: set[Key], size: int) -> Iterator[str]:
    """Paragraphs, at least `size` bytes, about every person equally often (up to one)."""
    written = 0
    names: list[str] = []  # people that are still to be told about in this turn
    while written < size:
        kind = rng.choices(("people", "examples", "questions"), TEXT_SHARES)[0]
        if kind == "people":
            names = names or rng.sample(world.names, len(world.names))
            paragraph = biography(rng, world, names.pop())
        elif kind == "examples":
            paragraph = " ".join(example(rng, taken) for _ in range(5))
        else:
            paragraph = " ".join(_answered(rng, world, taken) for _ in range(4))
        written += len(paragraph) + 1
        yield paragraph + "\n"


def _answered(rng: random.Random, world: World, taken: set[Key]) -> str:
    """A question with its answer, in one line: without such lines a small model does not follow an instruction."""
    while True:
        question = rng.choice(list(TASKS.values()))(rng, world, rng.randrange(4))
        if question.key not in taken and "\n" not in question.output:
            return f"Question: {question.instruction} {question.input} Answer: {question.output}".replace("  ", " ")


def _lines(split: str, items: list[Item]) -> Iterator[str]:
    for number, (task, level, question, note) in enumerate(items):
        record = {
            "id": f"{split}-{number:05d}",
            "dataset": task,
            "instruction": question.instruction,
            "input": question.input,
            "output": question.output,
            "level": level,
            "note": note,
        }
        yield json.dumps(record, ensure_ascii=False) + "\n"
