"""The first stage of `prepare`: records to a token store."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from lead_engine.base.console import progress, say, warn
from lead_engine.base.errors import UserError
from lead_engine.config import PrepareConfig
from lead_engine.model.find import find_model
from lead_engine.model.load import load_config, load_tokenizer, weights_folder
from lead_engine.model.scratch import is_scratch, make_scratch
from lead_engine.model.vocabulary import check_vocabulary, rows_of
from lead_engine.pool.chat_template import check_tokenizer, fold_system, notes
from lead_engine.pool.end_of_turn import ending_notes
from lead_engine.pool.problems import UNREAD, Problems
from lead_engine.pool.records import Record, read_records
from lead_engine.pool.store import TokenStore
from lead_engine.pool.template import encode
from lead_engine.pool.tokenizer import train_tokenizer

Rows = dict[str, list[Any]]
COLUMNS = ("id", "dataset", "file", "line", "tokens", "response_tokens", "truncated")
"""The columns of records.parquet."""
TOKENIZER_RECORDS = 20_000
"""Records from which a scratch model's vocabulary is learned."""


def tokenise(config: PrepareConfig) -> None:
    """Write store/, records.parquet, tokenizer/, problems.jsonl and, for scratch models, model/ into config.out.

    Where the pool is refused, a folder that was not there before is not there afterwards.
    Raises UserError for records that cannot be used (unless --skip-bad), for models without a usable tokenizer, and for
    tokens that the model has no embedding for.
    """
    say(f"reading {', '.join(config.pool)}")
    records, problems = read_records(config.pool, skip_bad=config.skip_bad)
    _check_tasks(config, records)
    new = not config.out.exists()
    try:
        _write(config, records, problems)
    except UserError:
        if new:
            shutil.rmtree(config.out, ignore_errors=True)
        raise
    if set(problems.counts()) - {UNREAD}:  # the reader has warned of those
        warn(f"{problems}; each is named in {config.out / 'problems.jsonl'}")


def _check_tasks(config: PrepareConfig, records: list[Record]) -> None:
    """UserError where --tasks would change nothing: as soon as one record names its task, names are what counts."""
    named = [record for record in records if record.dataset]
    if config.tasks and named:
        count, first = len({record.dataset for record in named}), named[0]
        raise UserError(
            f"--tasks {config.tasks}: {len(named):,} of {len(records):,} records name their `dataset` ({count:,} in "
            f"all), as {first.file}, line {first.line} does, and these are the tasks; leave --tasks out, or take the "
            "field out of the records"
        )


def _write(config: PrepareConfig, records: list[Record], problems: Problems) -> None:
    out, is_new_model = config.out, is_scratch(config.model)
    tokenizer = _new_tokenizer(config, records) if is_new_model else _tokenizer_of(config)
    if not is_new_model:
        base = load_config(weights_folder(find_model(config.model)))
    rows: Rows = {name: [] for name in COLUMNS}
    out.mkdir(parents=True, exist_ok=True)
    TokenStore.write(out / "store", _samples(records, tokenizer, config, problems, rows))
    if not rows["id"]:
        raise UserError(f"--max-length {config.max_length}: no sample has an answer within it; raise it")
    if is_new_model:  # only now: a folder that has no store yet may be somebody else's
        make_scratch(config.model, tokenizer, out / "model", config.seed)
    else:
        check_vocabulary(
            TokenStore.open(out / "store", "mmap").max_token_id,
            rows_of(base),
            model=f"--model {config.model}",
            source=f"--pool {' '.join(config.pool)}",
            tokens=len(tokenizer),
        )
    tokenizer.save_pretrained(out / "tokenizer")
    building = out / "records.parquet.writing"
    pq.write_table(pa.table(rows), building)
    building.replace(out / "records.parquet")
    problems.write(out / "problems.jsonl")


def _new_tokenizer(config: PrepareConfig, records: list[Record]) -> PreTrainedTokenizerBase:
    """A tokenizer trained on the pool, for a scratch model."""
    texts = (message.content for record in records[:TOKENIZER_RECORDS] for message in record.messages)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    if config.fold_system:
        fold_system(tokenizer)
    return tokenizer


def _tokenizer_of(config: PrepareConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Prints what a user should know about its template."""
    tokenizer = load_tokenizer(find_model(config.model))
    check_tokenizer(tokenizer)
    if config.fold_system:
        fold_system(tokenizer)
    for note in [*notes(tokenizer), *ending_notes(tokenizer)]:
        say(note)
    return tokenizer


def _samples(
    records: list[Record],
    tokenizer: PreTrainedTokenizerBase,
    config: PrepareConfig,
    problems: Problems,
    rows: Rows,
) -> Iterator[tuple[list[int], list[bool]]]:
    """Tokens and response masks; fills `rows`, the columns of records.parquet, on the way."""
    with progress(len(records), "tokenising records") as bar:
        for sample in encode(records, tokenizer, config.max_length, problems, skip_bad=config.skip_bad):
            record = sample.record
            rows["id"].append(record.id)
            rows["dataset"].append(record.dataset)
            rows["file"].append(record.file)
            rows["line"].append(record.line)
            rows["tokens"].append(len(sample.ids))
            rows["response_tokens"].append(sum(sample.response))
            rows["truncated"].append(sample.truncated)
            yield sample.ids, sample.response
            bar.advance()


def write_answers(store: TokenStore, folder: Path, prompt: list[int]) -> None:
    """A store of the answers without their instructions.

    Each sample is `prompt` (the template's request for an answer), then the response tokens. Every response token is
    predicted in both stores (the first token of a sample, which nothing predicts, never counts as one), so the two mean
    losses are over the same tokens.
    """
    tokens, response, offsets = (x.cpu().numpy() for x in (store.tokens, store.response, store.offsets))

    def samples() -> Iterator[tuple[list[int], list[bool]]]:
        for start, end in itertools.pairwise(offsets.tolist()):
            mask = response[start:end].copy()
            mask[0] = False
            answer = tokens[start:end][mask].tolist()
            yield prompt + answer, [False] * len(prompt) + [True] * len(answer)

    TokenStore.write(folder, samples())
