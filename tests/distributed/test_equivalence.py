"""One rank with 8 micro-batches equals 2 ranks with 4, down to the trained weights, but for rounding.

Holds for every kind of weights and of estimate.

tests/invariants/test_equivalence_classes.py has the other classes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from runs import fitting

pytestmark = pytest.mark.slow

BASE = [
    "--budget",
    "0.5",
    "--batch.capacity",
    "64",
    "--batch.micro-batches",
    "8",
    "--selection.round-steps",
    "2",
    "--lead.sketch-dim",
    "8",
    "--lead.calibrate-every",
    "2",
    "--optimizer.lr",
    "1e-3",
    "--runtime.precision",
    "fp32",
]
LORA = [
    "--lora.dora",
    "--lora.dropout",
    "0.2",
    "--lora.target-modules",
    "q_proj",
    "v_proj",
    "down_proj",
    "--lora.modules-to-save",
    "lm_head",
]
VARIANTS = {
    "full weights, sketch": [],
    "LoRA, exact": ["--lora.rank", "4", "--lead.sketch-dim", "0", *LORA],
    "paper, tied embedding": ["--recipe", "paper"],
}


def read(out: Path) -> tuple[list[dict], list[dict], dict[str, torch.Tensor]]:
    lines = [
        [json.loads(text) for text in (out / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "selection.jsonl")
    ]
    return lines[0], lines[1], load_file(next((out / "model").glob("*model.safetensors")))


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_do_not_matter(variant: str, run_ranks, make_pool, make_model, tmp_path: Path) -> None:
    pool = make_pool(samples=420)
    model = make_model("qwen3" if "tied" in variant else "llama", tie_word_embeddings="tied" in variant)
    for ranks in (1, 2):
        flags = fitting(BASE, *VARIANTS[variant])
        run_ranks("train", "--pool", pool, "--model", model, "--out", tmp_path / str(ranks), *flags, ranks=ranks)
    one, two = read(tmp_path / "1"), read(tmp_path / "2")
    assert len(one[0]) >= 8
    assert [line["ids"] for line in one[1]] == [line["ids"] for line in two[1]]
    assert [line["cluster"] for line in one[1]] == [line["cluster"] for line in two[1]]
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("mean_change", 1e-3)):
        np.testing.assert_allclose(
            [line[key] for line in one[0]], [line[key] for line in two[0]], rtol=tolerance, err_msg=key
        )
    start = load_file(model / "model.safetensors")
    for name, value in one[2].items():
        # Rounding moves a weight by far less than training did. Adam's first steps are +-lr whatever the gradient's
        # size, so a gradient that is nothing but rounding may flip one: compare the mean, not the maximum.
        moved = (value - start[name]).abs().mean() if name in start else value.abs().mean()
        assert (value - two[2][name]).abs().mean() <= 1e-3 * moved, name


def test_ranks_that_do_not_divide_the_micro_batches_are_refused(
    run_ranks, make_pool, make_model, tmp_path: Path
) -> None:
    options = [
        "--pool",
        make_pool(samples=60),
        "--model",
        make_model("llama"),
        "--out",
        tmp_path / "run",
        "--batch.capacity",
        "64",
    ]
    told = run_ranks("train", *options, "--batch.micro-batches", "3", ranks=2, check=False)
    assert all(told.wait())
    assert "--batch.micro-batches 3: must be a multiple of the 2 ranks" in told.output(0)
    assert not (tmp_path / "run").exists()
