"""`lead-engine compare`: methods x budgets x seeds at equal budget, one process per run, and their paired comparison.

What is complete is kept, what is half done is resumed, so the same command can be repeated until all is done.
"""

from __future__ import annotations

import json
from pathlib import Path

from lead_engine import console, report
from lead_engine.config import CompareConfig, EvalConfig, ReportConfig, StudyConfig
from lead_engine.errors import UserError
from lead_engine.evaluation.comparison_table import markdown, show
from lead_engine.evaluation.launch import run_logged
from lead_engine.evaluation.outputs import read_result
from lead_engine.evaluation.results import read_outcome, summarise_study
from lead_engine.evaluation.study import (
    StudyRun,
    base_config,
    check_unchanged,
    config_text,
    eval_command,
    is_evaluated,
    plan_runs,
    train_command,
)
from lead_engine.files import write_text
from lead_engine.yaml_config import parse_yaml_into

RESULTS = "results.json"


def run(config: CompareConfig) -> None:
    """Make the runs that are missing, then write OUT/results.json, OUT/results.md and OUT/report/.

    Raises UserError for a study that cannot be read, for runs made with other options, and for a run that fails.
    """
    study = read_study(config.config)
    runs = plan_runs(study, config.out)
    for each in runs:
        check_unchanged(each)
    base = base_config(study, config.out)
    _make_all(study, runs, base, config.out / "runs")
    untrained = None if base is None else read_result(base.out)
    results = summarise_study(study, [read_outcome(each) for each in runs], untrained)
    write_text(config.out / RESULTS, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(config.out / "results.md", markdown(results))
    show(results)
    report.run(ReportConfig(runs=(config.out,), out=config.out / "report"))


def read_study(path: Path) -> StudyConfig:
    """The study in a YAML file; UserError naming file and key for anything that is not one."""
    study = parse_yaml_into(StudyConfig, path)
    if not study.heldout:
        raise UserError(f"{path}: heldout: name at least one held-out file")
    if not study.budgets and any(method != "full" for method in study.methods):
        raise UserError(f"{path}: budgets: name at least one share of the pool")
    return study


def _make_all(study: StudyConfig, runs: list[StudyRun], base: EvalConfig | None, folder: Path) -> None:
    """Train and evaluate whatever is missing. The base first: it shows at once whether held-out files can be read."""
    folder.mkdir(parents=True, exist_ok=True)
    with console.progress(len(runs) + (base is not None), "runs") as bar:
        if base is not None:
            if not is_evaluated(base):
                console.say("base: evaluating the untrained model")
                run_logged(eval_command(base), folder / "base.log", "evaluating the base")
            bar.advance(loss=read_result(base.out)["loss"]["overall"])
        for each in runs:
            _make(each, study.ranks)
            bar.advance(loss=read_result(each.evaluate.out)["loss"]["overall"])


def _make(run: StudyRun, ranks: int) -> None:
    if not run.trained:
        console.say(f"{run.name}: {'resuming' if run.started else 'training'} (log: {run.log})")
        write_text(run.config_file, config_text(run.train))
        run_logged(train_command(run, ranks), run.log, f"training {run.name}")
        if not run.trained:
            raise UserError(f"training {run.name} ended without {run.folder / 'summary.json'}; see {run.log}")
    if not run.evaluated:
        console.say(f"{run.name}: evaluating")
        run_logged(eval_command(run.evaluate), run.log, f"evaluating {run.name}")
