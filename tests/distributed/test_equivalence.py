"""1 rank x 8 micro-batches = 2 ranks x 4 = 4 ranks x 2, through the real command line; what differs is rounding."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

BASE = [
    "--budget", "0.5", "--batch.capacity", "64", "--batch.micro-batches", "8", "--selection.round-steps", "2",
    "--selection.sketch-dim", "8", "--selection.calibrate-every", "2", "--optimizer.lr", "1e-3", "--runtime.precision", "fp32",
]  # fmt: skip
VARIANTS = {
    "full weights, sketch": [],
    "LoRA, exact": ["--lora.rank", "4", "--selection.inner-form", "exact"],
    "paper, tied embedding": ["--recipe", "paper"],
}


def train(pool: Path, model: Path, out: Path, ranks: int, extra: list[str]) -> tuple[list[dict], list[dict], dict[str, torch.Tensor]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    line = [sys.executable, *launcher, "-m", "lead_engine", "train", "--pool", pool, "--model", model, "--out", out, *BASE, *extra]
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    read = [[json.loads(text) for text in (out / name).read_text().splitlines()] for name in ("metrics.jsonl", "selection.jsonl")]
    weights = next((out / "model").glob("*model.safetensors"))
    return read[0], read[1], load_file(weights)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.timeout(300)
def test_ranks_do_not_matter(variant: str, make_pool, make_model, tmp_path: Path) -> None:
    pool = make_pool(samples=900)
    model = make_model("qwen3" if "tied" in variant else "llama", tie_word_embeddings="tied" in variant)
    one = train(pool, model, tmp_path / "one", 1, VARIANTS[variant])
    two = train(pool, model, tmp_path / "two", 2, VARIANTS[variant])
    assert len(one[0]) >= 8
    assert [line["ids"] for line in one[1]] == [line["ids"] for line in two[1]]
    assert [line["cluster"] for line in one[1]] == [line["cluster"] for line in two[1]]
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("mean_change", 1e-3)):
        np.testing.assert_allclose([line[key] for line in one[0]], [line[key] for line in two[0]], rtol=tolerance, err_msg=key)
    start = load_file(model / "model.safetensors")
    for name, value in one[2].items():
        # Rounding moves a weight by far less than training did. Adam's first steps are +-lr whatever the gradient's size, so a gradient
        # that is nothing but rounding may flip one: the mean tells, the maximum would not.
        moved = (value - start[name]).abs().mean() if name in start else value.abs().mean()
        assert (value - two[2][name]).abs().mean() <= 1e-3 * moved, name


def test_ranks_that_do_not_divide_the_micro_batches_are_refused(make_pool, make_model, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lead_engine", "train"]
    line += ["--pool", str(make_pool(samples=60)), "--model", str(make_model("llama")), "--out", str(tmp_path / "run")]
    done = subprocess.run([*line, "--batch.capacity", "64", "--batch.micro-batches", "3"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "--batch.micro-batches 3: must be a multiple of the 2 ranks" in done.stderr
    assert not (tmp_path / "run").exists()
