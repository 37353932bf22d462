"""Where a pool and a model meet, and where a run is resumed: what does not fit is named and refused; what only moved
is the same.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lead_engine.base import fingerprint
from lead_engine.base.errors import UserError
from lead_engine.config import (
    BatchConfig,
    LoraConfig,
    MergeConfig,
    PrepareConfig,
    PretrainConfig,
    RuntimeConfig,
    TrainConfig,
)
from lead_engine.model.merge import run as merge
from lead_engine.prepare import run as prepare
from lead_engine.training.pretrain import run as pretrain
from lead_engine.training.train import run as train

pytestmark = pytest.mark.slow

BATCH, RUNTIME = BatchConfig(capacity=128), RuntimeConfig(precision="fp32")


def write(path: Path, words: str) -> str:
    records = [{"instruction": f"{words} {i}", "output": f"{i} {words} {words[: i % 9]}"} for i in range(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def prepared(folder: Path, words: str, model: str = "scratch:tiny", name: str = "P") -> Path:
    out = folder / name
    pool = (write(folder / f"{name}.jsonl", words),)
    size = {"vocab_size": 330} if model.startswith("scratch:") else {}
    prepare(PrepareConfig(pool, model, out, 64, 2, scoring="ngram", batch=BATCH, runtime=RUNTIME, **size))
    return out


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PA and PB, each with a tokenizer of its own and a model for it."""
    folder = tmp_path_factory.mktemp("pools")
    prepared(folder, "what a fine day it is today", name="PA")
    prepared(folder, "zebra quux waltz vexing jumbo fjord", name="PB")
    return folder


@pytest.fixture
def mine(pools: Path, tmp_path: Path) -> TrainConfig:
    """A run over PA from its own model, not begun."""
    root = Path(shutil.copytree(pools, tmp_path / "pools"))
    return TrainConfig(
        root / "PA",
        str(root / "PA/model"),
        tmp_path / "run",
        budget=0.3,
        batch=BATCH,
        runtime=RUNTIME,
        checkpoint_every=1,
    )


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


# --- pool and model ---


def test_another_tokenizer(mine: TrainConfig) -> None:
    other = mine.pool.with_name("PB") / "model"
    what = rf"--model {other}: its tokenizer is not the one that --pool {mine.pool} was prepared with"
    message = rf"{what}: .*merges of the tokenizer differ"
    with pytest.raises(
        UserError, match=rf"{message}.*Prepare the pool with this model, or train .* prepared with scratch:tiny"
    ):
        train(replace(mine, model=str(other)))
    assert not mine.out.exists()


def test_a_larger_vocabulary_tells_the_sizes(mine: TrainConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(mine.model)
    size = len(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(mine.model)
    with pytest.raises(
        UserError, match=rf"vocabulary of the tokenizer differs \({size} tokens in the pool, {size + 1} in the model\)"
    ):
        train(mine)


def test_another_template_and_its_way_out(mine: TrainConfig) -> None:
    template = Path(mine.model) / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "Assistant"))
    message = rf"chat template of the tokenizer differs.*copy the files of {mine.pool / 'tokenizer'} into its folder"
    with pytest.raises(UserError, match=message):
        train(mine)
    for file in (mine.pool / "tokenizer").iterdir():
        shutil.copy(file, mine.model)
    train(mine)


def test_a_pool_of_an_older_version_is_compared_by_its_tokenizer(
    mine: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = json.loads((mine.pool / "prepare.json").read_text())
    del marker["fingerprint"]
    (mine.pool / "prepare.json").write_text(json.dumps(marker))
    with pytest.raises(UserError, match="merges of the tokenizer differ"):
        train(replace(mine, model=str(mine.pool.with_name("PB") / "model")))
    shutil.rmtree(mine.pool / "tokenizer")
    train(mine)
    assert "does not say which tokenizer it was prepared with" in "".join(capsys.readouterr()).replace("\n", " ")


def test_a_model_tuned_from_the_pool_s_is_trained_on_and_said(
    pools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The usual flow: prepare with A, train A, go on from RUN."""
    model = pools / "PA" / "model"
    pool = (write(tmp_path / "p.jsonl", "what a fine day"),)
    prepare(PrepareConfig(pool, str(model), tmp_path / "P", 64, 2, warmup_share=0.0, batch=BATCH, runtime=RUNTIME))
    config = TrainConfig(tmp_path / "P", str(model), tmp_path / "one", budget=0.3, batch=BATCH, runtime=RUNTIME)
    train(config)
    assert "scored by another model" not in capsys.readouterr().out
    train(replace(config, model=str(config.out), out=tmp_path / "two"))
    assert f"scored by another model (it was prepared with {model})" in capsys.readouterr().out.replace("\n", " ")
    mine = shutil.copytree(model, tmp_path / "mine")
    marker = config.pool / "prepare.json"  # as if it had been prepared with the copy
    marker.write_text(marker.read_text().replace(str(model), str(mine)))
    shutil.copy(config.out / "model" / "model.safetensors", mine)
    train(replace(config, model=str(mine), out=tmp_path / "three"))
    assert "has changed since it scored --pool" in capsys.readouterr().err.replace("\n", " ")


def test_a_scratch_model_is_the_pool_s_own_only_under_its_name(mine: TrainConfig) -> None:
    train(replace(mine, model="scratch:tiny"))
    assert not (mine.out / "init").exists()
    other = replace(mine, model="scratch:mini", out=mine.out.with_name("mini"))
    train(other)
    assert json.loads((other.out / "model" / "config.json").read_text())["hidden_size"] == 192


def test_an_initial_model_of_another_try_is_not_taken_over(mine: TrainConfig, tmp_path: Path) -> None:
    """RUN/init of a run that never began, of another seed."""
    one, two = (replace(mine, model="scratch:mini", seed=5, out=tmp_path / name) for name in ("one", "two"))
    train(one)
    shutil.copytree(one.out / "init", two.out / "init")
    flip(two.out / "init" / "model.safetensors")
    train(two)
    assert (two.out / "init" / "model.safetensors").read_bytes() == (
        one.out / "init" / "model.safetensors"
    ).read_bytes()


def test_two_ranks_refuse_alike(mine: TrainConfig, run_ranks) -> None:
    """The first reads and compares; the others hear of it and do not wait for ever."""
    other, small = mine.pool.with_name("PB") / "model", ["--batch.capacity", "128", "--batch.micro-batches", "2"]
    arguments = ["train", "--pool", mine.pool, "--model", other, "--out", mine.out, *small]
    ended = run_ranks(*arguments, ranks=2, check=False)
    assert ended.output().count("its tokenizer is not the one") == 2
    assert not mine.out.exists()


# --- resume ---


def interrupt(config: TrainConfig) -> None:
    """A run that has checkpoints and is not finished."""
    train(config)
    shutil.rmtree(config.out / "model")
    (config.out / "summary.json").unlink()


def test_moved_and_copied_is_resumed(mine: TrainConfig, tmp_path: Path) -> None:
    interrupt(mine)
    root = Path(shutil.move(mine.pool.parent, tmp_path / "elsewhere"))
    out = Path(shutil.move(mine.out, tmp_path / "renamed"))
    train(replace(mine, pool=root / "PA", model=str(root / "PA/model"), out=out, resume=True))
    assert (out / "summary.json").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_a_pool_prepared_anew(finished: bool, mine: TrainConfig) -> None:
    train(mine) if finished else interrupt(mine)
    before = fingerprint.read(mine.out)
    shutil.rmtree(mine.pool)
    prepared(mine.pool.parent, "what a fine day is it today?", mine.model.replace("PA", "PB"), "PA")
    shutil.copytree(mine.pool.with_name("PB") / "model", mine.pool / "model")
    with pytest.raises(
        UserError,
        match=r"--resume: .*run: made from .*: contents of the pool differ.*PA\.jsonl has other contents .* when it",
    ):
        train(replace(mine, resume=True))
    assert fingerprint.read(mine.out) == before


def test_scores_alone(mine: TrainConfig) -> None:
    interrupt(mine)
    flip(mine.pool / "state.safetensors")
    with pytest.raises(
        UserError,
        match=r"run: made from something else: scores of the pool differ\. Bring back what it was begun with, or",
    ):
        train(replace(mine, resume=True))


def test_base_weights(mine: TrainConfig) -> None:
    interrupt(mine)
    flip(Path(mine.model) / "model.safetensors")
    with pytest.raises(UserError, match="run: made from something else: weights of the model differ"):
        train(replace(mine, resume=True))


def test_checkpoints_of_another_run(mine: TrainConfig, tmp_path: Path) -> None:
    interrupt(mine)
    other = replace(
        mine, pool=mine.pool.with_name("PB"), model=str(mine.pool.with_name("PB") / "model"), out=tmp_path / "other"
    )
    interrupt(other)
    shutil.rmtree(other.out / "checkpoints")
    shutil.copytree(mine.out / "checkpoints", other.out / "checkpoints")
    with pytest.raises(UserError, match=r"--resume: .*other/checkpoints: made from .*: contents of the pool differ"):
        train(replace(other, resume=True))


def test_a_run_of_an_older_version_is_resumed_with_a_warning(
    mine: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(mine)
    (mine.out / fingerprint.FILE).unlink()
    for marker in mine.out.glob("checkpoints/*/COMPLETE"):
        values = json.loads(marker.read_text())
        del values["notes"]["fingerprint"]
        marker.write_text(json.dumps(values))
    train(replace(mine, resume=True))
    assert "by an older version, which noted no contents" in "".join(capsys.readouterr()).replace("\n", " ")


def test_a_run_that_is_imitated_had_the_same_pool(mine: TrainConfig, tmp_path: Path) -> None:
    train(mine)
    matched = replace(
        mine,
        pool=mine.pool.with_name("PB"),
        model=str(mine.pool.with_name("PB") / "model"),
        out=tmp_path / "matched",
        method="random-matched",
        options={"match": mine.out},
    )
    with pytest.raises(UserError, match=r"--random-matched\.match .*: was trained on another pool"):
        train(matched)


# --- adapters ---


def test_an_adapter_s_base_with_other_weights(mine: TrainConfig, tmp_path: Path) -> None:
    adapted = replace(mine, lora=LoraConfig(rank=2))
    train(adapted)
    assert fingerprint.read(mine.out / "model").keys() == {"base"}
    merge(MergeConfig(mine.out, tmp_path / "before"))
    again = replace(adapted, model=str(mine.out), out=tmp_path / "again", budget=0.1)
    train(again)  # an adapter that is trained on keeps the base of the first
    assert fingerprint.read(again.out / "model") == fingerprint.read(mine.out / "model")
    weights = Path(mine.model) / "model.safetensors"
    tensors = load_file(weights)
    tensors[min(tensors)] += 1  # as if it had been fine-tuned: same size, same header
    save_file(tensors, weights, {"format": "pt"})
    message = "is not the base that the adapter was trained on: weights of the base model differ.*Bring back the base"
    with pytest.raises(UserError, match=message):
        merge(MergeConfig(mine.out, tmp_path / "after"))
    assert not (tmp_path / "after").exists()
    with pytest.raises(UserError, match=message):
        train(replace(again, out=tmp_path / "third"))


# --- pretraining ---


def test_a_corpus_of_other_text_of_the_same_size(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a fine day it is today\n" * 40)
    config = PretrainConfig((text,), tmp_path / "base", vocab_size=300, block=16, batch=BATCH, runtime=RUNTIME)
    pretrain(config)
    moved = Path(shutil.move(text, tmp_path / "moved.txt"))
    pretrain(replace(config, text=(moved,), resume=True))
    moved.write_text(moved.read_text().replace("day", "dog", 1))
    with pytest.raises(
        UserError,
        match=r"holds a corpus of other text or options: moved\.txt .*has other contents.*Name another folder",
    ):
        pretrain(replace(config, text=(moved,), resume=True))
    with pytest.raises(UserError, match="block was 16, now 32"):
        pretrain(replace(config, text=(moved,), block=32, resume=True))
