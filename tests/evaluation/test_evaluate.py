from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lead_engine.base.errors import UserError
from lead_engine.config import BatchConfig, EvalConfig, RuntimeConfig
from lead_engine.evaluation.evaluate import evaluate, run
from lead_engine.evaluation.generate import batches_by_length, choose_questions, generate_answers
from lead_engine.evaluation.outputs import read_result, read_samples
from lead_engine.model.scoring import summarise_loss
from lead_engine.pool.end_of_turn import stop_tokens
from lead_engine.pool.records import read_records
from lead_engine.pool.template import Sample, encode

FP32 = RuntimeConfig(precision="fp32")


def options(model: Path, data: Path, **more: object) -> EvalConfig:
    values = {"max_length": 96, "batch": BatchConfig(capacity=128), "runtime": FP32, **more}
    return EvalConfig(model=str(model), data=(str(data),), **values)


def samples_of(data: Path, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    return list(encode(read_records([str(data)], skip_bad=False)[0], tokenizer, 96))


def reference_losses(folder: Path, samples: list[Sample]) -> list[float]:
    """Each sample alone through transformers, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    losses = []
    for sample in samples:
        ids = torch.tensor(sample.ids)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        counted = torch.tensor(sample.response[1:])
        losses.append(F.cross_entropy(logits[counted], ids[1:][counted]).item())
    return losses


def test_losses_are_those_of_each_sample_alone(
    model_folder: Path, records_file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    result = evaluate(options(model_folder, records_file, out=tmp_path / "out"))
    samples = samples_of(records_file, tokenizer)
    expected = np.array(reference_losses(model_folder, samples))
    tokens = np.array([sum(sample.response[1:]) for sample in samples])

    table = read_samples(tmp_path / "out")
    assert table.ids == ["a1", "a2", "b1", "b2", "c1"]
    assert table.tasks == ["sums", "sums", "capitals", "capitals", "unnamed"]
    assert table.tokens.tolist() == tokens.tolist()
    assert table.nll == pytest.approx(expected, rel=2e-5)

    assert result["loss"]["overall"] == pytest.approx((expected * tokens).sum() / tokens.sum(), rel=2e-5)
    tasks = {"sums": [0, 1], "capitals": [2, 3], "unnamed": [4]}
    means = {name: np.average(expected[rows], weights=tokens[rows]) for name, rows in tasks.items()}
    assert {name: task["loss"] for name, task in result["loss"]["tasks"].items()} == pytest.approx(means, rel=2e-5)
    assert result["loss"]["macro"] == pytest.approx(np.mean(list(means.values())), rel=2e-5)
    assert result["loss"]["tasks"]["sums"]["samples"] == 2
    assert result["exact_match"] is None
    assert read_result(tmp_path / "out") == result
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"eval.json", "samples.parquet"}


def test_overall_weighs_tokens_and_macro_weighs_tasks() -> None:
    loss = summarise_loss(np.array([1.0, 3.0, 5.0]), np.array([1, 3, 4]), ["a", "a", "b"])
    assert loss["overall"] == pytest.approx((1 + 9 + 20) / 8)
    assert loss["tasks"]["a"] == {"loss": 2.5, "samples": 2, "tokens": 4}
    assert loss["macro"] == pytest.approx((2.5 + 5) / 2)


def test_a_run_folder_keeps_its_evaluation_and_a_model_folder_is_left_alone(
    model_folder: Path, records_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in model_folder.iterdir())
    run(options(model_folder, records_file))
    assert sorted(path.name for path in model_folder.iterdir()) == before
    assert "capitals" in capsys.readouterr().out
    shutil.copytree(model_folder, tmp_path / "run" / "model")
    run(options(tmp_path / "run", records_file))
    assert read_result(tmp_path / "run" / "eval")["loss"]["tasks"].keys() == {"sums", "capitals", "unnamed"}
    assert "eval.json" in capsys.readouterr().out


def test_truncated_records_are_counted(
    model_folder: Path, records_file: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    lengths = sorted(len(sample.ids) for sample in samples_of(records_file, tokenizer))
    limit = lengths[-1] - 1
    result = evaluate(options(model_folder, records_file, max_length=limit))
    assert result["problems"] == {"truncated": sum(length > limit for length in lengths)}


def test_mistakes_are_named(model_folder: Path, records_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--max-length 8"):
        evaluate(options(model_folder, records_file, max_length=8))
    with pytest.raises(UserError, match=str(tmp_path / "absent")):
        evaluate(options(tmp_path / "absent", records_file))
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        evaluate(options(model_folder, tmp_path / "nowhere.jsonl"))
    diverged = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        diverged.model.norm.weight.fill_(torch.nan)
    shutil.copytree(model_folder, tmp_path / "diverged")
    diverged.save_pretrained(tmp_path / "diverged")
    with pytest.raises(UserError, match="not finite on 5 of 5"):
        evaluate(options(tmp_path / "diverged", records_file, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- generation ---


@pytest.fixture(scope="module")
def taught_folder(
    model_folder: Path, records_file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The model after it has learnt all records but `b2` by heart."""
    folder = tmp_path_factory.mktemp("taught")
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    samples = [sample for sample in samples_of(records_file, tokenizer) if sample.record.id != "b2"]
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, sample in enumerate(samples):
        tokens = torch.tensor(sample.ids)
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = tokens.where(torch.tensor(sample.response), -100)
    for _ in range(60):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    model.save_pretrained(folder)
    return folder


def test_what_was_learnt_is_answered_exactly(taught_folder: Path, records_file: Path, tmp_path: Path) -> None:
    """Prompt, stop token and decoding fit together only if a model that knows the answers is found to know them."""
    config = options(taught_folder, records_file, out=tmp_path, generate=5, max_new_tokens=40)
    match = evaluate(config)["exact_match"]
    assert match["tasks"]["sums"]["whole"]["mean"] == 1.0
    assert match["tasks"]["sums"]["final"]["n"] == 2
    assert match["tasks"]["sums"]["final"]["mean"] == 1.0
    assert match["tasks"]["unnamed"]["whole"]["mean"] == 1.0
    assert match["tasks"]["capitals"]["final"] is None
    assert match["prompts_too_long"] == 0
    answers = {line["id"]: line for line in map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())}
    assert answers["a1"]["generated"] == "2 + 3 makes 5.\n#### 5"
    assert answers["b1"]["whole"]
    assert set(answers) == {"a1", "a2", "b1", "b2", "c1"}
    evaluate(options(taught_folder, records_file, out=tmp_path))  # without generation: no answers of an earlier run
    assert not (tmp_path / "answers.jsonl").exists()


def test_batches_padded_on_the_left_answer_as_single_prompts_do(
    taught_folder: Path, records_file: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    records = read_records([str(records_file)], skip_bad=False)[0]
    questions, _ = choose_questions(records, tokenizer, per_task=9, longest=96, task_of=lambda record: record.dataset)
    prompts = [question.prompt for question in questions]
    assert len({len(prompt) for prompt in prompts}) > 2
    model = AutoModelForCausalLM.from_pretrained(taught_folder, dtype=torch.float32).eval()
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=24, batch_tokens=10_000)
    alone = generate_answers(model, tokenizer, prompts, max_new_tokens=24, batch_tokens=1)
    assert together == alone
    assert len(set(together)) > 2


def test_questions_do_not_depend_on_the_order_of_the_file(
    records_file: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    records = read_records([str(records_file)], skip_bad=False)[0]

    def chosen(order: list, **more: int) -> tuple[list[str], int]:
        values = {"per_task": 1, "longest": 96, **more}
        questions, too_long = choose_questions(order, tokenizer, task_of=lambda record: record.dataset, **values)
        return [question.record.id for question in questions], too_long

    ids, too_long = chosen(records)
    assert len(ids) == 3
    assert too_long == 0
    assert chosen(records[::-1]) == (ids, 0)
    assert set(ids) < set(chosen(records, per_task=2)[0])
    assert chosen(records, longest=3) == ([], 5)


def test_an_answer_ends_with_eos_or_with_the_templates_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_tokens(tokenizer) == [end]
    eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    original = tokenizer.eos_token
    try:
        tokenizer.eos_token = "<|endoftext|>"  # a base model that was given a chat template
        assert stop_tokens(tokenizer) == sorted([end, eos])
    finally:
        tokenizer.eos_token = original


def test_batches_respect_the_places() -> None:
    lengths = [5, 50, 7, 20, 21, 6]
    batches = batches_by_length(lengths, 10, 70)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    for batch in batches:
        assert len(batch) == 1 or (max(lengths[i] for i in batch) + 10) * len(batch) <= 70
    assert batches_by_length([1000], 10, 70) == [[0]]
    assert batches_by_length([], 10, 70) == []


def test_an_adapter_counts_in_loss_and_in_answers(model_folder: Path, records_file: Path, tmp_path: Path) -> None:
    """A LoRA run's folder gives the results of the merged model."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    adapted.peft_config["default"].base_model_name_or_path = str(model_folder)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.mul_(4)
    shutil.copytree(model_folder, tmp_path / "merged")
    shutil.copytree(
        model_folder, tmp_path / "run" / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    adapted.save_pretrained(tmp_path / "run" / "model")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    results = {}
    for name in ("run", "merged"):
        config = options(tmp_path / name, records_file, out=tmp_path / f"{name}-eval", generate=2, max_new_tokens=12)
        results[name] = evaluate(config)["loss"]["overall"]
    assert results["run"] == pytest.approx(results["merged"], rel=1e-4)
    untouched = evaluate(options(model_folder, records_file))["loss"]["overall"]
    assert abs(results["run"] - untouched) > 1e-2
    answers = [(tmp_path / f"{name}-eval" / "answers.jsonl").read_text() for name in ("run", "merged")]
    assert answers[0] == answers[1]
