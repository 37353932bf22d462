"""`lead-engine compare`: train and evaluate every run of a study, a process each, and compare the variants in pairs.

Complete runs are kept and interrupted ones resumed, so the same command can be repeated until all is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from lead_engine.base import console
from lead_engine.base.errors import UserError
from lead_engine.base.files import write_text
from lead_engine.config import CompareConfig, EvalConfig
from lead_engine.evaluation.origin import why_again
from lead_engine.evaluation.outputs import read_result
from lead_engine.study.jobs import Task, run_tasks
from lead_engine.study.launch import Child, start, threads_of
from lead_engine.study.outcome import read_base, read_outcome
from lead_engine.study.plan import (
    StudyRun,
    base_config,
    check_unchanged,
    config_text,
    eval_command,
    evaluation_folder,
    plan_runs,
    train_command,
)
from lead_engine.study.results import summarise_study
from lead_engine.study.tables import markdown, show
from lead_engine.study.variants import Study, read_study

RESULTS = "results.json"


def run_study(config: CompareConfig) -> None:
    """Make the missing runs, write OUT/results.json and OUT/results.md, and print the tables.

    Raises UserError for a study that cannot be read, for runs that were made with other options, and for a run that
    fails.
    """
    study = read_study(config.config)
    runs = plan_runs(study, config.out)
    check_unchanged(runs)
    base = base_config(study.options, config.out)
    _make_all(study, runs, base, config.out / "runs")
    untrained = None if base is None else read_base(evaluation_folder(base))
    results = summarise_study(study, [read_outcome(each) for each in runs], untrained)
    write_text(config.out / RESULTS, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(config.out / "results.md", markdown(results))
    show(results)


def _make_all(study: Study, runs: list[StudyRun], base: EvalConfig | None, folder: Path) -> None:
    """Train and evaluate what is missing. The base comes first: it shows whether the held-out files can be read."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = study.options.jobs
    results = {each.name: each.evaluate for each in runs}
    with console.progress(len(runs) + (base is not None), "runs") as bar:

        def completed(task: Task) -> None:
            bar.advance(loss=read_result(evaluation_folder(results[task.name]))["loss"]["overall"])

        if base is not None:
            results["base"] = base
            task = Task("base", _evaluate_base(base, folder / "base.log", threads_of(jobs, 1)))
            run_tasks([task], 1, completed)
        tasks = [Task(each.name, _make(each, jobs, study.options.ranks), each.after) for each in runs]
        run_tasks(tasks, jobs, completed)


def _evaluate_base(base: EvalConfig, log: Path, threads: int | None) -> Iterator[Child]:
    why = why_again(base)
    if why is None or why:
        console.say(f"base: evaluating the untrained model{_again(why)}")
        yield start(eval_command(base), log, "evaluating the base", threads)


def _make(run: StudyRun, jobs: int, ranks: int) -> Iterator[Child]:
    """The processes that a run still needs, one after another."""
    if not run.trained:
        console.say(f"{run.name}: {'resuming' if run.started else 'training'} (log: {run.log})")
        write_text(run.config_file, config_text(run.train))
        yield start(train_command(run, ranks), run.log, f"training {run.name}", threads_of(jobs, ranks))
        if not run.trained:
            raise UserError(f"training {run.name} ended without {run.folder / 'summary.json'}; see {run.log}")
    why = why_again(run.evaluate)
    if why is None or why:
        console.say(f"{run.name}: evaluating{_again(why)}")
        yield start(eval_command(run.evaluate), run.log, f"evaluating {run.name}", threads_of(jobs, 1))


def _again(why: list[str] | None) -> str:
    """The reasons in words, if there is a result that no longer holds; nothing if there is none yet."""
    return f" again: {'; '.join(why)}" if why else ""
