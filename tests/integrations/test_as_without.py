"""A trainer with LEAD behaves as one without: events, logs, epochs, files, rows, evaluation, the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, EarlyStoppingCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from lead_engine.integrations import lead
from lead_engine.integrations.loop import steps_in_epoch
from needs import TRAINERS

pytestmark = [pytest.mark.slow, TRAINERS]

OWN = {"lead_round", "lead_reward", "lead_tokens"}
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
EVENTS = ("train_begin", "epoch_begin", "step_begin", "step_end", "epoch_end", "log", "evaluate", "save", "train_end")


class Seen(TrainerCallback):
    """(event, step, epoch, last step, epochs in all) of every event."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []


for _event in EVENTS:

    def _note(self: Seen, args: Any, state: Any, control: Any, event: str = _event, **_: Any) -> None:
        epoch = None if state.epoch is None else round(state.epoch, 6)
        self.events.append((event, state.global_step, epoch, state.max_steps, state.num_train_epochs))

    setattr(Seen, f"on_{_event}", _note)


def keys(trainer: Any) -> list[list[str]]:
    """What each line of the log holds, but for what LEAD adds."""
    return [sorted(set(line) - OWN) for line in trainer.state.log_history]


@pytest.fixture(scope="module")
def text() -> Dataset:
    rows = [{"prompt": f"say {WORDS[i % 8]} {i}:", "completion": f" {' '.join(WORDS[: 1 + i % 7])}"} for i in range(20)]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def sft(make_model, make_args, load):
    """sft(cls, dataset, ...) -> an SFTTrainer on the tiny model; cls is SFTTrainer, or that with LEAD in it."""

    def make(
        cls: type, dataset: Any, *, tokenizer: Any = None, callbacks: Any = None, given: Any = None, **options: Any
    ) -> Any:
        folder = make_model()
        plain = {"bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 2, "max_length": None}
        args = options.pop("args", None) or make_args(SFTConfig, **{**plain, **options})
        return cls(
            model=load(folder),
            args=args,
            train_dataset=dataset,
            callbacks=callbacks,
            processing_class=tokenizer or AutoTokenizer.from_pretrained(folder),
            **(given or {}),
        )

    return make


def test_epochs_events_and_logs(sft, text) -> None:
    """20 rows, 4 a step: epochs end at steps 5 and 10, and a last, short one at 12. An SFTTrainer is a Trainer too."""
    once = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "max_steps": 12,
        "include_num_input_tokens_seen": "all",
    }
    found = {}
    for name, cls in (("without", SFTTrainer), ("with", lead().trainer(SFTTrainer))):
        seen = Seen()
        trainer = sft(cls, text, callbacks=[seen], given={"eval_dataset": text.select(range(6))}, **once)
        trainer.train()
        found[name] = trainer, seen.events
        folders = sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))
        assert folders == ["checkpoint-10", "checkpoint-12", "checkpoint-5"]
    (plain, expected), (trainer, events) = found["without"], found["with"]
    assert events == expected
    assert [event[:3] for event in events if event[0] == "epoch_end"] == [
        ("epoch_end", 5, 1.0),
        ("epoch_end", 10, 2.0),
        ("epoch_end", 12, 2.4),
    ]
    assert keys(trainer) == keys(plain)
    for line in trainer.state.log_history:
        if "loss" in line:
            assert line["num_tokens"] == line["lead_tokens"] > 0
    evaluated = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert [line["epoch"] for line in evaluated] == [1.0, 2.0, 2.4]
    tokens = {line["step"]: line["num_tokens"] for line in trainer.state.log_history if "loss" in line}
    assert [line["eval_num_tokens"] for line in evaluated] == [tokens[5], tokens[10], tokens[12]]


def test_a_run_that_its_budget_ends_saves_and_evaluates_as_at_any_end(
    make_pool, make_model, make_args, load, collator, capsys
) -> None:
    """Fewer steps than max_steps: the budget wins. 18 rows, 4 a step: 5 steps an epoch, the last as full as any."""
    folder, pool = make_model(), make_pool(samples=18)
    args = make_args(
        per_device_train_batch_size=2,
        max_steps=100,
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        metric_for_best_model="eval_loss",
        load_best_model_at_end=True,
    )
    rows, seen = lead(pool).dataset(), Seen()
    trainer = lead(pool, budget=1.4, options={"max_visits": 9}).trainer(Trainer)(
        model=load(folder),
        args=args,
        data_collator=collator(folder),
        eval_dataset=rows.select(range(4)),
        callbacks=[seen],
    )
    assert len(trainer.get_train_dataloader()) == 9  # nothing is planned yet: the plain one, whose rows are all of them
    first = next(iter(trainer.get_train_dataloader()))
    assert sorted(first) == ["attention_mask", "input_ids", "labels"]
    trainer.train()
    last = trainer.state.global_step
    assert 5 < last < 12
    assert last % 3
    assert "100 steps" in (said := capsys.readouterr().out)
    assert "whichever comes first" in said
    for event in ("save", "evaluate"):
        assert [step for name, step, *_ in seen.events if name == event] == [*range(3, last, 3), last]
    assert [step for name, step, *_ in seen.events if name == "epoch_end"] == [5, *([10] if last > 10 else []), last]
    assert trainer.state.best_model_checkpoint is not None
    assert args.max_steps == 100

    # A trainer's own end is a user's too: callbacks that stop the run do.
    args.max_steps = 12
    patience = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    trainer = lead(pool, options={"max_visits": 9}).trainer(Trainer)(
        model=load(folder),
        args=args,
        data_collator=collator(folder),
        eval_dataset=rows.select(range(4)),
        callbacks=[patience],
    )
    trainer.train()
    assert trainer.state.global_step == 6


def test_arguments_serve_two_trainers(make_pool, make_model, make_args, load, collator) -> None:
    """The steps of the first one's budget must not become the second one's max_steps."""
    folder, args = make_model(), make_args()
    steps = []
    for budget in (0.1, "0.4"):
        trainer = lead(str(make_pool(samples=40)), budget=budget).trainer(Trainer)(
            model=load(folder), args=args, data_collator=collator(folder)
        )
        steps.append(trainer.args.max_steps)
    assert steps == [1, 2]
    assert args.max_steps == -1


GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m['content'] }}"
    "<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": " ".join(WORDS[: 1 + i % 7])}]


@pytest.mark.parametrize(
    ("row", "options"),
    [
        (lambda i: {"text": f"row {i} {WORDS[i % 8]}"}, {}),
        (lambda i: {"body": f"row {i} {WORDS[i % 8]}", "other": i}, {"dataset_text_field": "body"}),
        (lambda i: {"prompt": f"say {i}:", "completion": f" {WORDS[i % 8]}"}, {"shuffle_dataset": True}),
        (lambda i: {"prompt": f"say {i}:", "completion": f" {WORDS[i % 8]}"}, {"completion_only_loss": False}),
        (lambda i: {"messages": chat(i)}, {}),
        (lambda i: {"messages": chat(i) + chat(i + 1)}, {"assistant_only_loss": True}),
        (lambda i: {"prompt": chat(i)[:1], "completion": chat(i)[1:]}, {"max_length": 30}),
        (
            lambda i: {
                "conversations": [{"from": "human", "value": f"say {i}"}, {"from": "gpt", "value": WORDS[i % 8]}]
            },
            {},
        ),
    ],
    ids=[
        "text",
        "text field",
        "prompt and completion",
        "all learned",
        "messages",
        "assistant only",
        "cut",
        "from and value",
    ],
)
def test_rows_are_those_that_trl_makes(sft, make_model, row, options) -> None:
    dataset = Dataset.from_list([row(i) for i in range(12)])
    tokenizer = AutoTokenizer.from_pretrained(make_model())
    tokenizer.chat_template = GENERATION
    tokenizer.padding_side = "left"  # for generation; TRL's collator does not go by it
    make = {"tokenizer": tokenizer, "max_steps": 1, **options}
    plain, trainer = (sft(cls, dataset, **make) for cls in (SFTTrainer, lead().trainer(SFTTrainer)))
    assert trainer.train_dataset.column_names == plain.train_dataset.column_names
    assert trainer.train_dataset.to_list() == plain.train_dataset.to_list()
    assert trainer.lead_rows.counts.tolist() == [
        sum(x != -100 for x in labels[1:]) for labels in plain.train_dataset["labels"]
    ]


def test_evaluation_of_every_kind(sft, text) -> None:
    """Several sets by name, a set given later, predictions, metrics and what prepares logits for them."""

    def metrics(found: Any) -> dict[str, float]:
        right = found.predictions[:, :-1] == found.label_ids[:, 1:]
        return {"right": float(right[found.label_ids[:, 1:] != -100].mean())}

    given = {
        "eval_dataset": {"few": text.select(range(4)), "more": text.select(range(4, 9))},
        "compute_metrics": metrics,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    }
    results = []
    for cls in (SFTTrainer, lead().trainer(SFTTrainer)):
        trainer = sft(cls, text, given=given, max_steps=2)
        streamed = text.select(range(9, 12)).to_iterable_dataset()
        own = trainer.evaluate(), trainer.evaluate(streamed, metric_key_prefix="late")
        predicted = trainer.predict(trainer.eval_dataset["few"])
        found = {**own[0], **own[1], **predicted.metrics}
        results.append(
            {name: value for name, value in found.items() if not name.endswith(("time", "per_second", "runtime"))}
        )
        trainer.train()
        assert trainer.evaluate()["eval_few_right"] >= 0
    assert results[1] == results[0]
    assert {"eval_few_loss", "eval_more_right", "late_right", "test_loss"} <= set(results[0])


@pytest.mark.parametrize("bits", [None, 4], ids=["whole", "four bits"])
def test_the_model_afterwards_is_the_models(sft, make_model, make_args, load, text, bits, tmp_path) -> None:
    """It generates and can be copied and saved; so can a base in four bits (bitsandbytes, on the CPU) with adapters."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    options, given = {"max_steps": 3, "learning_rate": 1e-2}, {}
    trainer = sft(lead(round_steps=2).trainer(SFTTrainer), text, given=given, **options)
    if bits:
        quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = load(
            make_model(hidden_size=64, intermediate_size=128), quantization_config=quantised, device_map={"": "cpu"}
        )
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        trainer = lead().trainer(SFTTrainer)(
            model=model,
            args=trainer.args,
            train_dataset=text,
            processing_class=trainer.processing_class,
            peft_config=adapter,
        )
        assert type(trainer.model.get_base_model().model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved) or not bits
    asked = torch.tensor([[5, 6, 7]])
    said = trainer.model.generate(asked, max_new_tokens=3, do_sample=False)
    assert said.shape[1] > 3
    if bits:
        return
    trainer.save_model(str(tmp_path))
    # TRL's own patch of a model keeps a copy from being one, so Trainer's is copied.
    trainer = lead().trainer(Trainer)(
        model=load(make_model()),
        args=make_args(max_steps=1),
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
    )
    trainer.train()
    twin = copy.deepcopy(trainer.model)
    with torch.no_grad():
        expected = trainer.model(asked).logits
        for p in trainer.model.parameters():
            p.zero_()
        assert torch.equal(twin(asked).logits, expected)  # a copy's forward goes by the copy's weights
        again = load(tmp_path)
        assert torch.equal(again.generate(asked, max_new_tokens=3, do_sample=False), said)


def test_an_epoch_has_the_steps_that_it_has_without(make_model, make_args, load) -> None:
    """Whatever the rows, the batch and the accumulation, by the trainer's own count."""
    trainer, drawn = Trainer(model=load(make_model()), args=make_args()), st.integers(1, 7)

    @given(rows=st.integers(1, 60), batch=drawn, accumulation=drawn, drop=st.booleans(), steps=st.integers(1, 40))
    @settings(max_examples=60, deadline=None)
    def holds(rows: int, batch: int, accumulation: int, drop: bool, steps: int) -> None:
        args = copy.copy(trainer.args)
        args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_steps = batch, accumulation, steps
        args.dataloader_drop_last = drop and rows >= batch  # else nothing is left to train on
        loader = DataLoader(list(range(rows)), batch_size=batch, drop_last=args.dataloader_drop_last)
        epochs, steps_an_epoch, *_ = trainer.set_initial_training_values(args, loader)
        assert steps_in_epoch(args, rows) == steps_an_epoch
        assert -(-steps // steps_an_epoch) == epochs

    holds()
