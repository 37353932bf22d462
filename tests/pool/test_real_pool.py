"""The whole real instruction pool is read and encoded, with nothing lost."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from lead_engine.pool.problems import Problems
from lead_engine.pool.records import Record, read_records
from lead_engine.pool.store import TokenStore
from lead_engine.pool.template import encode
from lead_engine.pool.tokenizer import train_tokenizer

pytestmark = pytest.mark.slow

SAMPLES = 54_028


@pytest.fixture(scope="module")
def records(real_data: Path) -> list[Record]:
    read, problems = read_records([str(real_data / "pool.jsonl")], skip_bad=False)
    assert not problems.entries
    return read


def test_every_record_is_read(records: list[Record], real_data: Path) -> None:
    assert len(records) == SAMPLES
    assert len({r.id for r in records}) == SAMPLES
    with open(real_data / "pool.jsonl", encoding="utf-8") as file:
        counts = Counter(line.split('"dataset": "', 1)[1].split('"', 1)[0] for line in file)
    assert Counter(r.dataset for r in records) == counts
    assert len(counts) == 13
    assert [r.line for r in records] == list(range(1, SAMPLES + 1))
    assert max(len(r.messages) for r in records if r.dataset == "oasst1") > 2


def test_a_sample_of_it_through_tokens_and_back(records: list[Record], tmp_path: Path) -> None:
    """From records to a store: what is learnt decodes to the answers, and every record is stored or named."""
    chosen = random.Random(0).sample(records, 3000)
    tokenizer = train_tokenizer((m.content for r in chosen for m in r.messages), 2000)
    problems = Problems()
    samples = list(encode(chosen, tokenizer, 512, problems))
    kinds = problems.counts()
    assert len(samples) + kinds.get("response_truncated_away", 0) == len(chosen)
    assert sum(s.truncated for s in samples) == kinds["truncated"]
    assert set(kinds) <= {"truncated", "response_truncated_away"}
    for sample in samples:
        learnt = tokenizer.decode(list(itertools.compress(sample.ids, sample.response)))
        answers = "".join(m.content + "<|im_end|>" for m in sample.record.messages if m.role == "assistant")
        if sample.truncated:
            learnt, answers = learnt.rstrip("\ufffd"), answers[: len(learnt.rstrip("\ufffd"))]
        # An answer's leading line breaks may share a token with the line break before it.
        assert learnt == answers or learnt.lstrip() == answers.lstrip(), sample.record.id
    TokenStore.write(tmp_path / "store", iter(samples))
    store = TokenStore.open(tmp_path / "store", "mmap")
    assert store.num_samples == len(samples)
    assert store.lengths.tolist() == [len(s.ids) for s in samples]
    last = store.tokens[store.offsets[-2] :]
    assert torch.equal(last, torch.tensor(samples[-1].ids, dtype=torch.int32))


def test_the_held_out_records_are_others(records: list[Record], real_data: Path) -> None:
    held, problems = read_records([str(real_data / "heldout.jsonl")], skip_bad=False)
    assert len(held) == 2299
    assert not problems.entries
    assert not {r.id for r in records} & {r.id for r in held}
