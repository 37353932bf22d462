"""`lead-engine lm-eval`: public benchmarks, by EleutherAI's lm-evaluation-harness (the extra `eval`).

Task names are lm-eval's own, and `ALIASES`. The most common ones: `gsm8k` (5 shots by its own setting), `mmlu` (57
subjects; 0 shots unless --shots says otherwise, papers report 5), `humaneval` (runs the model's programs, which needs
--allow-code) and `tydiqa_goldp` (9 languages).
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lead_engine.base import console
from lead_engine.base.errors import UserError
from lead_engine.base.files import write_text
from lead_engine.config import HarnessConfig
from lead_engine.model.find import find_model
from lead_engine.model.identity import check_base
from lead_engine.model.load import load_hf, load_tokenizer

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

RESULT = "results.json"
ALIASES = {"tydiqa": "tydiqa_goldp", "human_eval": "humaneval", "gsm-8k": "gsm8k"}
"""Other names of tasks -> lm-eval's."""


def run(config: HarnessConfig) -> None:
    """The command `lm-eval`: evaluate, write OUT/results.json and OUT/samples-TASK.jsonl, print the table."""
    results = evaluate(config)
    write(config.out, results)
    columns = ["task", "shots", "samples", "metric", "value", "standard error"]
    console.table(f"{config.model} on {', '.join(config.tasks)}", columns, rows(results))
    console.say(f"written: {config.out / RESULT}")


def evaluate(config: HarnessConfig) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns, "samples" included.

    Before it loads the model, raises UserError if lm-eval is not installed, a task is unknown, its data cannot be
    loaded, or it executes code without --allow-code.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval: lm_eval is not installed; pip install lm-eval")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("lm-eval: runs in one process; start it without torchrun")
    folder = find_model(config.model)
    check_base(folder)
    tokenizer = load_tokenizer(folder)
    if config.chat and tokenizer.chat_template is None:
        raise UserError(f"--chat: the tokenizer of {folder} has no chat template")
    tasks = load_tasks(config)

    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        load_hf(folder), tokenizer=tokenizer, batch_size=config.batch_size, max_length=config.max_length or None
    )
    try:
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            num_fewshot=None if config.shots < 0 else config.shots,
            limit=config.limit or None,
            apply_chat_template=config.chat,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=config.seed,
            confirm_run_unsafe_code=config.allow_code,
        )
    except OSError as error:  # some tasks fetch more data only now
        raise UserError(f"--tasks {' '.join(config.tasks)}: {_first_line(error)}") from None
    return results


def load_tasks(config: HarnessConfig) -> list[Any]:
    """Load lm-eval's Task and Group objects for `config.tasks`, with their data. Raises UserError naming the task."""
    from lm_eval.tasks import TaskManager

    if config.include_path is not None and not config.include_path.is_dir():
        raise UserError(f"--include-path {config.include_path}: no such folder; give one with task YAML files")
    manager = TaskManager(include_path=config.include_path)
    names = _names(manager, config.tasks)
    _check_code(manager, names, config)
    objects: list[Any] = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # the hub client, datasets and tasks' own code raise a dozen types
            raise UserError(_cannot_load(manager, name, error)) from None
        groups = loaded.get("groups") or {}
        objects += [groups[name]] if name in groups else loaded["tasks"].values()
    return objects


def _names(manager: TaskManager, asked: Sequence[str]) -> list[str]:
    """lm-eval's names of the tasks asked for. Commas separate names as blanks do; * and ? match."""
    known = manager.all_tasks
    names: list[str] = []
    for word in (part for text in asked for part in text.split(",") if part):
        name = word if word in known else ALIASES.get(word, word)
        found = [name] if name in known else manager.match_tasks([name])
        if not found:
            close = difflib.get_close_matches(name, known, n=3)
            hint = "`python -m lm_eval ls tasks` lists them; tasks of your own need --include-path"
            if close:
                hint = f"did you mean {', '.join(close)}?"
            raise UserError(f"--tasks {word}: lm-eval has no such task; {hint}")
        names += [each for each in found if each not in names]
    return names


def _check_code(manager: TaskManager, names: Sequence[str], config: HarnessConfig) -> None:
    """Raise UserError for tasks that execute the model's programs without --allow-code.

    Comes before the tasks are built, because building one already executes code.
    """
    unsafe = [name for name in names if any(leaf.get("unsafe_code") for leaf in _leaves(manager, name))]
    if unsafe and not config.allow_code:
        raise UserError(
            f"--tasks {' '.join(unsafe)}: executes the programs that the model writes, on this machine and as this "
            "user; add --allow-code if that is meant, in a container or a virtual machine"
        )
    if unsafe:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric in the package `evaluate` asks for it


def _leaves(manager: TaskManager, name: str) -> Iterator[dict[str, Any]]:
    """The configurations of a task, of a tag's tasks, or of a group's tasks and groups."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    config = entry.cfg or {}
    inner = config.get("task") if "group" in config else None
    if isinstance(inner, str):
        parts = [inner]
    elif inner:
        parts = inner
    elif entry.cfg is None:  # a tag, or a group without a file of its own
        parts = sorted(entry.tags)
    else:
        parts = []
    if inner is None and entry.cfg is not None:
        yield config
    for part in parts:
        if isinstance(part, dict):
            yield part
            part = part.get("task") or part.get("group") or ""
        if isinstance(part, str) and part != name:
            yield from _leaves(manager, part)


def _cannot_load(manager: TaskManager, name: str, error: Exception) -> str:
    sources = sorted({str(leaf["dataset_path"]) for leaf in _leaves(manager, name) if leaf.get("dataset_path")})
    data = f" ({', '.join(sources[:3])})" if sources else ""
    offline = "HF_HUB_OFFLINE is set; " if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return (
        f"--tasks {name}: its data{data} cannot be loaded here: {type(error).__name__}: {_first_line(error)}; {offline}"
        "run it once where the hub can be reached (data is cached in HF_HOME), or give a task of your own over local "
        "files with --include-path"
    )


def rows(results: dict[str, Any]) -> list[list[object]]:
    """[task, shots, samples, metric, value, standard error] of groups, then tasks; members of groups are indented."""
    members = {child for children in (results.get("group_subtasks") or {}).values() for child in children}
    table: list[list[object]] = []
    for name, values in {**(results.get("groups") or {}), **results["results"]}.items():
        label = f"  {name}" if name in members else name
        shots = results.get("n-shot", {}).get(name)
        samples = results.get("n-samples", {}).get(name, {}).get("effective")
        for metric, value, error in _metrics(values):
            table.append([label, shots, samples, metric, value, error])
    return table


def _metrics(values: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """(metric, value, standard error or None) in one task's results, whose keys are "metric,filter"."""
    for key, value in values.items():
        metric, _, filters = key.partition(",")
        if not isinstance(value, (int, float)):
            continue
        if metric.endswith("_stderr") or metric in ("sample_len", "sample_count"):
            continue
        error = values.get(f"{metric}_stderr,{filters}")
        label = metric if filters in ("", "none") else f"{metric} ({filters})"
        yield label, float(value), error if _number(error) else None


def write(out: Path, results: dict[str, Any]) -> None:
    """Write OUT/samples-TASK.jsonl and, last, OUT/results.json with everything else that lm-eval returned."""
    out.mkdir(parents=True, exist_ok=True)
    for task, samples in (results.get("samples") or {}).items():
        write_text(out / f"samples-{task}.jsonl", "".join(json.dumps(sample, default=str) + "\n" for sample in samples))
    rest = {name: value for name, value in results.items() if name != "samples"}
    write_text(out / RESULT, json.dumps(rest, indent=1, default=str) + "\n")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
