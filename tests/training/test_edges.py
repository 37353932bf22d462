"""Pools, budgets and vocabularies at the edge of what makes sense, through the command line: each run ends well, and
says what was odd.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from runs import OPTIONS, fitting, lines

pytestmark = pytest.mark.slow


def without_answers(pool: Path, samples: slice) -> Path:
    """Take every response token from some samples of a pool on disk."""
    store = pool / "store"
    offsets = np.load(store / "offsets.npy")
    response, rows = (np.load(store / f"{name}.npy", mmap_mode="r+") for name in ("response", "response_rows"))
    for sample in range(len(rows))[samples]:
        response[offsets[sample] : offsets[sample + 1]] = False
        rows[sample] = 0
    response.flush(), rows.flush()
    meta = json.loads((store / "meta.json").read_text())
    (store / "meta.json").write_text(json.dumps({**meta, "num_response_rows": int(rows.sum())}))
    return pool


@pytest.fixture
def run(make_model, run_ranks, tmp_path: Path):
    """run(pool, *options, ranks) -> (steps of metrics.jsonl, output, folder)."""

    def train(pool: Path, *options: str, ranks: int = 2, model: Path | None = None) -> tuple[list[dict], str, Path]:
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        flags = fitting(OPTIONS, *options)
        told = run_ranks(
            "train", "--pool", pool, "--model", model or make_model("llama"), *flags, "--out", out, ranks=ranks
        )
        steps = lines(out / "metrics.jsonl")
        assert not any(line["skipped"] for line in steps)
        assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in steps)
        for name, value in load_file(out / "model" / "model.safetensors").items():
            assert value.isfinite().all(), name
        return steps, told.output(0), out

    return train


@pytest.mark.parametrize("method", ["lead", "random"])
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_pool_of_one_sample(method: str, ranks: int, make_pool, run) -> None:
    steps, _, out = run(make_pool(samples=1), "--method", method, "--budget", "3", ranks=ranks)
    assert [line["step_samples"] for line in steps] == [1, 1, 1]
    assert json.loads((out / "summary.json").read_text())["samples_trained"] == 3


def test_a_pool_smaller_than_a_batch(make_pool, run) -> None:
    steps, _, _ = run(make_pool(samples=3), "--batch.micro-batches", "8", "--budget", "2", "--method", "random")
    assert {line["step_samples"] for line in steps} <= {1, 2, 3}
    assert sum(line["step_samples"] for line in steps) == 6


def test_a_budget_smaller_than_any_sample(make_pool, run) -> None:
    steps, told, out = run(make_pool(samples=20), "--budget", "0.001")
    assert steps == []
    assert "nothing was trained: --budget 0.001 (" in told
    assert "the shortest sample has" in told
    assert json.loads((out / "summary.json").read_text())["steps"] == 0


@pytest.mark.parametrize("which", ["lead", "random", "paper", "exact"])
def test_steps_without_a_response_token(which: str, make_pool, run) -> None:
    """A third of the samples have no answer, and a step takes one or two: whole steps have none. Their loss is 0."""
    options = {
        "lead": [],
        "random": ["--method", "random"],
        "paper": ["--recipe", "paper"],
        "exact": ["--lead.sketch-dim", "0"],
    }
    pool = without_answers(make_pool(samples=40), slice(None, None, 3))
    steps, _, _ = run(pool, *options[which], "--batch.capacity", "41", "--budget", "1.5")
    empty = [line for line in steps if line["loss"] == 0]
    assert all(line["grad_norm"] == 0 for line in empty)
    assert 0 < len(empty) < len(steps)


def test_a_pool_without_any_answer(make_pool, run) -> None:
    steps, _, _ = run(without_answers(make_pool(samples=20), slice(None)))
    assert steps
    assert all(line["loss"] == 0 for line in steps)


def test_a_vocabulary_that_the_ranks_do_not_divide(make_pool, make_model, run) -> None:
    pool, model = make_pool(samples=60), make_model("llama", vocab_size=323)
    one, _, folder = run(pool, ranks=0, model=model)
    two, _, other = run(pool, ranks=2, model=model)
    np.testing.assert_allclose([line["loss"] for line in one], [line["loss"] for line in two], rtol=2e-5)
    a, b = (load_file(out / "model" / "model.safetensors") for out in (folder, other))
    assert a["lm_head.weight"].shape == b["lm_head.weight"].shape == (323, 32)
    moved = (a["lm_head.weight"] - load_file(model / "model.safetensors")["lm_head.weight"]).abs().max()
    assert torch.dist(a["lm_head.weight"], b["lm_head.weight"], torch.inf) < 1e-2 * moved
