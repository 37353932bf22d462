"""A tokenizer with more tokens than the model has rows: refused wherever tokens and model meet, with the two sizes
and the way out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lead_engine.base.errors import UserError
from lead_engine.config import BatchConfig, EvalConfig, PrepareConfig, TrainConfig
from lead_engine.evaluation.evaluate import evaluate
from lead_engine.model.vocabulary import check_vocabulary
from lead_engine.prepare import run as prepare
from lead_engine.training.train import run as train

BATCH = BatchConfig(capacity=128)
ROWS, TOKENS = 301, 303


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokens were added to its tokenizer, and the embeddings were not resized; without them there are fewer
    tokens than rows.
    """
    folder = tmp_path_factory.mktemp("added") / "model"
    small = AutoTokenizer.from_pretrained(make_model())
    shutil.copytree(make_model("llama", vocab_size=ROWS), folder)
    small.add_tokens([f"<pad-{i}>" for i in range(ROWS - len(small))])
    small.add_tokens(["<tool>", "<call>"])  # plain ones: a special token spelled in a text stays text
    assert len(small) == TOKENS
    small.save_pretrained(folder)
    return folder


def write(path: Path, last: str) -> str:
    """Records of one file; the last one's answer is `last`."""
    records = [{"instruction": f"say {i}", "output": f"{i} words"} for i in range(9)] + [
        {"instruction": "say", "output": last}
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("scoring", ["model", "ngram"])
def test_prepare(scoring: str, model: Path, tmp_path: Path) -> None:
    config = PrepareConfig(
        (write(tmp_path / "p.jsonl", "<call>now"),), str(model), tmp_path / "P", 64, 2, scoring=scoring, batch=BATCH
    )
    with pytest.raises(
        UserError, match=f"embeddings for {ROWS} tokens.*p.jsonl holds token {TOKENS - 1}.*{TOKENS}.*resize_token_embed"
    ):
        prepare(config)
    assert not config.out.exists()


def test_eval(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"{model}: has embeddings for {ROWS} tokens.*d.jsonl holds token.*resize_token_embeddings"
    ):
        evaluate(EvalConfig(str(model), (write(tmp_path / "d.jsonl", "a <tool>"),), max_length=64, batch=BATCH))


def test_tokens_that_never_occur_do_no_harm(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", "plain words")
    assert evaluate(EvalConfig(str(model), (data,), max_length=64, batch=BATCH))["loss"]["overall"] > 0


def test_train(model: Path, make_model, make_pool, tmp_path: Path) -> None:
    from lead_engine.pool.store import TokenStore

    pool = make_pool(samples=20)
    AutoTokenizer.from_pretrained(model).save_pretrained(pool / "tokenizer")
    TokenStore.write(pool / "store", [([5, 6, TOKENS - 1], [False, True, True])] * 20)
    with pytest.raises(
        UserError, match=f"--model .*: has embeddings for {ROWS} tokens, but --pool .* holds token {TOKENS - 1}"
    ):
        train(TrainConfig(pool, str(model), tmp_path / "run", batch=BATCH))
    assert not (tmp_path / "run").exists()


WAYS = {None: "if tokens were added", 12: "Call model.resize_token_embeddings", 8: "prepare the pool with this"}


@pytest.mark.parametrize(("tokens", "way"), WAYS.items())
def test_the_way_out_is_the_one_that_fits(tokens: int | None, way: str) -> None:
    check_vocabulary(9, 10, model="M", source="S", tokens=tokens)
    with pytest.raises(UserError, match=way):
        check_vocabulary(10, 10, model="M", source="S", tokens=tokens)
