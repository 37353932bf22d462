"""The stages of `lead-engine prepare`, in order; each is skipped if an earlier run finished it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from torch import Tensor

from lead_engine.base.console import say
from lead_engine.base.errors import UserError
from lead_engine.config import BatchConfig, PrepareConfig, TrainConfig
from lead_engine.model.find import find_model
from lead_engine.model.load import build_model, load_tokenizer
from lead_engine.model.packed import PackedLM
from lead_engine.model.scoring import embed_store
from lead_engine.model.scratch import is_scratch
from lead_engine.pool.state import PoolState
from lead_engine.pool.store import ANSWERS, TokenStore
from lead_engine.pool.tokenizer import generation_prompt_ids
from lead_engine.prepare import origin, stages
from lead_engine.prepare.difficulty import cluster_by_difficulty, difficulty, tasks_by_name, tasks_by_topic
from lead_engine.prepare.ngram import ngram_scores
from lead_engine.prepare.summary import write_summary
from lead_engine.prepare.tokenise import write_answers
from lead_engine.training import train
from lead_engine.training.combinations import check_combination
from lead_engine.training.distributed import Ranks, process_group

WARMUP_STEPS = 16
"""Optimizer steps of the warm-up at least: a share of a small pool would be none at all."""


class _Scores(NamedTuple):
    """What is measured of every sample, each fp32 [N]."""

    utility: Tensor
    """The answer's loss under the base model, its instruction given."""
    given: Tensor
    """The same under the judge: the base after its warm-up, or counts of n-grams."""
    alone: Tensor
    """The answer's loss under the judge without its instruction."""


def run(config: PrepareConfig) -> None:
    """Write config.out; docs/POOLS.md names its files. Raises UserError for everything that the user can mend."""
    with process_group(config.runtime.timeout) as ranks:
        if config.scoring == "model" and config.warmup_share:
            # What the warm-up's training would refuse only after a pass over the pool.
            check_combination(replace(config, batch=_warm_up_batch(config, ranks)), ranks.size, ranks.device)
        is_done = ranks.first_says(lambda: origin.begin(config))
        if not is_done:
            _prepare(config, ranks)


def _prepare(config: PrepareConfig, ranks: Ranks) -> None:
    """All that follows the tokenising: answers, scores, tasks, difficulty and clusters."""
    out = config.out
    store = TokenStore.open(out / "store", config.runtime.placement, ranks.device)
    base = out / "model" if is_scratch(config.model) else find_model(config.model)
    if ranks.first and not (out / ANSWERS / "meta.json").exists():
        write_answers(store, out / ANSWERS, generation_prompt_ids(load_tokenizer(base)))
    ranks.barrier()
    if config.scoring == "ngram":
        say("scores by counts of n-grams: no pass of the model over the pool")
        task, names = _tasks(config, store, lambda: _build(config, base, ranks))
        scores = _Scores(*ngram_scores(TokenStore.open(out / "store", "mmap")))
    else:
        scores, task, names = _model_scores(config, store, base, ranks)
    if ranks.first:
        _finish(config, store, scores, task, names)
    ranks.barrier()


def _model_scores(
    config: PrepareConfig, store: TokenStore, base: Path, ranks: Ranks
) -> tuple[_Scores, Tensor, list[str]]:
    """The model's scores; and the tasks, for which the base is at hand here."""
    work, batch = config.out / "stages", config.batch
    model = _build(config, base, ranks)
    utility = stages.score(model, store, work / "base", ranks, batch, "1/4 loss under the base model")
    task, names = _tasks(config, store, lambda: model)
    judge = _warm_up(config, store, base, ranks)
    if judge == base:
        given = utility
    else:
        model = _build(config, judge, ranks)
        given = stages.score(model, store, work / "given", ranks, batch, "3/4 loss given the instruction")
    answers = TokenStore.open(config.out / ANSWERS, config.runtime.placement, ranks.device)
    alone = stages.score(model, answers, work / "alone", ranks, batch, "4/4 loss of the answer alone")
    return _Scores(utility, given, alone), task, names


def _build(config: PrepareConfig, folder: Path, ranks: Ranks) -> PackedLM:
    return build_model(
        folder, device=ranks.device, runtime=config.runtime, max_length=config.batch.capacity, trainable=False
    )


def _finish(config: PrepareConfig, store: TokenStore, scores: _Scores, task: Tensor, names: list[str]) -> None:
    """From scores to the pool's state; the summary, written last, marks the folder as prepared."""
    ratio = difficulty(scores.given, scores.alone)
    dropped = ratio >= 1
    if bool(dropped.all()):
        reason = "no instruction lowers its answer's loss, so nothing is left; the base is too weak"
        raise UserError(f"--model {config.model}: {reason}")
    cluster, centers = cluster_by_difficulty(ratio, dropped, config.clusters, config.seed)
    state = PoolState(
        utility=scores.utility,
        difficulty=ratio,
        answer_nll=scores.alone,
        cluster=cluster,
        task=task,
        dropped=dropped,
        task_names=names,
        num_clusters=config.clusters,
    )
    state.save(config.out)
    write_summary(config.out, store, state, centers)
    shutil.rmtree(config.out / "stages", ignore_errors=True)


def _tasks(config: PrepareConfig, store: TokenStore, model: Callable[[], PackedLM]) -> tuple[Tensor, list[str]]:
    """(task int64 [N], names): by the records' `dataset`, or by topic, for which `model` is called."""
    datasets = pq.read_table(config.out / "records.parquet", columns=["dataset"]).column("dataset").to_pylist()
    if any(datasets) or not config.tasks:
        return tasks_by_name(datasets)
    means = embed_store(model(), store, batch=config.batch, description="mean hidden states, for topics")
    return tasks_by_topic(means, config.tasks, config.seed)


def _warm_up(config: PrepareConfig, store: TokenStore, base: Path, ranks: Ranks) -> Path:
    """The folder of a copy of the base trained briefly on random samples; the base where no warm-up is wanted.

    Difficulty is measured under it, so that a base that has never seen the chat template is not judged by that alone.
    """
    if config.warmup_share == 0:
        return base
    folder = config.out / "stages" / "warm-up"
    step = config.batch.capacity * config.batch.micro_batches
    share = max(config.warmup_share, min(0.5, WARMUP_STEPS * step / store.num_tokens))
    say("2/4 warm-up training")
    train.run(
        TrainConfig(
            pool=config.out,
            model=str(base),
            out=folder,
            method="random",
            budget=share,
            seed=config.seed,
            resume=True,
            batch=_warm_up_batch(config, ranks),
            optimizer=config.optimizer,
            runtime=config.runtime,
        ),
        ranks,
    )
    return folder / "model"


def _warm_up_batch(config: PrepareConfig, ranks: Ranks) -> BatchConfig:
    """The batch with micro-batches rounded up, so that every rank has as many."""
    per_rank = -(-config.batch.micro_batches // ranks.size)
    return replace(config.batch, micro_batches=per_rank * ranks.size)
