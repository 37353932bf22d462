"""`lead-engine compare`: methods x budgets x seeds at equal budget, one process per run, and their paired comparison.

What is complete is kept, what is half done is resumed, so the same command can be repeated until all is done.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lead_engine import console, report
from lead_engine.config import CompareConfig, EvalConfig, ReportConfig, StudyConfig, to_dict
from lead_engine.errors import UserError
from lead_engine.evaluation.launch import run_logged
from lead_engine.evaluation.outputs import read_result
from lead_engine.evaluation.results import bracket, read_outcome, signed, summarise_study
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
    results = summarise_study(study, [read_outcome(each) for each in runs], None if base is None else read_result(base.out))
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
    """Train and evaluate whatever is missing. The base first: it shows at once whether the held-out files can be read."""
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
        console.say(f"{run.name}: {'going on with' if run.started else ''} training (log: {run.log})".replace(":  ", ": "))
        write_text(run.config_file, config_text(run.train))
        run_logged(train_command(run, ranks), run.log, f"training {run.name}")
        if not run.trained:
            raise UserError(f"training {run.name} ended without {run.folder / 'summary.json'}; see {run.log}")
    if not run.evaluated:
        console.say(f"{run.name}: evaluating")
        run_logged(eval_command(run.evaluate), run.log, f"evaluating {run.name}")


# --- the table ----------------------------------------------------------------------------------------------------------

COLUMNS = ("method", "budget", "tokens trained", "loss, overall", "loss, macro", "difference to random", "exact match", "time")


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """A row per method and budget, the untrained base first; losses as mean and 95 % interval over seeds."""
    rows = []
    if results["base"]:
        loss, match = results["base"]["loss"], results["base"]["exact_match"]
        shares = [_share(match["overall"][kind]) for kind in ("whole", "final")] if match else ["-", "-"]
        rows.append(["untrained", "-", "0", _number(loss["overall"]), _number(loss["macro"]), "-", " / ".join(shares), "-"])
    for group in results["groups"]:
        difference = group["difference"]
        rows.append(
            [
                group["method"],
                "100 %" if group["budget"] is None else f"{100 * group['budget']:g} %",
                f"{group['tokens_trained']:,.0f}",
                _interval(group["overall"]),
                _interval(group["macro"]),
                f"{signed(difference['overall']['mean'])} {bracket(difference['overall'])}" if difference else "-",
                " / ".join(_share(group[kind]) for kind in ("whole", "final")),
                _time(group["seconds"]),
            ]
        )
    if not any(group["whole"] for group in results["groups"]):  # nothing was generated
        rows = [[*row[:6], row[7]] for row in rows]
    return rows


def columns_of(rows: list[list[str]]) -> list[str]:
    """The columns' names; without exact match where the rows have none."""
    return [name for name in COLUMNS if name != "exact match" or len(rows[0]) == len(COLUMNS)]


def show(results: dict[str, Any]) -> None:
    """Print the table and the verdicts."""
    rows = table_rows(results)
    console.table("Held-out loss (nats per response token), mean over seeds and 95 % interval", columns_of(rows), rows)
    for line in (*results["verdicts"], *(f"warning: {warning}" for warning in results["warnings"])):
        console.say(line)


def markdown(results: dict[str, Any]) -> str:
    """results.md: the table, how to read it, and the verdicts."""
    rows = table_rows(results)
    columns = columns_of(rows)
    study = to_dict(results["study"])
    lines = [
        "# Comparison of selection methods",
        "",
        f"Pool `{study['pool']}`, model `{study['model']}`, held-out `{'`, `'.join(study['heldout'])}`, seeds "
        f"{', '.join(map(str, study['seeds']))}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(f"- {line}" for line in (*results["verdicts"], *results["warnings"])),
        "",
        "Losses are nats per response token on the held-out samples: *overall* over all tokens, *macro* the mean over tasks. "
        "Brackets are 95 % intervals of the mean over seeds (Student's t); the difference to `random` is paired by seed, at the "
        "same budget. Exact match is whole answer / final answer. Time is training alone.",
    ]
    over_samples = [
        f"- {group['method']}, {100 * group['budget']:g} %: {signed(group['difference']['over_samples']['mean'])} "
        f"{bracket(group['difference']['over_samples'])}"
        for group in results["groups"]
        if group["difference"]
    ]
    if over_samples:
        lines += [
            "",
            "Difference to `random` with the trained models taken as given, 95 % over the choice of held-out samples "
            "(paired bootstrap within tasks, losses averaged over seeds):",
            "",
            *over_samples,
        ]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:.4f}"


def _interval(interval: dict[str, Any]) -> str:
    bounds = "" if interval["low"] is None else f" [{interval['low']:.4f}, {interval['high']:.4f}]"
    return _number(interval["mean"]) + bounds


def _share(share: dict[str, Any] | None) -> str:
    return "-" if share is None or share["mean"] is None else f"{100 * share['mean']:.1f} %"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
