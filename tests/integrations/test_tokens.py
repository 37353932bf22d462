"""A pool of one tokenizer and a trainer of another: refused; more tokens, another template or none at all: not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from lead_engine.base.errors import UserError
from lead_engine.integrations import lead
from lead_engine.integrations.tokens import check_tokenizer
from lead_engine.pool.tokenizer import train_tokenizer
from needs import TRAINERS

pytestmark = TRAINERS


@pytest.fixture(scope="module")
def other(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose tokenizer was trained on other text."""
    folder = Path(shutil.copytree(make_model(), tmp_path_factory.mktemp("other") / "model"))
    train_tokenizer(["zebra quux waltz vexing jumbo fjord zebra quux"] * 3, 300).save_pretrained(folder)
    return folder


def test_a_trainer_with_a_model_of_another_tokenizer(other: Path, make_pool, make_args) -> None:
    pool = make_pool(samples=20)
    model = AutoModelForCausalLM.from_pretrained(other)
    message = (
        "its tokenizer is not the one that lead.* tokens of the pool are others here.*merges of the tokenizer differ"
    )
    for more in ({"processing_class": AutoTokenizer.from_pretrained(other)}, {}):
        with pytest.raises(UserError, match=message):
            lead(pool, 0.5).trainer(Trainer)(model=model, args=make_args(), **more)


def test_what_does_not_change_the_pool_s_tokens_is_fine(make_model, make_pool, tmp_path: Path) -> None:
    pool, model = make_pool(samples=9), AutoModelForCausalLM.from_pretrained(make_model())
    tokenizer = AutoTokenizer.from_pretrained(make_model())
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.chat_template = "{{ messages }}"
    tokenizer(["a", "b c"], padding=True)
    check_tokenizer(pool, tokenizer, model)
    check_tokenizer(pool, None, model)
    model.config._name_or_path = "some/hub-name"
    check_tokenizer(pool, None, model)
