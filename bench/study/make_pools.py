"""The three pools of the study: a sample of a real pool as it is, with wrong answers, and with near-duplicates.

    python bench/study/make_pools.py --pool ../shared/data/pool.jsonl --heldout ../shared/data/heldout.jsonl \
        --out runs/study/data

OUT/clean.jsonl: `--samples` records drawn at random. OUT/noisy.jsonl: the same records, but a share of them, `--wrong`,
has its answers exchanged with each other, so that they answer other instructions; their ids end in "~wrong".
OUT/near.jsonl: as many records, of which `--near` are copies of a twentieth of the others with one word of the
instruction or answer dropped, doubled or moved; their ids end in "~nearN". OUT/heldout.jsonl: at most `--per-task`
held-out records of each data set.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
SOURCES = 20
"""A near-duplicate's source has this many copies."""


def read(path: Path) -> list[Record]:
    with path.open(encoding="utf-8") as lines:  # not splitlines(): answers hold other line separators
        return [json.loads(line) for line in lines]


def write(path: Path, records: Sequence[Record]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    print(f"{path}: {len(records):,} records")


def answer(record: Record) -> str:
    return record["messages"][-1]["content"] if "messages" in record else record["output"]


def with_answer(record: Record, text: str) -> Record:
    if "messages" in record:
        return {**record, "messages": [*record["messages"][:-1], {**record["messages"][-1], "content": text}]}
    return {**record, "output": text}


def wrong_answers(records: list[Record], share: float, draw: random.Random) -> list[Record]:
    """A `share` of the records answer each other's instructions: a cyclic shift in random order: none keeps its own."""
    chosen = draw.sample(range(len(records)), round(share * len(records)))
    found = list(records)
    for place, source in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        found[place] = with_answer({**records[place], "id": f"{records[place]['id']}~wrong"}, answer(records[source]))
    return found


def near_duplicates(records: list[Record], share: float, draw: random.Random) -> list[Record]:
    """As many records, of which a `share` are lightly changed copies of some of the others."""
    copies = round(share * len(records))
    kept = draw.sample(records, len(records) - copies)
    sources = kept[: max(1, copies // SOURCES)]
    made = [changed(sources[n % len(sources)], n, draw) for n in range(copies)]
    found = kept + made
    draw.shuffle(found)
    return found


def changed(record: Record, number: int, draw: random.Random) -> Record:
    words = answer(record).split(" ")
    place = draw.randrange(len(words))
    kind = draw.randrange(3) if len(words) > 3 else 1
    if kind == 0:
        del words[place]
    elif kind == 1:
        words.insert(place, words[place])
    else:
        words.insert(draw.randrange(len(words)), words.pop(place))
    return with_answer({**record, "id": f"{record['id']}~near{number}"}, " ".join(words))


def few_of_each(records: list[Record], most: int, draw: random.Random) -> list[Record]:
    seen: Counter[str] = Counter()
    kept = []
    for record in draw.sample(records, len(records)):
        seen[record["dataset"]] += 1
        if seen[record["dataset"]] <= most:
            kept.append(record)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=15_000)
    parser.add_argument("--wrong", type=float, default=0.2, help="share of the noisy pool's answers that are exchanged")
    parser.add_argument("--near", type=float, default=0.5, help="share of the repetitive pool that are near-duplicates")
    parser.add_argument("--per-task", type=int, default=60, help="most held-out records of a data set")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    draw = random.Random(flags.seed)
    records = draw.sample(read(flags.pool), flags.samples)
    flags.out.mkdir(parents=True, exist_ok=True)
    write(flags.out / "clean.jsonl", records)
    write(flags.out / "noisy.jsonl", wrong_answers(records, flags.wrong, draw))
    write(flags.out / "near.jsonl", near_duplicates(records, flags.near, draw))
    write(flags.out / "heldout.jsonl", few_of_each(read(flags.heldout), flags.per_task, draw))


if __name__ == "__main__":
    main()
