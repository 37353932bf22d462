"""The runs of a study: each one's name, folder, configuration and command lines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lead_engine.base import fingerprint
from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json
from lead_engine.base.fingerprint import Parts
from lead_engine.config import EvalConfig, StudyConfig, TrainConfig, to_dict
from lead_engine.config.methods import method_options
from lead_engine.config.reads import without_unread
from lead_engine.pool.identity import own_model
from lead_engine.study.variants import Study, Variant
from lead_engine.training.origin import base_folder, base_tokenizer, check_same, match_parts, run_parts
from lead_engine.training.run_folder import changed_options

COMPLETE = "summary.json"
"""The file that `train` writes last."""
WITHOUT_EFFECT = ("out", "resume", "runtime", "checkpoint_every", "keep_checkpoints")
"""Options of `train` that do not change the result."""


@dataclass(frozen=True)
class StudyRun:
    """One training run of a study."""

    variant: str
    method: str
    budget: float | None
    """A share of the pool's tokens; None for `full`, which trains on all of it."""
    seed: int
    folder: Path
    train: TrainConfig
    evaluate: EvalConfig
    """How the trained model is evaluated."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def after(self) -> str | None:
        """The name of the run that has to be complete before this one starts, because this one imitates it."""
        match = self.train.match
        return None if match is None else match.name

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.name + ".log")

    @property
    def config_file(self) -> Path:
        return self.folder.with_name(self.name + ".yaml")

    @property
    def trained(self) -> bool:
        return (self.folder / COMPLETE).exists()

    @property
    def started(self) -> bool:
        return (self.folder / "config.yaml").exists()


def plan_runs(study: Study, out: Path) -> list[StudyRun]:
    """Every run of the study; all variants of one seed come together, so that pairs are complete early.

    Raises UserError if two runs would share a folder, and for a pool that is not prepared.
    """
    seeds = dict.fromkeys(
        [*study.options.seeds, *(seed for variant in study.variants for seed in variant.options.seeds)]
    )
    runs = [
        _make_run(study.options, out, variant, budget, seed)
        for seed in seeds
        for variant in study.variants
        if seed in variant.options.seeds
        for budget in variant.budgets
    ]
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"methods, budgets: {', '.join(twice)} would be run twice; name every method and budget once")
    for pool in {run.train.pool for run in runs}:
        pool_max_length(pool)
    return runs


def budget_name(budget: float | None, epochs: int = 1) -> str:
    """A budget as part of a folder's name: "2.5pct" for 0.025; for `full`'s None, "100pct" times its epochs."""
    share = epochs if budget is None else budget
    return f"{100 * share:g}pct"


def run_folder(out: Path, variant: str, budget: float | None, epochs: int, seed: int) -> Path:
    """The folder of a run of the study."""
    return out / "runs" / f"{variant}-{budget_name(budget, epochs)}-s{seed}"


def _make_run(study: StudyConfig, out: Path, variant: Variant, budget: float | None, seed: int) -> StudyRun:
    # The study's options reach every variant; those that only other variants read would be refused by `train`.
    options = without_unread(variant.options, variant.options.table(), variant.options.default_of)
    epochs = getattr(options.options, "epochs", 1) if budget is None else 1
    folder = run_folder(out, variant.name, budget, epochs, seed)
    own = options.options
    if options.match is not None:
        own = method_options(options.method, {"match": run_folder(out, options.match, budget, epochs, seed)})
    train = TrainConfig(
        pool=options.pool,
        model=study.model,
        out=folder,
        method=options.method,
        recipe=options.recipe,
        seed=seed,
        batch=options.batch,
        selection=options.selection,
        options=own,
        optimizer=options.optimizer,
        lora=options.lora,
        runtime=options.runtime,
    )
    if budget is not None:  # methods that train the whole pool read no budget
        train = replace(train, budget=budget)
    return StudyRun(
        variant.name, options.method, budget, seed, folder, train, eval_config(study, str(folder), folder / "eval")
    )


def eval_config(study: StudyConfig, model: str, out: Path) -> EvalConfig:
    """How every model of the study is evaluated: with records cut where the pool's were."""
    return EvalConfig(
        model=model,
        data=study.heldout,
        out=out,
        generate=study.generate,
        max_length=pool_max_length(study.pool),
        batch=study.batch,
        runtime=study.runtime,
    )


def evaluation_folder(config: EvalConfig) -> Path:
    """Where an evaluation of the study is written; `eval_config` always sets it."""
    assert config.out is not None
    return config.out


def base_config(study: StudyConfig, out: Path) -> EvalConfig | None:
    """How the untrained base is evaluated; None for a scratch model, which every run makes for itself."""
    model = study.model
    if model.startswith("scratch:"):
        if not own_model(study.pool, model):
            return None
        model = str(study.pool / "model")
    return eval_config(study, model, out / "base")


def pool_max_length(pool: Path) -> int:
    """The --max-length that the pool was prepared with. Raises UserError if the folder is no prepared pool."""
    options = pool / "prepare.json"
    if not (pool / "summary.json").exists() or not options.exists():
        raise UserError(f"pool {pool}: not a prepared pool; make one with `lead-engine prepare --out {pool}`")
    length = read_json(options).get("max_length")
    if not isinstance(length, int):
        raise UserError(f"{options}: no max_length in it; prepare the pool again")
    return length


# --- what is there already ---


def check_unchanged(runs: Sequence[StudyRun]) -> None:
    """Raise UserError if a run's folder holds a run with other options or from another pool or base.

    The comparison would mix two studies.
    """
    known: dict[tuple[Path, Path], Parts] = {}
    for run in runs:
        if not run.started:
            continue
        path, way_out = run.folder / "config.yaml", "give another --out, or delete the run's folder"
        for key, before, now in changed_options(path, run.train, WITHOUT_EFFECT):
            raise UserError(f"{path}: this run was made with {key} = {before}, the study now says {now}; {way_out}")
        base = base_folder(run.train)
        if not base.is_dir():  # the run made a scratch model for itself, which has been deleted since
            continue
        if (run.train.pool, base) not in known:
            known[run.train.pool, base] = run_parts(run.train, base, base_tokenizer(run.train, base))
        parts = {**known[run.train.pool, base], **match_parts(run.train, known[run.train.pool, base]["pool"])}
        what = str(run.folder)
        check_same(fingerprint.read(run.folder), parts, run.train.pool, what, way_out[:1].upper() + way_out[1:])


# --- command lines ---


def train_command(run: StudyRun, ranks: int) -> list[str]:
    """The command line that trains the run, or resumes it; its options are in `run.config_file`."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "lead_engine", "train", "--config", str(run.config_file)]
    return [*command, "--resume"] if run.started else command


def config_text(config: TrainConfig) -> str:
    """The YAML for `train --config`."""
    values = to_dict(config)
    del values["resume"]
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def eval_command(config: EvalConfig) -> list[str]:
    """The command line of an evaluation."""
    flags: dict[str, Any] = {
        "--out": evaluation_folder(config),
        "--generate": config.generate,
        **({"--max-new-tokens": config.max_new_tokens} if config.generate else {}),
        "--max-length": config.max_length,
        "--batch.capacity": config.batch.capacity,
        "--batch.micro-batches": config.batch.micro_batches,
        "--batch.slots": config.batch.slots,
        "--runtime.precision": config.runtime.precision,
        "--runtime.attention": config.runtime.attention,
        "--runtime.placement": config.runtime.placement,
    }
    words = [str(word) for flag, value in flags.items() for word in (flag, value)]
    return [sys.executable, "-m", "lead_engine", "eval", "--model", config.model, "--data", *config.data, *words]
