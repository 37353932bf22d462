"""LEAD inside transformers' Trainer against the engine's own loop: the same samples, the same losses, the same U."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from lead_engine.config import SelectionConfig
from lead_engine.errors import UserError
from lead_engine.integrations import lead

# Padded and packed batches add the same numbers in another order: fp32 losses near 5 agree to about 1e-6 at first, and steps carry that on.
LOSS = {"rtol": 0, "atol": 5e-5}
# dL is a small difference times <G, dtheta> / |Phi|^2, which carries the gradients' rounding.
UTILITY = {"rtol": 0, "atol": 5e-4}


def lines(trainer) -> list[dict]:
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / "selection.jsonl").read_text().splitlines()]


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("options", [SelectionConfig(), SelectionConfig(inner_form="exact", calibrate_every=3, unseen="drift")])
def test_rounds_losses_and_utility_are_the_engines(make_pool, make_model, make_args, load, collator, engine_rounds, options) -> None:
    pool, model = make_pool(), make_model()
    selection = lead(pool, options=options)
    args = make_args(max_steps=10)  # two rounds of four steps, and half of a third
    trainer = selection.trainer(Trainer)(model=load(model), args=args, data_collator=collator(model))
    trainer.train()
    reports, selector = engine_rounds(pool, model, selection=options, rounds=3)
    ours = lines(trainer)
    assert [line["ids"] for line in ours[:2]] == [report.sample_ids for report in reports[:2]]
    assert ours[2]["ids"] == reports[2].sample_ids[:2]
    expected = [loss for report in reports for loss in report.losses][:10]
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(expected), **LOSS)
    assert [line["reward"] for line in ours[:2]] == pytest.approx([report.reward for report in reports[:2]], abs=5e-3)
    own, trained = trainer.lead_rounds.selector.samples, trainer.lead_rounds.selector.samples.visits
    whole = (trained > 0) & (trained == selector.samples.visits)  # not those of the engine's last two steps
    assert whole.sum() > 40
    torch.testing.assert_close(own.utility[whole], selector.samples.utility[whole], **UTILITY)
    assert trainer.state.log_history[-2]["lead_tokens"] == sum(line["tokens"] for line in ours)


def test_the_budget_is_the_engines_and_the_last_step_may_be_short(make_pool, make_model, make_args, load, collator, engine_rounds) -> None:
    pool, model = make_pool(), make_model()
    trainer = lead(pool, budget=0.33).trainer(Trainer)(model=load(model), args=make_args(max_steps=1000), data_collator=collator(model))
    trainer.train()
    reports, _ = engine_rounds(pool, model, budget=0.33)
    assert [line["ids"] for line in lines(trainer)] == [report.sample_ids for report in reports]
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor([x for report in reports for x in report.losses]), **LOSS)
    assert len(reports[-1].sample_ids[-1]) not in (0, 8)
    assert trainer.state.global_step < 1000


def test_steps_follow_from_the_budget(make_pool, make_model, make_args, load, collator) -> None:
    make = lead(make_pool(), budget=0.2).trainer(Trainer)
    trainer = make(model=load(make_model()), args=make_args(), data_collator=collator(make_model()))
    assert trainer.args.max_steps == 200 * 0.2 / 8
    with pytest.raises(UserError, match="max_steps"):
        lead(make_pool()).trainer(Trainer)(model=load(make_model()), args=make_args(), data_collator=collator(make_model()))
