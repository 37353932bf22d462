"""`lead-engine lm-eval` with the real lm-eval: own tasks over a local file, and what is refused."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lead_engine.base.errors import UserError
from lead_engine.cli import main
from lead_engine.config import HarnessConfig
from lead_engine.evaluation.harness import _check_code, _leaves, _names, evaluate, load_tasks

pytestmark = pytest.mark.slow

QUESTIONS = [
    {
        "question": f"What is {a} + {b}?",
        "choices": [str(a + b), "Paris", "The long and winding road."],
        "answer": (a * b) % 3,
    }
    for a in range(2, 5)
    for b in range(2, 5)
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}\\nAnswer:"
{rest}
"""
CHOICE = """doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATE = """doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files: two to run, a tag of both, and one that executes code."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    rest = {"own_choice": ("multiple_choice", CHOICE), "own_generate": ("generate_until", GENERATE)}
    for name, (kind, text) in rest.items():
        (folder / f"{name}.yaml").write_text(
            TASK.format(name=name, data=data, kind=kind, rest="tag: own_both\n" + text)
        )
    (folder / "code.yaml").write_text(
        TASK.format(name="own_code", data=data, kind="generate_until", rest="unsafe_code: true\n" + GENERATE)
    )
    (folder / "group.yaml").write_text("group: own_group\ntask: [own_choice, own_code]\n")
    return folder


@pytest.fixture(scope="module")
def adapter_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on that model, far from zero, as a run folder holds it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder), LoraConfig(r=4, target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    run = tmp_path_factory.mktemp("run")
    model.save_pretrained(run / "model")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(run / "model")
    return run


def best_choice(model: PreTrainedModel, tokenizer, question: dict) -> int:
    """The choice of the highest probability, a choice at a time."""
    sums = []
    for choice in question["choices"]:
        prompt = tokenizer(f"{question['question']}\nAnswer:", add_special_tokens=False).input_ids
        whole = tokenizer(f"{question['question']}\nAnswer: {choice}", add_special_tokens=False).input_ids
        with torch.no_grad():
            logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        sums.append(sum(float(logp[place - 1, whole[place]]) for place in range(len(prompt), len(whole))))
    return sums.index(max(sums))


@pytest.mark.parametrize("kind", ["whole model", "adapter in a run folder"])
def test_own_tasks(
    kind: str, manager, model_folder: Path, adapter_folder: Path, tasks: Path, tmp_path: Path, capsys
) -> None:
    folder = model_folder if kind == "whole model" else adapter_folder
    line = [
        "lm-eval",
        "--model",
        folder,
        "--tasks",
        "own_choice,own_generate",
        "--include-path",
        tasks,
        "--out",
        tmp_path / "out",
    ]
    assert main([str(word) for word in line]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    if kind != "whole model":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter_folder / "model")
    chosen = [best_choice(model.eval(), tokenizer, question) for question in QUESTIONS]
    right = [choice == question["answer"] for choice, question in zip(chosen, QUESTIONS, strict=True)]
    assert results["own_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    samples = [json.loads(text) for text in (tmp_path / "out" / "samples-own_choice.jsonl").read_text().splitlines()]
    assert [bool(sample["acc"]) for sample in sorted(samples, key=lambda sample: sample["doc_id"])] == right

    generated = [
        json.loads(text) for text in (tmp_path / "out" / "samples-own_generate.jsonl").read_text().splitlines()
    ]
    for sample in generated[:3]:
        ids = tokenizer(f"{sample['doc']['question']}\nAnswer:", add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert sample["resps"][0][0] == tokenizer.decode(out, skip_special_tokens=True).split("\n")[0]
    printed = capsys.readouterr().out
    assert f"| own_choice   |     0 |       {len(QUESTIONS)} | acc" in printed
    assert "own_generate" in printed


@pytest.fixture(scope="module")
def manager(tasks: Path) -> Iterator[Any]:
    """lm-eval's index with the folder in it. It takes seconds to build, so it is built once, as is the package list."""
    from lm_eval import evaluator
    from lm_eval import tasks as module

    kept, info = module.TaskManager, evaluator.add_env_info
    one = kept(include_path=tasks)
    module.TaskManager, evaluator.add_env_info = (lambda include_path: one), (lambda results: None)
    yield one
    module.TaskManager, evaluator.add_env_info = kept, info


def config(*tasks: str, include_path: Path | None = None, allow_code: bool = False) -> HarnessConfig:
    return HarnessConfig(model="m", tasks=tasks, out=Path("out"), include_path=include_path, allow_code=allow_code)


def test_names_that_the_issue_asks_for_exist(manager) -> None:
    assert _names(manager, ["gsm8k,mmlu", "humaneval", "tydiqa"]) == ["gsm8k", "mmlu", "humaneval", "tydiqa_goldp"]
    assert len(list(_leaves(manager, "mmlu"))) == 57
    assert len(list(_leaves(manager, "tydiqa_goldp"))) == 9
    assert _names(manager, ["own_[cg]*"]) == ["own_choice", "own_code", "own_generate", "own_group"]
    with pytest.raises(UserError, match=r"--tasks gsm8kk: lm-eval has no such task; did you mean gsm8k"):
        _names(manager, ["gsm8kk"])


def test_code_is_not_run_unasked(manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    for name in ("humaneval", "mbpp", "own_code", "own_group"):
        with pytest.raises(UserError, match=f"--tasks {name}: executes the programs .* --allow-code"):
            _check_code(manager, [name], config(name))
    _check_code(manager, ["gsm8k", "mmlu", "tydiqa_goldp", "own_both"], config("gsm8k"))
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    _check_code(manager, ["own_code"], config("own_code", allow_code=True))
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"


def test_what_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="runs in one process"):
            evaluate(config("gsm8k"))
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as Python says that there is no such module
    with pytest.raises(UserError, match="lm_eval is not installed; pip install lm-eval"):
        evaluate(config("gsm8k"))


def test_data_that_cannot_be_had_is_named(manager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(
        UserError,
        match=r"tydiqa_goldp: its data \(google-research-datasets/tydiqa\) cannot be loaded here: .*HF_HUB_OFFLINE",
    ):
        load_tasks(config("tydiqa"))
    with pytest.raises(UserError, match=r"--include-path .*: no such folder"):
        load_tasks(config("gsm8k", include_path=tmp_path / "nowhere"))
