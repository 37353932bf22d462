"""LEAD inside TRL's SFTTrainer: losses by TRL's own path, by the engine's; and what TRL's preparation does to rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lead_engine.base.errors import UserError
from lead_engine.integrations import lead
from needs import TRAINERS

pytestmark = [pytest.mark.slow, TRAINERS]

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


@pytest.fixture(scope="module")
def records() -> Dataset:
    rows = [
        {
            "prompt": f"say {' '.join(WORDS[i % 8 :])} {i} ",
            "completion": " ".join(WORDS[: 1 + i % 7]),
            "dataset": ["a", "b"][i % 2],
        }
        for i in range(60)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def make_trainer(make_model, make_args, load):
    def make(
        selection: Any,
        dataset: Any = None,
        *,
        attention: str = "sdpa",
        model: Any = None,
        peft: Any = None,
        **options: Any,
    ) -> Any:
        folder = make_model()
        plain = {"bf16": False, "gradient_checkpointing": False, "max_steps": 4, "max_length": None}
        return selection.trainer(SFTTrainer)(
            model=model or load(folder, attn_implementation=attention),
            args=make_args(SFTConfig, **{**plain, **options}),
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=peft,
        )

    return make


def head_of(trainer: Any, ids: list[int]) -> Any:
    """What our loss path makes of these rows under the model as it is."""
    batch = trainer._prepare_inputs(trainer.lead_rows.batch(ids))
    with torch.no_grad():
        trainer.model.eval()
        return trainer.compute_loss(trainer.model, batch, return_outputs=True)[1], batch


@pytest.mark.parametrize("options", [{}, {"padding_free": True}], ids=["padded", "padding-free"])
def test_completion_only_losses_are_trls_own(make_trainer, records, options) -> None:
    trainer = make_trainer(lead(), records, **options)
    trainer._lead_begin(None)
    rounds = trainer.lead_rounds
    assert rounds.ahead()
    ids = rounds.ids(0)
    head, batch = head_of(trainer, ids)
    rows = rounds.response_tokens  # of both micro-batches
    inputs = {name: value for name, value in batch.items() if name != "lead"}
    assert 0 < rows < sum(trainer.lead_rows.lengths[ids]) * 2 - 8 * 2  # prompts are not learned
    with torch.no_grad():
        theirs = trainer.model(**inputs, fused_lm_head=True)
        loss = SFTTrainer.compute_loss(trainer, trainer.model, dict(inputs), num_items_in_batch=torch.tensor(rows))
    log_probs = theirs.log_probs.flatten()
    if options:
        starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), batch["position_ids"].shape[1]]
    else:
        starts = [i * (batch["labels"].shape[1] - 1) for i in range(len(ids) + 1)]
    expected = [
        -log_probs[a:b].sum() / trainer.lead_rows.counts[i]
        for i, a, b in zip(ids, starts[:-1], starts[1:], strict=True)
    ]
    torch.testing.assert_close(head.sample_nll, torch.stack(expected), rtol=0, atol=5e-6)
    assert head.sample_tokens.tolist() == trainer.lead_rows.counts[ids].tolist()
    torch.testing.assert_close(head.loss, loss, rtol=0, atol=5e-6)
    torch.testing.assert_close(head.entropy.sum(), theirs.entropy.sum(), rtol=1e-5, atol=0)
    assert int((head.predicted == batch["lead"]["targets"]).sum()) == int(theirs.is_top1.sum())
    trainer.train()
    (first, *_) = trainer.state.log_history
    assert 0 <= first["mean_token_accuracy"] < 0.5
    assert first["entropy"] == pytest.approx(float(theirs.entropy.sum() / head.sample_tokens.sum()), rel=0.1)


def test_losses_are_the_engines(make_trainer, make_pool, make_model, engine_rounds) -> None:
    """Through TRL, on the pool's own tokens; padded, and flattened without padding."""
    pool, model = make_pool(), make_model()
    reports, selector = engine_rounds(pool, model, rounds=2)
    for options in ({"shuffle_dataset": True, "gradient_checkpointing": True}, {"padding_free": True}):
        trainer = make_trainer(lead(pool), max_steps=8, **options)
        trainer.train()
        log = [
            json.loads(line) for line in (Path(trainer.args.output_dir) / "selection.jsonl").read_text().splitlines()
        ]
        assert [line["ids"] for line in log] == [report.sample_ids for report in reports], options
        ours = torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])
        torch.testing.assert_close(
            ours, torch.tensor([x for report in reports for x in report.losses]), rtol=0, atol=5e-5
        )
        torch.testing.assert_close(
            trainer.lead_rounds.selector.samples.utility, selector.samples.utility, rtol=0, atol=5e-4
        )


def test_a_model_with_adapters(make_trainer, make_pool) -> None:
    """peft's own wrapper; B is 0 at first, so the first loss is the base's, and only adapters move."""
    from peft import LoraConfig

    pool = make_pool()
    whole = make_trainer(lead(pool), max_steps=1)
    whole.train()
    trainer = make_trainer(
        lead(pool), max_steps=6, peft=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    first, *_ = (line["loss"] for line in trainer.state.log_history if "loss" in line)
    assert first == pytest.approx(whole.state.log_history[0]["loss"], abs=1e-6)
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    visited = trainer.lead_rounds.selector.samples.visits > 0
    assert not torch.equal(
        trainer.lead_rounds.selector.samples.utility[visited][:-1], lead(pool).state().utility[visited[:-1]]
    )
    with pytest.raises(ValueError, match="lm_head"):  # TRL's own
        make_trainer(lead(pool), peft=LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"))

    copied = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trainer = make_trainer(lead(pool), max_steps=2, peft=copied)
    head = trainer.model.base_model.model.lm_head
    before = head.original_module.weight.detach().clone()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(first, abs=1e-6)
    assert torch.equal(head.original_module.weight, before)
    assert not torch.equal(head.modules_to_save["default"].weight, before)


def test_rows_are_scored_where_there_is_no_pool(make_trainer, records, make_model) -> None:
    trainer = make_trainer(lead(budget=0.6, round_steps=2), records, max_steps=-1)
    assert trainer.args.max_steps == 4  # 0.6 x 60 rows at 8 a step, rounded
    trainer.train()
    from lead_engine.pool.state import PoolState

    state = PoolState.load(Path(trainer.args.output_dir) / "lead_scores")
    assert state.task_names == ["a", "b"]
    assert state.task.tolist() == [i % 2 for i in range(60)]
    fresh = make_trainer(lead(), records)
    fresh._lead_begin(None)
    assert fresh.lead_rounds.ahead()
    head, _ = head_of(fresh, [3, 17, 40])
    torch.testing.assert_close(state.utility[[3, 17, 40]], head.sample_nll[:3], rtol=0, atol=1e-5)
    visits = trainer.lead_rounds.selector.samples.visits[:-1]
    assert int(visits.sum()) in range(24, 33)
    lengths = trainer.lead_rows.lengths
    assert int((visits * lengths).sum()) == trainer.lead_rounds.tokens <= 0.6 * int(lengths.sum())


def test_a_row_with_nothing_to_learn_is_named_and_never_a_silent_zero(make_trainer, make_pool, records) -> None:
    """trl #6668: labels that are all -100 train as a loss of 0, and nobody is told."""
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [5, 6, 7, 8]], "labels": [[-100, 6, 7], [5, -100, -100, -100]]})
    with pytest.raises(UserError, match="row 1 has no token to learn"):
        make_trainer(lead(), rows)
    # max_length cuts answers off, and TRL then drops such rows: an error with a pool, which counts on them.
    pool = make_pool(samples=60)
    with pytest.raises(UserError, match=r"the trainer left out row \d+"):
        make_trainer(lead(pool), records, max_length=12)
    trainer = make_trainer(lead(), records, max_length=40)
    assert len(trainer.lead_rows.lengths) <= 60
    assert (trainer.lead_rows.counts > 0).all()


def test_samples_that_see_each_other_are_refused(make_trainer, make_pool) -> None:
    """trl #3910, transformers #46634: an attention that knows no mask lets flattened samples read one another."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("without_masks", sdpa_attention_forward)
    pool = make_pool(samples=60)
    with pytest.raises(UserError, match="samples see each other"):
        make_trainer(lead(pool), attention="without_masks", padding_free=True).train()
    make_trainer(lead(pool), attention="eager", padding_free=True, max_steps=1).train()


def test_rows_that_are_not_the_pools_are_named(make_trainer, make_pool) -> None:
    pool = make_pool(samples=30)
    rows = lead(pool).dataset().to_list()
    with pytest.raises(UserError, match="29 rows, but the pool has 30"):
        make_trainer(lead(pool), Dataset.from_list(rows[:-1]))
    rows[7]["labels"][-1] = -100
    with pytest.raises(UserError, match="row 7 has"):
        make_trainer(lead(pool), Dataset.from_list(rows))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"packing": True, "max_length": 64}, "packing"),
        ({"use_liger_kernel": True}, "Liger"),
        ({"train_sampling_strategy": "group_by_length"}, "order of samples"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"optim": "galore_adamw_layerwise"}, "steps while it goes backward"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches"),
    ],
)
def test_what_cannot_be_right_is_refused(make_trainer, make_pool, options, words) -> None:
    with pytest.raises(UserError, match=words):
        make_trainer(lead(make_pool(samples=30)), **options)


def test_trainers_with_another_loss_are_refused() -> None:
    from trl import DPOTrainer

    with pytest.raises(UserError, match="a compute_loss of its own"):
        lead(budget=0.1).trainer(DPOTrainer)
