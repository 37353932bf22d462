"""The stages of `lead-engine prepare`, in order; each is skipped if an earlier run finished it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
from torch import Tensor

from lead_engine.base.console import say, table
from lead_engine.base.errors import UserError
from lead_engine.base.files import write_text
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
from lead_engine.prepare.tokenise import write_answers
from lead_engine.training import train
from lead_engine.training.combinations import check_combination
from lead_engine.training.distributed import Ranks, process_group

WARMUP_STEPS = 16
"""Optimizer steps of the warm-up at least: a share of a small pool would be none at all."""


def run(config: PrepareConfig) -> None:
    """Write config.out; see the README for its files. Raises UserError for everything that the user can mend."""
    with process_group(config.runtime.timeout) as ranks:
        if (
            config.scoring == "model" and config.warmup_share
        ):  # what the warm-up's training would refuse after a pass over the pool
            check_combination(replace(config, batch=_warm_up_batch(config, ranks)), ranks.size, ranks.device)
        if not ranks.first_says(lambda: origin.begin(config)):
            _score(config, ranks)


def _score(config: PrepareConfig, ranks: Ranks) -> None:
    out, work = config.out, config.out / "stages"
    store = TokenStore.open(out / "store", config.runtime.placement, ranks.device)
    base = out / "model" if is_scratch(config.model) else find_model(config.model)
    options = {
        "device": ranks.device,
        "runtime": config.runtime,
        "max_length": config.batch.capacity,
        "trainable": False,
    }

    if ranks.first and not (out / ANSWERS / "meta.json").exists():
        write_answers(store, out / ANSWERS, generation_prompt_ids(load_tokenizer(base)))
    ranks.barrier()
    if config.scoring == "ngram":
        say("scores by counts of n-grams: no pass of the model over the pool")
        task, names = _tasks(config, store, lambda: build_model(base, **options))
        utility, given, alone = ngram_scores(TokenStore.open(out / "store", "mmap"))
    else:
        model = build_model(base, **options)
        utility = stages.score(model, store, work / "base", ranks, config.batch, "1/4 loss under the base model")
        task, names = _tasks(config, store, lambda: model)
        warm = _warm_up(config, store, base, ranks)
        model = build_model(warm, **options) if warm != base else model
        given = utility
        if warm != base:
            given = stages.score(model, store, work / "given", ranks, config.batch, "3/4 loss given the instruction")
        answers = TokenStore.open(out / ANSWERS, config.runtime.placement, ranks.device)
        alone = stages.score(model, answers, work / "alone", ranks, config.batch, "4/4 loss of the answer alone")

    if ranks.first:
        ratio = difficulty(given, alone)
        dropped = ratio >= 1
        if bool(dropped.all()):
            raise UserError(
                f"--model {config.model}: no instruction lowers its answer's loss, so nothing is left; the base is too weak"
            )
        cluster, centers = cluster_by_difficulty(ratio, dropped, config.clusters, config.seed)
        state = PoolState(utility, ratio, alone, cluster, task, dropped, names, config.clusters)
        state.save(out)
        _summarise(config, store, state, centers)
        shutil.rmtree(work, ignore_errors=True)
    ranks.barrier()


def _tasks(config: PrepareConfig, store: TokenStore, model: Callable[[], PackedLM]) -> tuple[Tensor, list[str]]:
    datasets = pq.read_table(config.out / "records.parquet", columns=["dataset"]).column("dataset").to_pylist()
    if any(datasets) or not config.tasks:
        return tasks_by_name(datasets)
    means = embed_store(model(), store, batch=config.batch, description="mean hidden states, for topics")
    return tasks_by_topic(means, config.tasks, config.seed)


def _warm_up(config: PrepareConfig, store: TokenStore, base: Path, ranks: Ranks) -> Path:
    """A copy of the base trained briefly on random samples: difficulty is measured under it, so that a base that has never seen
    the chat template is not judged by that alone."""
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
    """The options' own, with micro-batches enough for every rank to have as many."""
    return replace(config.batch, micro_batches=-(-config.batch.micro_batches // ranks.size) * ranks.size)


def _summarise(config: PrepareConfig, store: TokenStore, state: PoolState, centers: list[float]) -> None:
    """summary.json, which marks the folder as prepared, and the same as tables."""
    lengths = store.lengths.cpu()
    kept = ~state.dropped
    problems = [
        json.loads(line)["kind"] for line in (config.out / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    clusters = [
        {
            "cluster": k,
            "samples": int((kept & (state.cluster == k)).sum()),
            "tokens": int(lengths[kept & (state.cluster == k)].sum()),
            "mean_difficulty": centers[k],
            "mean_utility": float(state.utility[kept & (state.cluster == k)].mean()),
        }
        for k in range(state.num_clusters)
    ]
    tasks = [
        {
            "task": name,
            "samples": int((state.task == i).sum()),
            "tokens": int(lengths[state.task == i].sum()),
            "dropped": int((state.dropped & (state.task == i)).sum()),
            "mean_difficulty": float(state.difficulty[state.task == i].mean()),
        }
        for i, name in enumerate(state.task_names)
    ]
    summary = {
        "samples": store.num_samples,
        "tokens": store.num_tokens,
        "response_tokens": int(store.response_rows.sum()),
        "dropped_misaligned": int(state.dropped.sum()),
        "problems": {kind: problems.count(kind) for kind in sorted(set(problems))},
        "clusters": clusters,
        "tasks": tasks,
    }
    say(f"{store.num_samples:,} samples, {store.num_tokens:,} tokens ({summary['response_tokens']:,} of answers)")
    say(f"dropped as misaligned (the instruction does not lower the answer's loss): {summary['dropped_misaligned']:,}")
    for kind, count in summary["problems"].items():
        say(f"{kind}: {count:,}, named in {config.out / 'problems.jsonl'}")
    table("Difficulty clusters, easiest first", list(clusters[0]), [list(row.values()) for row in clusters])
    table("Tasks", list(tasks[0]), [list(row.values()) for row in tasks])
    write_text(config.out / "summary.json", json.dumps(summary, indent=1))
    say(f"prepared: {config.out}")
