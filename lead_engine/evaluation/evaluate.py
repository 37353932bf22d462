"""Held-out loss of a model, per task and overall, and exact match of generated answers.

*overall* is the mean loss over all held-out response tokens; *macro* is the mean over tasks of each task's token mean,
so that large tasks with long answers do not decide alone.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lead_engine.base import console, fingerprint
from lead_engine.base.errors import UserError
from lead_engine.base.files import write_text
from lead_engine.config import EvalConfig
from lead_engine.evaluation.exact_match import compare, summarise
from lead_engine.evaluation.generate import Question, choose_questions, generate_answers
from lead_engine.evaluation.origin import evaluation_parts
from lead_engine.evaluation.outputs import ANSWERS, RESULT, SAMPLES, comparable_options
from lead_engine.model.find import find_model
from lead_engine.model.load import load_for_inference, load_hf
from lead_engine.model.packed import PackedLM
from lead_engine.model.scoring import score_store, summarise_loss
from lead_engine.model.vocabulary import check_vocabulary, rows_of
from lead_engine.pool.chat_template import fold_system, notes
from lead_engine.pool.heldout import encode_records, task_of
from lead_engine.pool.problems import UNREAD, Problems, place
from lead_engine.pool.records import Record, read_records
from lead_engine.pool.store import TokenStore


@dataclass
class Scored:
    """The held-out samples that could be scored, in the order of the files."""

    records: list[Record]
    nll: NDArray[np.float64]
    """[n] mean loss over each sample's response tokens."""
    tokens: NDArray[np.int64]
    """[n] response tokens."""

    @property
    def tasks(self) -> list[str]:
        return [task_of(record) for record in self.records]


def run(config: EvalConfig) -> None:
    """The command `eval`: evaluate, and print the result."""
    result = evaluate(config)
    show(result)
    folder = output_folder(config)
    if folder is not None:
        console.say(f"written: {folder / RESULT}, {folder / SAMPLES}")


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Compute the model's loss on the held-out records and, with `config.generate`, its answers to some of them.

    Returns the contents of eval.json:

    {"loss": {"overall", "macro", "tasks": {name: {"loss", "samples", "tokens"}}},
     "exact_match": None, or the result of `exact_match.summarise` and "prompts_too_long",
     "problems": counts of unusable records by kind,
     "options": those that decide the result,
     "fingerprint": what it was made from (`evaluation/origin.py`)}

    If there is an `output_folder`, writes samples.parquet (id, dataset, nll, tokens), answers.jsonl if answers were
    generated, and eval.json; that one last, because its presence vouches for the others. Raises UserError for models
    and files that cannot be read, and if a loss is not finite.
    """
    folder = find_model(config.model)
    parts = evaluation_parts(config, folder)  # before anything is read, so that a file changed meanwhile shows later
    records, problems = read_records(config.data, skip_bad=config.skip_bad, flag="--data")
    model, tokenizer = load_for_inference(folder, config.runtime, config.max_length)
    if config.fold_system:
        fold_system(tokenizer)
    for note in notes(tokenizer):
        console.say(note)
    scored = _score(model, tokenizer, records, config, problems)
    del model
    gc.collect()  # generation loads the model as another object, and both may not fit into memory
    answers = _answer(folder, tokenizer, scored.records, config) if config.generate else None
    result = {
        "loss": summarise_loss(scored.nll, scored.tokens, scored.tasks),
        "exact_match": None if answers is None else answers.summary(),
        "problems": problems.counts(),
        "options": comparable_options(config),
        fingerprint.KEY: parts,
    }
    out = output_folder(config)
    if out is not None:
        _write(out, result, scored, answers)
    return result


def output_folder(config: EvalConfig) -> Path | None:
    """Where to write: --out; else RUN/eval if --model is a run folder; else nowhere, None."""
    if config.out is not None:
        return config.out
    model = Path(config.model)
    is_run_folder = find_model(config.model) == model / "model"
    return model / "eval" if is_run_folder else None


def show(result: dict[str, Any]) -> None:
    """Print a result as tables."""
    loss, match = result["loss"], result["exact_match"]
    shares = match["tasks"] if match else {}
    columns = ["task", "samples", "tokens", "loss"] + (["whole answer", "final answer"] if match else [])
    rows: list[list[object]] = [
        [name, task["samples"], task["tokens"], task["loss"], *(_percent(shares.get(name)) if match else ())]
        for name, task in loss["tasks"].items()
    ]
    samples, tokens = (sum(task[key] for task in loss["tasks"].values()) for key in ("samples", "tokens"))
    rows.append(["overall", samples, tokens, loss["overall"], *(_percent(match["overall"]) if match else ())])
    rows.append(["macro", None, None, loss["macro"], *((None, None) if match else ())])
    console.table("Held-out loss (nats per response token)" + (" and exact match" if match else ""), columns, rows)
    for kind, count in result["problems"].items():
        if kind != UNREAD:  # the reader has warned of those
            console.say(f"{count} held-out records: {kind}")
    if match and match["prompts_too_long"]:
        console.say(f"{match['prompts_too_long']} held-out records were not answered: their prompt is too long")


def format_share(share: dict[str, float | None] | None) -> str | None:
    """A share and its interval in percent, as in "41.2 % [35.0, 47.7]"; None if it is not known."""
    if share is None:
        return None
    mean, low, high = share["mean"], share["low"], share["high"]
    if mean is None or low is None or high is None:
        return None
    return f"{100 * mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _percent(shares: dict[str, Any] | None) -> tuple[str | None, str | None]:
    return (format_share(shares["whole"]), format_share(shares["final"])) if shares else (None, None)


# --- loss ---


def _score(
    model: PackedLM, tokenizer: PreTrainedTokenizerBase, records: list[Record], config: EvalConfig, problems: Problems
) -> Scored:
    source = " ".join(config.data)
    samples = encode_records(records, tokenizer, config.max_length, problems, skip_bad=config.skip_bad, source=source)
    with tempfile.TemporaryDirectory(prefix="lead-eval-") as folder:
        TokenStore.write(Path(folder) / "store", samples)
        device = next(model.parameters()).device
        with TokenStore.open(Path(folder) / "store", config.runtime.placement, device) as store:
            check_vocabulary(
                store.max_token_id,
                rows_of(model.config),
                model=f"--model {config.model}",
                source=f"--data {source}",
                tokens=len(tokenizer),
            )
            nll, rows = score_store(model, store, batch=config.batch, description="held-out loss")
    scored = Scored([sample.record for sample in samples], nll.double().numpy(), rows.numpy())
    bad = np.flatnonzero(~np.isfinite(scored.nll))
    if bad.size:
        record = scored.records[bad[0]]
        raise UserError(
            f"--model {config.model}: the loss is not finite on {bad.size} of {len(scored.records)} held-out records "
            f"(first: {place(record.file, record.line)}); the model has diverged, or needs --runtime.precision fp32"
        )
    return scored


# --- generation ---


@dataclass
class Answers:
    """Generated answers to some of the held-out records."""

    questions: list[Question]
    texts: list[str]
    """The generated answers."""
    too_long: int
    """Prompts that were skipped."""

    def __post_init__(self) -> None:
        self.matches = [compare(text, q.reference) for q, text in zip(self.questions, self.texts, strict=True)]

    def summary(self) -> dict[str, Any]:
        tasks = [task_of(question.record) for question in self.questions]
        return summarise(zip(tasks, self.matches, strict=True)) | {"prompts_too_long": self.too_long}

    def lines(self) -> Iterator[dict[str, Any]]:
        for question, text, match in zip(self.questions, self.texts, self.matches, strict=True):
            yield {
                "id": question.record.id,
                "dataset": task_of(question.record),
                "reference": question.reference,
                "generated": text,
                "whole": match.whole,
                "final": match.final,
            }


def _answer(folder: Path, tokenizer: PreTrainedTokenizerBase, records: list[Record], config: EvalConfig) -> Answers:
    model = load_hf(folder)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = config.max_length
    if context:  # prompt and answer must fit into it together
        longest = min(longest, context - config.max_new_tokens)
    if longest < 1:
        raise UserError(f"--max-new-tokens {config.max_new_tokens}: the model's context is {context} tokens; lower it")
    per_task = config.generate
    questions, too_long = choose_questions(records, tokenizer, per_task=per_task, longest=longest, task_of=task_of)
    prompts = [question.prompt for question in questions]
    largest = max((token for prompt in prompts for token in prompt), default=0)
    rows = rows_of(model.config)
    check_vocabulary(largest, rows, model=f"--model {config.model}", source="a prompt", tokens=len(tokenizer))
    batch_tokens = config.batch.capacity * config.batch.micro_batches
    texts = generate_answers(model, tokenizer, prompts, max_new_tokens=config.max_new_tokens, batch_tokens=batch_tokens)
    return Answers(questions, texts, too_long)


# --- files ---


def _write(folder: Path, result: dict[str, Any], scored: Scored, answers: Answers | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)  # it vouches for the other files, which change now
    table = pa.table(
        {
            "id": [record.id for record in scored.records],
            "dataset": scored.tasks,
            "nll": pa.array(scored.nll, pa.float64()),
            "tokens": pa.array(scored.tokens, pa.int64()),
        }
    )
    building = folder / f"{SAMPLES}.writing"
    pq.write_table(table, building)
    os.replace(building, folder / SAMPLES)
    if answers is None:
        (folder / ANSWERS).unlink(missing_ok=True)
    else:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in answers.lines())
        write_text(folder / ANSWERS, text)
    write_text(folder / RESULT, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
