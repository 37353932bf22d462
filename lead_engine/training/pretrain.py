"""`lead-engine pretrain`: a small base model from plain text, where none can be had.

Text becomes a pool whose samples are blocks of tokens, all of them to be learned; `full` then trains on it in the
ordinary loop.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from lead_engine.base.console import progress, say, warn
from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json, write_text
from lead_engine.base.fingerprint import Parts, differences, refuse
from lead_engine.config import PretrainConfig, SelectionConfig, TrainConfig
from lead_engine.config.methods import method_options
from lead_engine.model.find import find_model
from lead_engine.model.load import load_tokenizer
from lead_engine.model.scratch import is_scratch, make_scratch
from lead_engine.pool.identity import file_parts, tokenizer_parts
from lead_engine.pool.store import TokenStore
from lead_engine.pool.tokenizer import TEXT_END, train_tokenizer
from lead_engine.training import train
from lead_engine.training.distributed import process_group


def run(config: PretrainConfig) -> None:
    """Write OUT/corpus (tokens), OUT/model and the run's records. Raises UserError for text that cannot be read."""
    with process_group(config.runtime.timeout) as ranks:
        corpus = config.out / "corpus"
        ranks.first_says(lambda: _make_corpus(config, corpus))
        train.run(_training(config, corpus), ranks)


def _training(config: PretrainConfig, corpus: Path) -> TrainConfig:
    return TrainConfig(
        pool=corpus,
        model=str(corpus / "model") if is_scratch(config.model) else config.model,
        out=config.out,
        method="full",
        options=method_options("full", {"epochs": config.epochs}),
        seed=config.seed,
        resume=config.resume,
        checkpoint_every=config.checkpoint_every,
        batch=config.batch,
        selection=SelectionConfig(round_steps=16),
        optimizer=config.optimizer,
        runtime=config.runtime,
    )


def _make_corpus(config: PretrainConfig, corpus: Path) -> None:
    """Tokenizer, initial model and token store of the text; kept if they are there and of the same text and options."""
    source: Parts = {"vocab_size": config.vocab_size, "block": config.block, "seed": config.seed}
    source["sources"] = _sources(config.text)
    if is_scratch(config.model):
        source["model"] = config.model
    else:
        source["tokenizer"] = tokenizer_parts(load_tokenizer(find_model(config.model)))
    marker = corpus / "source.json"
    if marker.exists():
        _check_same(config, read_json(marker), source)
        say(f"{corpus}: already made from the same text")
        return
    corpus.mkdir(parents=True, exist_ok=True)
    paragraphs = [(path, _paragraphs(path)) for path in config.text]
    if is_scratch(config.model):
        say(f"training a tokenizer of {config.vocab_size:,} tokens on {len(config.text)} files")
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(
            itertools.chain.from_iterable(lines for _, lines in paragraphs), config.vocab_size
        )
        make_scratch(config.model, tokenizer, corpus / "model", config.seed)
    else:
        tokenizer = load_tokenizer(find_model(config.model))
    tokenizer.save_pretrained(corpus / "tokenizer")
    names: list[str] = []
    TokenStore.write(corpus / "store", _blocks(paragraphs, tokenizer, config.block, names))
    pq.write_table(pa.table({"id": names}), corpus / "records.parquet")
    write_text(marker, json.dumps(source))


def _sources(text: Sequence[Path]) -> list[Parts]:
    """As `source_parts`, of files of any kind."""
    try:
        return [file_parts(path) for path in text]
    except OSError as error:
        raise UserError(f"--text {error.filename}: {error.strerror}; give text files that exist") from None


def _check_same(config: PretrainConfig, before: Parts, now: Parts) -> None:
    """UserError if the corpus is of other text or options. One of an older version noted no contents."""
    options = [name for name in now if name not in ("sources", "tokenizer")]
    found = [f"{name} was {before.get(name)}, now {now[name]}" for name in options if before.get(name) != now[name]]
    contents = {name: value for name, value in before.items() if name in ("sources", "tokenizer")}
    found += differences(contents, now, "when it was made")
    refuse(f"--out {config.out}: holds a corpus of other text or options", found, "Name another folder")
    if "sources" not in before:
        why = "made by an older version, which noted no contents: whether the text changed cannot be told"
        warn(f"{config.out}: its corpus was {why}")


def _paragraphs(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path}: not UTF-8 at byte {error.start}; convert it to UTF-8") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"--text {path}: holds no text")
    return lines


def _blocks(
    paragraphs: list[tuple[Path, list[str]]], tokenizer: PreTrainedTokenizerBase, block: int, names: list[str]
) -> Iterator[tuple[list[int], list[bool]]]:
    """Each file as blocks of `block` tokens, ended by an end-of-text token.

    Adds each block's name to `names`.
    """
    end: Any = tokenizer.eos_token_id
    if TEXT_END in tokenizer.get_vocab():
        end = tokenizer.convert_tokens_to_ids(TEXT_END)
    with progress(sum(len(lines) for _, lines in paragraphs), "tokenising paragraphs") as bar:
        for path, lines in paragraphs:
            ids: list[int] = []
            for batch in _batched(lines, 256):
                for tokens in tokenizer([line + "\n" for line in batch], add_special_tokens=False)["input_ids"]:
                    ids.extend(tokens)
                bar.advance(len(batch))
            ids.append(end)
            for place, start in enumerate(range(0, len(ids), block)):
                part = ids[start : start + block]
                if len(part) > 1:  # a single token would have nothing that predicts it
                    names.append(f"{path.name}:{place}")
                    yield part, [True] * len(part)


def _batched(items: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
