"""A run that is killed and resumed is the run that was never killed, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from runs import OPTIONS, assert_same_run, fitting, kill_after_checkpoint, lines

pytestmark = pytest.mark.slow

MIXTURE = ["--lead.draw", "mixture", "--lead.ranking", "soft", "--lead.unseen", "drift"]
PAPER = ["--recipe", "paper"]
LORA = [
    "--lora.rank",
    "4",
    "--lora.dora",
    "--lora.rslora",
    "--lora.dropout",
    "0.2",
    "--lora.modules-to-save",
    "lm_head",
    "input_layernorm",
]
RUNS = {
    "paper": (1, 260, PAPER),
    "lead on two ranks": (2, 260, []),
    "lead on two ranks, adapters": (2, 260, [*LORA]),
    "mixture, soft, drift": (1, 200, MIXTURE),
    "rescore": (1, 120, ["--method", "rescore"]),
}
"""Ranks, samples, options."""


@pytest.mark.parametrize("which", RUNS)
@pytest.mark.timeout(300)
def test_resumed_twice_is_the_uninterrupted_one(
    which: str, make_pool, make_model, start_ranks, run_ranks, tmp_path: Path
) -> None:
    ranks, samples, options = RUNS[which]
    pool, model = make_pool(samples=samples), make_model("llama")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    arguments = ["train", "--pool", pool, "--model", model, *fitting(OPTIONS, *options)]
    arguments += ["--checkpoint-every", "2", "--keep-checkpoints", "100"]
    run_ranks(*arguments, "--out", whole, ranks=ranks)
    kill_after_checkpoint(start_ranks(*arguments, "--out", parted, ranks=ranks), parted)
    kill_after_checkpoint(start_ranks(*arguments, "--out", parted, "--resume", ranks=ranks), parted, 1)
    run_ranks(*arguments, "--out", parted, "--resume", ranks=ranks)
    assert_same_run(whole, parted)
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (whole, parted))
    assert one["fingerprint"] == two["fingerprint"]
    assert one["rounds"] == two["rounds"] > 4
    assert (one["scoring_seconds"] > 0) == (two["scoring_seconds"] > 0) == (which == "rescore")


@pytest.mark.timeout(300)
def test_checkpoint_of_two_ranks_goes_on_with_one(
    make_pool, make_model, start_ranks, run_ranks, tmp_path: Path
) -> None:
    pool, model = make_pool(samples=260), make_model("llama")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    arguments = ["train", "--pool", pool, "--model", model, *OPTIONS, "--checkpoint-every", "2"]
    run_ranks(*arguments, "--out", whole)
    kill_after_checkpoint(start_ranks(*arguments, "--out", parted, ranks=2), parted)
    run_ranks(*arguments, "--out", parted, "--resume")
    one, two = lines(whole / "metrics.jsonl"), lines(parted / "metrics.jsonl")
    assert [line["tokens"] for line in one] == [line["tokens"] for line in two]
    assert [line["ids"] for line in lines(whole / "selection.jsonl")] == [
        line["ids"] for line in lines(parted / "selection.jsonl")
    ]
    np.testing.assert_allclose([line["loss"] for line in one], [line["loss"] for line in two], rtol=2e-5)


def test_a_run_is_not_overwritten_and_not_resumed_under_other_options(
    make_pool, make_model, run_ranks, tmp_path: Path
) -> None:
    pool, model, out = make_pool(samples=60), make_model("llama"), tmp_path / "run"
    arguments = ["train", "--pool", pool, "--model", model, "--out", out, "--budget", "0.2", "--batch.capacity", "64"]
    arguments += ["--optimizer.lr", "1e-3"]
    run_ranks(*arguments, ranks=0)
    before = (out / "metrics.jsonl").read_bytes()
    again = run_ranks(*arguments, ranks=0, check=False)
    assert again.wait() == [2]
    assert "--resume" in again.output()
    (out / "summary.json").unlink()
    other = run_ranks(*arguments[:-1], "1e-2", "--resume", ranks=0, check=False)
    assert other.wait() == [2]
    assert "optimizer" in other.output()
    assert (out / "metrics.jsonl").read_bytes() == before
