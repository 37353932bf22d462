"""Several ranks, and a run that goes on from a checkpoint, also in the middle of a round."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from lead_engine.base.errors import UserError
from lead_engine.integrations import lead
from lead_engine.integrations.rounds import FILE
from lead_engine.pool.state import PoolState
from needs import TRAINERS
from trainer_rank import train

pytestmark = [pytest.mark.slow, TRAINERS]


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("pool_given", [True, False], ids=["pool", "rows scored by both ranks"])
def test_two_ranks_are_one_with_twice_the_accumulation(
    make_pool, make_model, make_args, load, collator, tmp_path, pool_given
) -> None:
    pool, model = make_pool(), make_model()
    steps, budget = (
        (9, None) if pool_given else (100, 0.29)
    )  # a budget that ends with a step too short for the second rank
    # The paper's change from exact gradients shows their scale, which DDP's mean over ranks would change; `inner`, a
    # ratio, would not.
    chosen = {"loss_change": "paper", "sketch_dim": 0, "draw": "cluster"} if pool_given else {}
    one = lead(pool if pool_given else None, budget, options=chosen).trainer(Trainer)(
        model=load(model),
        args=make_args(max_steps=steps, gradient_accumulation_steps=4),
        data_collator=collator(model),
        train_dataset=lead(pool).dataset(),
    )
    one.train()
    *_, last = [json.loads(line) for line in (Path(one.args.output_dir) / "selection.jsonl").read_text().splitlines()]
    assert len(last["ids"][-1]) == 16 if pool_given else 0 < len(last["ids"][-1]) <= 8
    options = make_args(max_steps=steps, gradient_accumulation_steps=2).to_dict()
    wanted = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_type",
        "adam_beta2",
        "optim",
        "weight_decay",
        "max_grad_norm",
        "logging_steps",
        "report_to",
        "seed",
        "disable_tqdm",
        "use_cpu",
        "max_steps",
        "logging_nan_inf_filter",
    )
    options = {name: options[name] for name in wanted} | {
        "ddp_backend": "gloo",
        "save_strategy": "steps",
        "save_steps": 6,
    }
    first, second = train(pool, model, tmp_path, options, score=not pool_given, budget=budget, selection=chosen)
    assert first["utility"] == second["utility"]  # bit for bit
    assert first["visits"] == second["visits"]
    assert first["weights"] == second["weights"]
    samples = one.lead_rounds.selector.samples
    assert first["visits"] == samples.visits.tolist()
    torch.testing.assert_close(torch.tensor(first["losses"]), torch.tensor(losses(one)), rtol=0, atol=5e-5)
    torch.testing.assert_close(
        torch.tensor(first["utility"]), samples.utility, rtol=0, atol=5e-5 if pool_given else 5e-4
    )
    if not pool_given:
        return
    (tmp_path / "rank0.json").unlink()
    again = train(pool, model, tmp_path, options, selection=chosen, resume=str(tmp_path / "checkpoint-6"))
    assert again[0]["utility"] == again[1]["utility"]
    assert again[0]["losses"] == first["losses"]
    assert again[0]["utility"] == first["utility"]
    assert again[0]["weights"] == first["weights"]


def test_a_resumed_run_is_the_run_bit_for_bit(make_pool, make_model, make_args, load, collator, tmp_path) -> None:
    """Checkpoints at steps 6 (two steps into the second round) and 8 (between two rounds), both in the midst of the
    second epoch, which ends at step 10 as it would have.
    """
    pool, model = make_pool(samples=40), make_model()
    selection = lead(pool, options={"calibrate_every": 3, "unseen": "drift"})

    class Epochs(TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            ends.append((state.global_step, state.epoch))

    def make(out: Path, **options: object):
        args = make_args(
            output_dir=str(out),
            max_steps=13,
            save_strategy="steps",
            save_steps=2,
            lr_scheduler_type="cosine",
            **options,
        )
        pad = collator(model)
        return selection.trainer(Trainer)(model=load(model), args=args, data_collator=pad, callbacks=[Epochs()])

    ends: list[tuple[int, float]] = []

    whole = make(tmp_path / "whole")
    whole.train()
    assert ends == [(5, 1.0), (10, 2.0), (13, pytest.approx(2.6))]
    log = (tmp_path / "whole" / "selection.jsonl").read_text()
    for step in (6, 8):
        resumed = make(tmp_path / f"from {step}")
        Path(resumed.args.output_dir).mkdir(exist_ok=True)
        (Path(resumed.args.output_dir) / "selection.jsonl").write_text(
            log
        )  # what a killed run leaves: more than its checkpoint
        ends.clear()
        resumed.train(resume_from_checkpoint=tmp_path / "whole" / f"checkpoint-{step}")
        assert ends == [(10, 2.0), (13, pytest.approx(2.6))]
        assert losses(resumed) == losses(whole)
        epochs = [[line["epoch"] for line in trainer.state.log_history] for trainer in (resumed, whole)]
        assert epochs[0] == pytest.approx(epochs[1])
        for name, value in whole.lead_rounds.selector.state_dict().items():
            assert torch.equal(resumed.lead_rounds.selector.state_dict()[name], value), name
        for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(p, q), name
        assert (Path(resumed.args.output_dir) / "selection.jsonl").read_text() == log
    rounds = [json.loads(line) for line in log.splitlines()]
    assert [line["round"] for line in rounds] == [0, 1, 2, 3]
    assert [len(line["ids"]) for line in rounds] == [4, 4, 4, 1]


def test_checkpoints_of_other_runs_are_refused(make_pool, make_model, make_args, load, collator, tmp_path) -> None:
    pool, model = make_pool(samples=60), make_model()

    def make(selection, out: Path = tmp_path, rows=None, **options: object):
        args = make_args(output_dir=str(out), max_steps=4, save_strategy="steps", save_steps=2, **options)
        pad = collator(model)
        return selection.trainer(Trainer)(model=load(model), args=args, data_collator=pad, train_dataset=rows)

    with pytest.raises(UserError, match=r"no checkpoint-\* folder in .*; leave it out to start anew"):
        make(lead(pool)).train(resume_from_checkpoint=True)
    not_there = {"no such folder": tmp_path / "nowhere", "no trainer_state.json": tmp_path, "True for the last": 3}
    for words, wrong in not_there.items():
        with pytest.raises(UserError, match=words):
            make(lead(pool)).train(resume_from_checkpoint=wrong)
    make(lead(pool)).train()
    checkpoint = tmp_path / "checkpoint-2"
    # A pool prepared anew under the same name: other scores of the same tokens. A data set of other tokens, as long.
    scores = PoolState.load(pool)
    replace(scores, utility=scores.utility.flip(0)).save(pool)
    with pytest.raises(UserError, match="hash of their scores"):
        make(lead(pool)).train(resume_from_checkpoint=checkpoint)
    scores.save(pool)
    rows = lead(pool).dataset()
    changed = rows.map(lambda row: {**row, "input_ids": [row["input_ids"][0] ^ 1, *row["input_ids"][1:]]})
    with pytest.raises(UserError, match=r"row 0 has other tokens.* \d+ to learn, in both"):
        make(lead(pool), rows=changed)
    make(lead(), tmp_path / "own", rows=rows).train()
    own = tmp_path / "own" / "checkpoint-2"
    with pytest.raises(UserError, match="hash of all rows"):
        make(lead(), tmp_path / "own", rows=changed).train(resume_from_checkpoint=own)
    with pytest.raises(
        UserError, match=r"checkpoint-2: the run began with 60 rows, train_dataset has 59; give the rows"
    ):
        make(lead(), tmp_path / "own", rows=rows.select(range(59))).train(resume_from_checkpoint=own)
    moved = make(lead(), tmp_path / "moved", rows=rows)
    moved.train(resume_from_checkpoint=own)  # from another folder: the scores lie beside the checkpoint
    assert (tmp_path / "moved" / "lead_scores" / "state.json").exists()
    with pytest.raises(UserError, match="layout"):
        make(lead(pool), gradient_accumulation_steps=1).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(UserError, match="method = lead, now it is random"):
        make(lead(pool, method="random")).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / FILE).write_bytes((checkpoint / FILE).read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        make(lead(pool)).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / FILE).unlink()
    (tmp_path / "checkpoint-4" / FILE).rename(tmp_path / "aside")
    for plain in (str(checkpoint), True):  # as the trainer without LEAD leaves them
        with pytest.raises(UserError, match=r"checkpoint-\d: no lead_.* run with lead.* train without resume_from"):
            make(lead(pool)).train(resume_from_checkpoint=plain)
    (tmp_path / "aside").rename(tmp_path / "checkpoint-4" / FILE)
    again = make(lead(pool))
    again.train(resume_from_checkpoint=True)  # the last one, of step 4, is whole: nothing is left to do
    assert again.state.global_step == 4
