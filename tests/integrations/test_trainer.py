"""LEAD inside transformers' Trainer against the engine's own loop: the same samples, the same losses, the same U."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from lead_engine.base.errors import UserError
from lead_engine.integrations import lead
from needs import TRAINERS

pytestmark = [pytest.mark.slow, TRAINERS]

# Padded and packed batches add the same numbers in another order: fp32 losses near 5 agree to about 1e-6 at first, and
# every step adds to the difference.
LOSS = {"rtol": 0, "atol": 5e-5}
# dL is a small difference times <G, dtheta> / |Phi|^2, which carries the gradients' rounding.
UTILITY = {"rtol": 0, "atol": 5e-4}


def lines(trainer) -> list[dict]:
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / "selection.jsonl").read_text().splitlines()]


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sketch_dim": 0, "calibrate_every": 3, "unseen": "drift"},
        {"loss_change": "paper", "draw": "cluster", "drop_misaligned": True},
    ],
    ids=["default", "exact", "paper"],
)
def test_rounds_losses_and_utility_are_the_engines(
    make_pool, make_model, make_args, load, collator, engine_rounds, options
) -> None:
    pool, model = make_pool(), make_model()
    selection = lead(pool, options=options)
    args = make_args(max_steps=10)  # two rounds of four steps, and half of a third
    trainer = selection.trainer(Trainer)(model=load(model), args=args, data_collator=collator(model))
    trainer.train()
    reports, selector = engine_rounds(pool, model, options=options, rounds=3)
    ours = lines(trainer)
    assert [line["ids"] for line in ours[:2]] == [report.sample_ids for report in reports[:2]]
    assert ours[2]["ids"] == reports[2].sample_ids[:2]
    expected = [loss for report in reports for loss in report.losses][:10]
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(expected), **LOSS)
    assert [line["reward"] for line in ours[:2]] == pytest.approx([report.reward for report in reports[:2]], abs=5e-3)
    own, trained = trainer.lead_rounds.selector.samples, trainer.lead_rounds.selector.samples.visits
    whole = (trained > 0) & (trained == selector.samples.visits)  # not those of the engine's last two steps
    assert whole.sum() > 40
    limit = (
        LOSS if options.get("loss_change") == "paper" else UTILITY
    )  # the paper's is small here, and is not scaled by a difference
    torch.testing.assert_close(own.utility[whole], selector.samples.utility[whole], **limit)
    assert trainer.state.log_history[-2]["lead_tokens"] == sum(line["tokens"] for line in ours)


def test_the_budget_is_the_engines_and_the_last_step_may_be_short(
    make_pool, make_model, make_args, load, collator, engine_rounds, capsys
) -> None:
    pool, model = make_pool(), make_model()
    trainer = lead(pool, budget=0.33).trainer(Trainer)(
        model=load(model), args=make_args(max_steps=1000), data_collator=collator(model)
    )
    trainer.train()
    reports, _ = engine_rounds(pool, model, budget=0.33)
    assert [line["ids"] for line in lines(trainer)] == [report.sample_ids for report in reports]
    torch.testing.assert_close(
        torch.tensor(losses(trainer)), torch.tensor([x for report in reports for x in report.losses]), **LOSS
    )
    assert len(reports[-1].sample_ids[-1]) not in (0, 8)
    assert trainer.state.global_step < 1000
    assert "nothing is left to train after step" in capsys.readouterr().out


def test_steps_follow_from_the_budget(make_pool, make_model, make_args, load, collator) -> None:
    make = lead(make_pool(), budget=0.2).trainer(Trainer)
    trainer = make(model=load(make_model()), args=make_args(), data_collator=collator(make_model()))
    assert trainer.args.max_steps == 200 * 0.2 / 8
    with pytest.raises(UserError, match="max_steps"):
        lead(make_pool()).trainer(Trainer)(
            model=load(make_model()), args=make_args(), data_collator=collator(make_model())
        )


def test_no_estimate_takes_a_loss_below_zero(make_pool, make_model, make_args, load, collator) -> None:
    from lead_engine.selection.loss_change import LossChange

    class Overshoots(LossChange):
        def estimate(self, *_: object) -> torch.Tensor:
            return torch.full((2, 4), -100.0)

    trainer = lead(make_pool(samples=40)).trainer(Trainer)(
        model=load(make_model()), args=make_args(max_steps=1), data_collator=collator(make_model())
    )
    trainer._lead_begin(None)
    rounds = trainer.lead_rounds
    rounds.change = Overshoots()
    assert rounds.ahead()
    ids = rounds.ids(0) + rounds.ids(1)
    before = rounds.selector.samples.utility[ids].clone()
    rounds.observe([torch.full((4,), 3.0)] * 2, 1e-3, None, torch.ones(()))
    torch.testing.assert_close(rounds.selector.samples.utility[ids], 0.1 * before)


def first_batch(trainer):
    """(ids, our HeadLoss, the batch) of a run's first micro-batch, under the model as it is."""
    trainer._lead_begin(None)
    assert trainer.lead_rounds.ahead()
    ids = trainer.lead_rounds.ids(0)
    batch = trainer._prepare_inputs(trainer.lead_rows.batch(ids))
    with torch.no_grad(), trainer.accelerator.autocast():
        trainer.model.eval()
        return ids, trainer.compute_loss(trainer.model, batch, return_outputs=True)[1], batch


def by_logits(model, batch) -> torch.Tensor:
    """Mean loss of every row by the model's own logits, fp32 [b]."""
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return nll.sum(1) / (labels != -100).sum(1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gemma2", {"tie_word_embeddings": True, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("phi", {"partial_rotary_factor": 0.5}),  # its head has a bias
        ("qwen3", {}),
    ],
)
def test_losses_are_those_of_the_models_logits(make_pool, make_model, make_args, load, collator, kind, options) -> None:
    folder = make_model(kind, **options)
    make = lead(make_pool(samples=40)).trainer(Trainer)
    trainer = make(
        model=load(folder, attn_implementation="eager"), args=make_args(max_steps=1), data_collator=collator(folder)
    )
    if trainer.model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(trainer.model.get_output_embeddings().bias)
    ids, head, batch = first_batch(trainer)
    torch.testing.assert_close(head.sample_nll, by_logits(trainer.model, batch), rtol=0, atol=1e-5)
    assert head.sample_tokens.tolist() == trainer.lead_rows.counts[ids].tolist()


def test_a_head_that_is_more_than_a_product_is_found_out(make_pool, make_model, make_args, load, collator) -> None:
    model = load(make_model())
    model.lm_head.register_forward_hook(lambda module, inputs, output: 1.3 * output)
    trainer = lead(make_pool(samples=40)).trainer(Trainer)(
        model=model, args=make_args(max_steps=1), data_collator=collator(make_model())
    )
    with pytest.raises(UserError, match="something else stands between"):
        trainer.train()


def test_bf16_is_as_exact_as_the_models_own(make_pool, make_model, make_args, load, collator) -> None:
    make = lead(make_pool(samples=60)).trainer(Trainer)
    folder = make_model(hidden_size=64, intermediate_size=128)
    trainer = make(model=load(folder), args=make_args(max_steps=5, bf16=True), data_collator=collator(folder))
    _, head, batch = first_batch(trainer)
    exact = by_logits(trainer.model, batch)
    with trainer.accelerator.autocast():
        theirs = by_logits(trainer.model, batch)
    assert (head.sample_nll - exact).abs().max() <= 1.2 * (theirs - exact).abs().max()
    trainer.train()
    assert all(5 < loss < 7 for loss in losses(trainer))
    whole = make(
        model=load(folder).bfloat16(), args=make_args(max_steps=5), data_collator=collator(folder)
    )  # bf16 weights
    whole.train()
    assert losses(whole) == pytest.approx(losses(trainer), abs=0.1)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(
    make_pool, make_model, make_args, load, collator
) -> None:
    """Trainer logs such losses as 0 (trl #6668) and trains on: every weight is lost."""
    pool, folder = make_pool(samples=60), make_model()
    rows = lead(pool).dataset()
    model, token = load(folder), rows[11]["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.inf
    has = [i for i, row in enumerate(rows) if token in row["input_ids"]]
    trainer = lead(pool).trainer(Trainer)(model=model, args=make_args(max_steps=30), data_collator=collator(folder))
    with pytest.raises(
        UserError, match=r"the loss of train_dataset's rows \[[\d, ]+\] is not a finite number"
    ) as raised:
        trainer.train()
    named = json.loads(str(raised.value).partition("rows ")[2].partition("]")[0] + "]")
    assert named
    assert set(named) <= set(has)
    embedding = model.get_input_embeddings().weight
    assert all(p.isfinite().all() for p in model.parameters() if p is not embedding)  # before the step, not after it
    make = lead(budget=1.0).trainer(Trainer)
    trainer = make(model=model, args=make_args(), data_collator=collator(folder), train_dataset=rows)
    with pytest.raises(UserError, match=r"the model's loss on row \d+ is not a finite number"):
        trainer.train()


def test_evaluation_is_the_trainers_own(make_pool, make_model, make_args, load, collator) -> None:
    pool, folder = make_pool(samples=80), make_model()
    held_out = lead(make_pool(samples=10, seed=5)).dataset()
    plain = Trainer(
        model=load(folder), args=make_args(), data_collator=collator(folder), eval_dataset=held_out
    ).evaluate()
    args = make_args(max_steps=6, eval_strategy="steps", eval_steps=3, eval_on_start=True)
    trainer = lead(pool).trainer(Trainer)(
        model=load(folder), args=args, data_collator=collator(folder), eval_dataset=held_out
    )
    trainer.train()
    measured = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(measured) == 3
    assert measured[0] == plain["eval_loss"]
    quiet = lead(pool).trainer(Trainer)(model=load(folder), args=make_args(max_steps=6), data_collator=collator(folder))
    quiet.train()
    assert losses(quiet) == losses(trainer)  # in the middle of rounds, evaluation changes nothing


def test_batches_that_are_not_what_was_planned_are_refused(make_pool, make_model, make_args, load, collator) -> None:
    folder, pad = make_model(), collator(make_model())

    def cuts(examples: list[dict]) -> dict:
        return {name: value[:, :6] for name, value in pad(examples).items()}

    left = collator(make_model())
    left.tokenizer.padding_side = "left"
    wrong = (
        (cuts, "cut nothing"),
        (lambda rows: pad(rows[::-1]), "keep the order"),
        (lambda rows: pad(rows[:1]), "1 rows of 2"),
        (left, "padding_side = 'right'"),
    )
    for collate, words in wrong:
        make = lead(make_pool(samples=40)).trainer(Trainer)
        with pytest.raises(UserError, match=words):
            make(model=load(folder), args=make_args(max_steps=1), data_collator=collate)
    trainer = lead(make_pool(samples=40)).trainer(Trainer)(
        model=load(folder), args=make_args(max_steps=1), data_collator=pad
    )
    trainer._lead_begin(None)
    trainer.state.max_steps, trainer._lead_running = 4, True
    batches = iter(trainer.get_train_dataloader())
    assert {"lead", "labels"} <= set(next(batches)) & set(next(batches))
    with pytest.raises(RuntimeError, match="before it trained the step in hand"):
        next(batches)


def test_what_cannot_be_right_is_refused(make_pool, make_model, make_args, load, collator, tmp_path) -> None:
    from datasets import Dataset, IterableDataset

    pool, folder, pad = make_pool(samples=40), make_model(), collator(make_model())
    for wrong, words in (
        ({"method": "rescore"}, "only `lead-engine train` does"),
        ({"method": "full"}, "selects nothing"),
        ({"method": "lucky"}, "must be one of lead, iterit"),
        ({"budget": 0.0}, "budget"),
        ({"pool": tmp_path}, "no such file"),
        ({"budget": float("nan")}, "budget=...\\) nan: must be"),
        ({"budget": "some"}, "must be a number"),
        ({"budget": True}, "must be a number"),
        ({"budget": float("inf")}, "1000"),
        ({"budget": "1e9"}, "1000"),
        ({"method": ["lead"]}, "must be text"),
        ({"pool": 3}, "must be a path"),
        ({"pool": ""}, "must be the name"),
        ({"seed": -1}, "between 0"),
        ({"seed": 2**32}, "between 0"),
        ({"seed": "x"}, "a whole number"),
        ({"options": {"round_step": 2}}, "round_step"),
        ({"options": "lead"}, "must be a LeadOptions"),
    ):
        with pytest.raises(UserError, match=words):
            lead(**wrong)
    with pytest.raises(UserError, match="made of transformers' Trainer"):
        lead(pool).trainer(dict)

    class OwnLoss(Trainer):
        def compute_loss(self, *args: object, **kwargs: object):
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(UserError, match="a compute_loss of its own"):
        lead(pool).trainer(OwnLoss)

    def build(**options: object):
        return lead(pool).trainer(Trainer)(
            **{"model": load(folder), "args": make_args(max_steps=1), "data_collator": pad, **options}
        )

    with pytest.raises(UserError, match="compute_loss_func"):
        build(compute_loss_func=lambda *_: None)
    with pytest.raises(UserError, match="model_init"):
        build(model=None, model_init=lambda: load(folder))
    rows = lead(pool).dataset()
    for wrong, words in (
        ({"train": rows}, r"dataset\['train'\]"),
        (rows.select([]), "no rows"),
        ([], "no rows"),
        (Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[5, 6]]}), "row 0 has 3 input_ids and 2 labels"),
        (Dataset.from_dict({"input_ids": [[5, 320]] * 2, "labels": [[5, 6]] * 2}), "for 320 tokens.* token 320"),
    ):
        with pytest.raises(UserError, match=words):
            lead().trainer(Trainer)(
                model=load(folder), args=make_args(max_steps=1), data_collator=pad, train_dataset=wrong
            )
    trainer = lead(budget="1e-6").trainer(Trainer)(
        model=load(folder), args=make_args(), data_collator=pad, train_dataset=rows
    )
    with pytest.raises(UserError, match="the shortest row has more"):
        trainer.train()
    with pytest.raises(UserError, match="a stream"):
        build(train_dataset=IterableDataset.from_generator(lambda: iter([{"input_ids": [1]}])))
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    with pytest.raises(UserError, match="take lm_head out"):
        build(model=get_peft_model(load(folder), LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")))
    with pytest.raises(UserError, match="prompt-learning"):
        build(model=get_peft_model(load(folder), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")))
    mixture = make_model("mixtral", num_local_experts=2, output_router_logits=True)
    with pytest.raises(UserError, match="auxiliary loss"):
        build(model=load(mixture))
    with pytest.raises(UserError, match=r"give lead\(budget=...\) or max_steps"):
        lead().trainer(Trainer)(
            model=load(folder),
            args=make_args(),
            data_collator=pad,
            train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[5, 6, 7]]}),
        )


def test_other_methods_follow_too(make_pool, make_model, make_args, load, collator, engine_rounds) -> None:
    """`random` needs no scores and no estimate; rows may come from any data set with a length, without labels."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    pool, folder = make_pool(), make_model()
    trainer = lead(pool, method="random").trainer(Trainer)(
        model=load(folder), args=make_args(max_steps=4), data_collator=collator(folder)
    )
    trainer.train()
    reports, _ = engine_rounds(pool, folder, rounds=1, method="random")
    assert lines(trainer)[0]["ids"] == reports[0].sample_ids
    assert losses(trainer) == pytest.approx(reports[0].losses, abs=5e-5)

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int) -> dict:
            return {"input_ids": [4 + (i * j) % 200 for j in range(1, 6 + i % 9)]}

    pad = DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained(folder), mlm=False)
    trainer = lead(budget=1.0).trainer(Trainer)(
        model=load(folder), args=make_args(), data_collator=pad, train_dataset=Rows()
    )
    assert trainer.lead_rows.counts.tolist() == [n - 1 for n in trainer.lead_rows.lengths.tolist()]
    trainer.train()
    assert trainer.state.global_step <= trainer.args.max_steps == 5


def test_importing_it_needs_transformers_only() -> None:
    import lead_engine.integrations

    for path in Path(lead_engine.integrations.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import trl" not in text
        assert "from trl" not in text
        assert not [line for line in text.splitlines() if line.startswith(("import datasets", "from datasets"))], path


def test_starts_and_ends_of_rows_are_looked_at(make_model) -> None:
    """Said, for a run may want it so: answers without an end that is learned; no start token, or two of them."""
    import numpy as np
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    from lead_engine.integrations.measure import _measure, complaints

    tokenizer = AutoTokenizer.from_pretrained(make_model())
    end, start = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")

    def said(*rows: list[int], learned: int = 99) -> list[str]:
        tokens, bounds = np.concatenate(rows), np.cumsum([0, *map(len, rows)])
        learn = np.concatenate([np.arange(len(row)) < learned for row in rows])
        return complaints(_measure(tokens, learn, bounds), tokenizer, [7])

    # A line break may stand behind the end; 7 ends a generation by the model's configuration.
    assert said([9, 8, end], [9, 8, end, 10], [9, 8, 7]) == []
    (line,) = said([9, 8, end], [9, end, 8, 9], [5])
    assert "2 of 3 rows (the first: 1) end in no special token" in line
    assert len(said([9, 8, 9, end], learned=3)) == 1  # the end is masked
    tokenizer.bos_token = "<|im_start|>"
    assert said([9, 8, end]) == []  # this tokenizer puts nothing in front
    first_token = {"single": "<|im_start|> $A", "special_tokens": [("<|im_start|>", start)]}
    tokenizer._tokenizer.post_processor = TemplateProcessing(**first_token)
    first, second = said([9, 8, end], [start, 8, end], [start, start, end])
    assert "1 of 3 rows (the first: 0) do not start with '<|im_start|>'" in first
    assert "1 of 3 rows (the first: 2) start twice with" in second
