"""Losses and gradients that are not finite: the step is as if it had not been, on all ranks, and its samples are named.

Real sources: rows of the embedding that only one sample's token reaches, NaN (its loss is not finite) or, in a model
whose norms have no epsilon, 1e-19 (the norm makes ones of it, so its loss is finite; 1 / 1e-19^3 in the norm's gradient
is not).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from lead_engine.config import BatchConfig, SelectionConfig, TrainConfig
from lead_engine.selection.methods.lead import LeadOptions
from lead_engine.training.build import TrainingSetup, build
from lead_engine.training.distributed import process_group
from lead_engine.training.rounds import read_header
from runs import OPTIONS, fitting, lines

pytestmark = pytest.mark.slow

NAN_TOKEN, TINY_TOKEN = 310, 311  # in the model's vocabulary, in no sample of make_pool's


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(make_model("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][NAN_TOKEN] = torch.nan
    tensors["model.embed_tokens.weight"][TINY_TOKEN] = 1e-19
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.0}))
    return folder


def poison(pool: Path, token: int, sample: int) -> None:
    """Put a token into the middle of a sample of a pool on disk."""
    offsets, tokens = np.load(pool / "store" / "offsets.npy"), np.load(pool / "store" / "tokens.npy", mmap_mode="r+")
    tokens[(offsets[sample] + offsets[sample + 1]) // 2] = token
    tokens.flush()


# --- one step, and the run without it ---

CHANGES = {
    "inner": {},
    "inner exact": {"sketch_dim": 0},
    "paper": LeadOptions.recipe("paper"),
    "mixture, drift": {"draw": "mixture", "unseen": "drift"},
}


@pytest.fixture
def session(make_pool, model: Path, tmp_path: Path):
    """session(options) -> a Session, newly built, in a group of one."""
    pool = make_pool(samples=120)
    with process_group() as ranks:

        def make(options: dict) -> TrainingSetup:
            read = {} if options.get("loss_change") == "paper" else {"calibrate_every": 1}
            read |= {"sketch_dim": 8} if read else {}
            selection = SelectionConfig(round_steps=3)
            batch = BatchConfig(capacity=64, micro_batches=2)
            return build(
                TrainConfig(
                    pool=pool,
                    model=str(model),
                    out=tmp_path,
                    batch=batch,
                    selection=selection,
                    options={**read, **options},
                ),
                ranks,
            )

        yield make


def play(session: TrainingSetup, poisoned: int | None, token: int, steps: list[int]) -> dict[str, torch.Tensor]:
    """Train some steps of the first round, one of whose samples got `token`; everything that may depend on them."""
    trainer = session.trainer
    plan = trainer.selector.plan(0, 1 << 40)
    header = read_header(plan, trainer.selector)
    if poisoned is not None:
        sample = int(plan.sample_ids[poisoned, 0, 0])
        trainer.store.tokens[(trainer.store.offsets[sample] + trainer.store.offsets[sample + 1]) // 2] = token
    stats = {step: trainer.train_step(plan, header, step, step, 1e-2) for step in steps}
    assert [bool(s.skipped) for s in stats.values()] == [step == poisoned for step in stats]
    round_stats = trainer.selector.learn(plan)
    trainer.loss_change.finish_round(plan.cluster)
    barred = trainer.selector.samples.barred.nonzero().flatten().tolist()
    assert barred == ([sample] if poisoned is not None and token == NAN_TOKEN else [])
    assert torch.equal(round_stats.barred, trainer.selector.samples.barred[plan.sample_ids])
    state = {name: p.detach() for name, p in trainer.model.named_parameters()}
    for name, p in trainer.model.named_parameters():
        state |= {f"{name}.{key}": value for key, value in trainer.optimizer.state[p].items()}
    chosen = {name: value for name, value in trainer.selector.state_dict().items() if name not in ("barred", "open")}
    return (
        state
        | chosen
        | trainer.loss_change.state_dict()
        | {f"round {n}": v for n, v in round_stats._asdict().items() if n != "barred"}
    )


@pytest.mark.parametrize("token", [NAN_TOKEN, TINY_TOKEN])
@pytest.mark.parametrize("change", CHANGES)
def test_a_skipped_step_is_as_if_it_had_not_been(change: str, token: int, session) -> None:
    skipped = play(session(CHANGES[change]), 1, token, [0, 1, 2])
    left_out = play(session(CHANGES[change]), None, token, [0, 2])
    assert skipped.keys() == left_out.keys()
    learned = [
        name for name in skipped if name in ("utility", "ratio_sum", "log_weights", "last", "by_cluster", "cell_sum")
    ]
    assert len(learned) >= 2
    assert all(skipped[name].isfinite().all() for name in learned)
    for name, value in left_out.items():
        whole, other = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (value, skipped[name]))
        assert torch.equal(whole.nan_to_num(7e7), other.nan_to_num(7e7)), name


def test_the_first_step_may_be_the_one(session) -> None:
    """Where the first measurement of the step's true effect is lost, estimates are 0 until the
    next, and none is NaN.
    """
    state = play(session({}), 0, NAN_TOKEN, [0, 1, 2])
    assert bool(state["measured"])
    assert bool(state["utility"].isfinite().all())
    assert int(state["visits"].sum()) > 0


def test_a_loss_that_is_not_finite_is_found_though_every_gradient_is_finite(session) -> None:
    """A head's bias of -inf: p - onehot, and all that follows from it, is finite."""
    trainer = session({}).trainer
    plan = trainer.selector.plan(0, 1 << 40)
    sample = int(plan.sample_ids[0, 0, 0])
    trainer.store.tokens[trainer.store.offsets[sample + 1] - 1] = NAN_TOKEN + 2  # its last token, only ever a target
    bias = torch.zeros(320)
    bias[NAN_TOKEN + 2] = -torch.inf
    trainer.model.head.projection.bias = torch.nn.Parameter(bias, requires_grad=False)
    before = [p.detach().clone() for p in trainer.trained]
    stats = trainer.train_step(plan, read_header(plan, trainer.selector), 0, 0, 1e-2)
    assert bool(stats.skipped)
    assert trainer.selector.samples.barred.nonzero().flatten().tolist() == [sample]
    for old, new in zip(before, trainer.trained, strict=True):
        same = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in (old, new.detach())]
        assert torch.equal(same[0].nan_to_num(7e7), same[1].nan_to_num(7e7))


# --- whole runs ---

RUNS = {
    "lead, 1 rank": (1, []),
    "lead, 2 ranks": (2, []),
    "lead, 2 replicas": (2, ["--runtime.replicate", "2"]),
    "random": (0, ["--method", "random"]),
    "loss": (0, ["--method", "loss"]),
    "iterit": (0, ["--method", "iterit", "--iterit.epochs", "1"]),
}


@pytest.fixture(scope="module")
def pool(make_pool) -> Path:
    folder = make_pool(samples=60)
    table = pq.read_table(folder / "records.parquet").to_pydict()
    poison(folder, NAN_TOKEN, 17)
    assert table["id"][17] == "s17"
    # s17 is planned soon by every method: hard, eligible, and with an IFD below 1.
    from lead_engine.pool.state import PoolState

    state = PoolState.load(folder, 60)
    state.utility[17], state.dropped[17], state.answer_nll[17] = 9.0, False, 9.1
    state.save(folder)
    return folder


@pytest.mark.parametrize("which", RUNS)
def test_one_poisonous_sample_costs_one_step(which: str, pool: Path, model: Path, run_ranks, tmp_path: Path) -> None:
    ranks, options = RUNS[which]
    out = tmp_path / "run"
    done = run_ranks(
        "train",
        "--pool",
        pool,
        "--model",
        model,
        *fitting(OPTIONS, *options, "--budget", "1.5"),
        "--out",
        out,
        ranks=ranks,
    )
    steps, rounds = lines(out / "metrics.jsonl"), lines(out / "selection.jsonl")
    assert sum(line["skipped"] for line in steps) == 1
    assert json.loads((out / "summary.json").read_text())["skipped_steps"] == 1
    assert "1 steps skipped" in done.output(0)
    assert sum(line["ids"].count("s17") for line in rounds) == 1
    bad = next(line for line in steps if line["skipped"])
    assert bad["loss"] is None
    assert bad["grad_norm"] is None
    assert all(line["loss"] > 0 for line in steps if not line["skipped"])
    weights = load_file(out / "model" / "model.safetensors")
    start = load_file(model / "model.safetensors")
    for name, value in weights.items():
        assert torch.equal(value.isfinite(), start[name].isfinite()), name
    with np.load(out / "utility.npz") as saved:
        assert saved["visits"][17] == 0
        assert saved["final"][17] == saved["initial"][17] == 9.0
        assert np.isfinite(saved["final"]).all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_end_the_run_with_the_samples_names(
    ranks: int, make_pool, model: Path, run_ranks, tmp_path: Path
) -> None:
    pool, out = make_pool(samples=60), tmp_path / "run"
    for sample in (20, 40):
        poison(pool, NAN_TOKEN, sample)
    arguments = ["train", "--pool", pool, "--model", model, *fitting(OPTIONS, "--method", "random")]
    arguments += ["--checkpoint-every", "1", "--out", out]
    first = run_ranks(*arguments, "--max-skipped-steps", "0", ranks=ranks, check=False)
    assert first.wait() == [2] * ranks
    told = first.output(0)
    assert "1 steps were skipped" in told
    named = next(name for name in ("s20", "s40") if name in told)
    other = {"s20": "s40", "s40": "s20"}[named]
    assert f"samples {named} (whose own loss was not finite)" in told
    assert other not in told
    assert "loss nan, gradient norm nan" in told
    assert str(pool / "records.parquet") in told
    assert "Traceback" not in first.output()
    for _ in range(2):  # the first was counted before the checkpoint that the second time starts from
        again = run_ranks(*arguments, "--max-skipped-steps", "1", "--resume", ranks=ranks, check=False)
        assert again.wait() == [2] * ranks
        told = again.output(0)
        assert "2 steps were skipped" in told
        assert f"samples {named} (whose" in told
        assert f"samples {other} (whose" in told
    run_ranks(*arguments, "--max-skipped-steps", "2", "--resume", ranks=ranks)


def test_a_gradient_alone_names_all_samples_of_the_step(make_pool, model: Path, run_ranks, tmp_path: Path) -> None:
    pool = make_pool(samples=60)
    poison(pool, TINY_TOKEN, 20)
    arguments = [
        "train",
        "--pool",
        pool,
        "--model",
        model,
        *fitting(OPTIONS, "--method", "random"),
        "--out",
        tmp_path / "run",
    ]
    done = run_ranks(*arguments, "--max-skipped-steps", "0", ranks=0, check=False)
    assert done.wait() == [2]
    told = done.output()
    assert "the gradient (loss" in told
    assert "s20" in told
    assert "each one's own loss was finite" in told
