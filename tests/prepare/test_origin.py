"""Preparing a folder again: what changed under the same names is named and refused; what only moved is the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lead_engine.base.errors import UserError
from lead_engine.config import BatchConfig, PrepareConfig, RuntimeConfig
from lead_engine.pool.state import PoolState
from lead_engine.prepare import run as prepare

pytestmark = pytest.mark.slow


def write(path: Path, first: int, count: int = 40) -> str:
    records = [
        {"instruction": f"say {i}", "output": f"{i} few words {'a' * (i % 7)}"} for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def origin(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> PrepareConfig:
    """A pool prepared from a model folder of its own, scored by it."""
    folder = tmp_path_factory.mktemp("origin")
    shutil.copytree(make_model(), folder / "model")
    config = PrepareConfig(
        pool=(write(folder / "p.jsonl", 0), write(folder / "q.jsonl", 100)),
        model=str(folder / "model"),
        out=folder / "P",
        max_length=64,
        clusters=2,
        warmup_share=0.0,
        batch=BatchConfig(capacity=128),
        runtime=RuntimeConfig(precision="fp32"),
    )
    prepare(config)
    return config


@pytest.fixture
def mine(origin: PrepareConfig, tmp_path: Path) -> PrepareConfig:
    """All of it under another path."""
    root = Path(shutil.copytree(origin.out.parent, tmp_path / "mine"))
    return replace(
        origin, pool=(str(root / "p.jsonl"), str(root / "q.jsonl")), model=str(root / "model"), out=root / "P"
    )


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


CHANGES: dict[str, Callable[[Path], object]] = {
    r"q\.jsonl has other contents \(([\d,]+) bytes when it was prepared, \1 now\)": lambda root: edit(
        root / "q.jsonl", "100", "999"
    ),
    r"p\.jsonl has other contents": lambda root: write(root / "p.jsonl", 500),
    "chat template of the tokenizer differs": lambda root: edit(
        root / "model/chat_template.jinja", "{% if", "{# #}{% if"
    ),
    "weights of the model differ": lambda root: flip_last_byte(root / "model/model.safetensors"),
    "config of the model differs": lambda root: edit(
        root / "model/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'
    ),
    "normalizer of the tokenizer differs": lambda root: edit(
        root / "model/tokenizer.json", '"normalizer": null', '"normalizer": {"type": "Lowercase"}'
    ),
}


@pytest.mark.parametrize("named", CHANGES)
def test_a_change_under_the_same_name(named: str, mine: PrepareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = (mine.out / "state.safetensors").read_bytes()
    prepare(mine)  # it was moved, and nothing more
    assert "already prepared" in capsys.readouterr().out
    CHANGES[named](mine.out.parent)
    with pytest.raises(
        UserError,
        match=f"--out .*P: was prepared from something else: .*{named}.*Name another folder for --out, or del",
    ):
        prepare(mine)
    assert (mine.out / "state.safetensors").read_bytes() == before
    shutil.rmtree(mine.out)  # the way out that the message names
    prepare(mine)


def test_other_sources(mine: PrepareConfig) -> None:
    with pytest.raises(UserError, match="2 sources when it was prepared, 1 now"):
        prepare(replace(mine, pool=mine.pool[:1]))
    with pytest.raises(UserError, match=r"the sources are in another order \(q\.jsonl, p\.jsonl\)"):
        prepare(replace(mine, pool=mine.pool[::-1]))


def test_other_options_are_all_named(mine: PrepareConfig) -> None:
    with pytest.raises(
        UserError, match=r"prepared with other options: clusters was 2, now 3; seed was 0, now 5\. Name another"
    ):
        prepare(replace(mine, clusters=3, seed=5))
    named = json.loads((mine.out / "prepare.json").read_text())["model"]
    with pytest.raises(UserError, match=re.escape(f"model was {named}, now scratch:tiny")):
        prepare(replace(mine, model="scratch:tiny"))


def test_weights_play_no_part_where_they_are_not_read(mine: PrepareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(mine, scoring="ngram", warmup_share=0.01, out=mine.out.with_name("N"))
    prepare(config)
    flip_last_byte(Path(config.model) / "model.safetensors")
    prepare(config)
    assert "weights of the model play no part in --scoring ngram" in capsys.readouterr().out.replace("\n", " ")
    edit(Path(config.model) / "chat_template.jinja", "{% if", "{# #}{% if")
    with pytest.raises(UserError, match="chat template of the tokenizer differs"):
        prepare(config)


def test_a_pool_of_an_older_version_is_told_to_be_one(mine: PrepareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    marker = json.loads((mine.out / "prepare.json").read_text())
    del marker["fingerprint"], marker["seed"]  # an option that it did not know has its default
    (mine.out / "prepare.json").write_text(json.dumps(marker | {"pool": list(mine.pool), "model": mine.model}))
    prepare(mine)
    printed = capsys.readouterr()
    assert "prepared by an older version, which noted no contents" in (printed.out + printed.err).replace("\n", " ")
    with pytest.raises(UserError, match="pool was"):
        prepare(replace(mine, pool=mine.pool[:1]))


def test_nothing_of_an_interrupted_try_is_taken_over(mine: PrepareConfig) -> None:
    """Killed before prepare.json: scores and answers that lie there, of whatever tokens, are not used."""
    expected = PoolState.load(mine.out)
    for name in ("prepare.json", "summary.json", "state.json"):
        (mine.out / name).unlink()
    (mine.out / "stages" / "base").mkdir(parents=True)
    (mine.out / "stages" / "base" / "000000.safetensors").write_bytes(b"not to be read")
    (mine.out / "answers" / "tokens.npy").write_bytes(b"nor this")
    prepare(mine)
    assert PoolState.load(mine.out).difficulty.equal(expected.difficulty)
    (mine.out / "prepare.json").unlink()
    with pytest.raises(UserError, match=r"holds a prepared pool without prepare\.json"):
        prepare(mine)


def test_killed_while_it_tokenised(mine: PrepareConfig) -> None:
    shutil.rmtree(mine.out)
    (mine.out / "store.partial").mkdir(parents=True)
    prepare(mine)
    other = mine.out.with_name("other")
    (other / "model").mkdir(parents=True)
    (other / "summary.json").write_text("{}")  # of a run
    with pytest.raises(UserError, match="exists and is no prepared pool"):
        prepare(replace(mine, out=other))
