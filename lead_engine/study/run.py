"""A whole study: variants x budgets x seeds at equal budget, a process per run, and their paired comparison.

What is complete is kept, what is half done is resumed, so the same command can be repeated until all is done.
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
from lead_engine.study.results import read_base, read_outcome, summarise_study
from lead_engine.study.runs import (
    StudyRun,
    base_config,
    check_unchanged,
    config_text,
    eval_command,
    plan_runs,
    train_command,
)
from lead_engine.study.tables import markdown, show
from lead_engine.study.variants import Study, read_study

RESULTS = "results.json"


def run_study(config: CompareConfig) -> None:
    """Make the runs that are missing, then write OUT/results.json and OUT/results.md, and print the tables.

    Raises UserError for a study that cannot be read, for runs made with other options, and for a run that fails.
    """
    study = read_study(config.config)
    runs = plan_runs(study, config.out)
    check_unchanged(runs)
    base = base_config(study.options, config.out)
    _make_all(study, runs, base, config.out / "runs")
    untrained = None if base is None else read_base(base.out)
    results = summarise_study(study, [read_outcome(each) for each in runs], untrained)
    write_text(config.out / RESULTS, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(config.out / "results.md", markdown(results))
    show(results)


def _make_all(study: Study, runs: list[StudyRun], base: EvalConfig | None, folder: Path) -> None:
    """Train and evaluate whatever is missing. The base first: it shows at once whether held-out files can be read."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = study.options.jobs
    results = {each.name: each.evaluate for each in runs}
    with console.progress(len(runs) + (base is not None), "runs") as bar:

        def completed(task: Task) -> None:
            bar.advance(loss=read_result(results[task.name].out)["loss"]["overall"])

        if base is not None:
            results["base"] = base
            run_tasks([Task("base", _evaluate_base(base, folder / "base.log", threads_of(jobs, 1)))], 1, completed)
        run_tasks(
            [Task(each.name, _make(each, jobs, study.options.ranks), each.after) for each in runs], jobs, completed
        )


def _evaluate_base(base: EvalConfig, log: Path, threads: int | None) -> Iterator[Child]:
    why = why_again(base)
    if why != []:
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
    if why != []:
        console.say(f"{run.name}: evaluating{_again(why)}")
        yield start(eval_command(run.evaluate), run.log, f"evaluating {run.name}", threads_of(jobs, 1))


def _again(why: list[str] | None) -> str:
    """ " again: ..." where a result is there that does not hold any more."""
    return f" again: {'; '.join(why)}" if why else ""
