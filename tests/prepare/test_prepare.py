"""prepare through the real command line: scores against a plain forward pass, resumption, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from lead_engine.base.errors import UserError
from lead_engine.config import PrepareConfig
from lead_engine.pool.state import PoolState
from lead_engine.pool.store import TokenStore
from lead_engine.prepare import run as prepare_here

pytestmark = pytest.mark.slow

OPTIONS = [
    "--max-length",
    "64",
    "--clusters",
    "3",
    "--batch.capacity",
    "128",
    "--runtime.precision",
    "fp32",
    "--warmup-share",
    "0",
]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "pool.jsonl"
    words = ["a", "few", "words", "are", "enough", "for", "merges"]
    with path.open("w") as file:
        for i in range(120):
            answer = " ".join(words[: 1 + i % 5]) + f" {i}"
            record = {"id": f"r{i}", "dataset": "ab"[i % 2], "instruction": f"{words[i % 7]} {i}", "output": answer}
            file.write(json.dumps(record) + "\n")
    return path


def prepare(run_cli, records: Path, model: Path, out: Path, *more: str):
    return run_cli("prepare", "--pool", records, "--model", model, "--out", out, *OPTIONS, *more)


def test_scores_are_those_of_a_plain_forward_pass(run_cli, records: Path, make_model, tmp_path: Path) -> None:
    model, out = make_model("llama"), tmp_path / "prepared"
    done = prepare(run_cli, records, model, out)
    assert done.returncode == 0, done.stderr
    store = TokenStore.open(out / "store")
    state = PoolState.load(out, store.num_samples)
    hf = AutoModelForCausalLM.from_pretrained(model)

    def loss(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            nll = torch.nn.functional.cross_entropy(hf(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
        return nll[mask[1:]].mean()

    prompt = [int(t) for t in store.tokens[: int(store.offsets[1])]]
    answer_start = store.response[: int(store.offsets[1])].int().argmax()
    request = None
    for i in range(0, 120, 17):
        low, high = int(store.offsets[i]), int(store.offsets[i + 1])
        tokens, mask = store.tokens[low:high].long(), store.response[low:high]
        given = loss(tokens, mask)
        torch.testing.assert_close(state.utility[i], given, rtol=1e-5, atol=1e-5)
        if (
            request is None
        ):  # the template's request for an answer: what stands between the question and the first response token
            from lead_engine.model.load import load_tokenizer
            from lead_engine.pool.tokenizer import generation_prompt_ids

            request = generation_prompt_ids(load_tokenizer(out / "tokenizer"))
            assert prompt[int(answer_start) - len(request) : int(answer_start)] == request
        alone_tokens = torch.cat([torch.tensor(request), tokens[mask]])
        alone = loss(alone_tokens, torch.arange(len(alone_tokens)) >= len(request))
        torch.testing.assert_close(state.difficulty[i], given / alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(state.dropped, state.difficulty >= 1)
    assert state.task_names == ["a", "b"]
    assert pq.read_table(out / "records.parquet").column("id").to_pylist() == [f"r{i}" for i in range(120)]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["dropped_misaligned"] == int(state.dropped.sum())
    assert sum(row["samples"] for row in summary["clusters"]) == int((~state.dropped).sum())
    assert "Difficulty clusters" in done.stdout
    assert not (out / "stages").exists()


@pytest.mark.timeout(240)
def test_killed_and_run_again_gives_the_same(run_cli, records: Path, make_model, tmp_path: Path) -> None:
    model, whole, parted = make_model("llama"), tmp_path / "whole", tmp_path / "parted"
    assert prepare(run_cli, records, model, whole, "--warmup-share", "0.1").returncode == 0
    line = [sys.executable, "-m", "lead_engine", "prepare", "--pool", records, "--model", model, "--out", parted]
    line += [*OPTIONS, "--warmup-share", "0.1"]
    process = subprocess.Popen(
        [str(part) for part in line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(parted.glob("stages/base/*.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    scored = next(parted.glob("stages/base/*.safetensors"))
    before = scored.stat().st_mtime_ns
    again = prepare(run_cli, records, model, parted, "--warmup-share", "0.1")
    assert again.returncode == 0, again.stderr
    assert not scored.exists() or scored.stat().st_mtime_ns == before
    a, b = PoolState.load(whole), PoolState.load(parted)
    for name in ("utility", "difficulty", "cluster", "task", "dropped"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_other_options_are_refused_and_nothing_is_lost(run_cli, records: Path, make_model, tmp_path: Path) -> None:
    model, out = make_model("llama"), tmp_path / "prepared"
    assert prepare(run_cli, records, model, out).returncode == 0
    before = (out / "state.safetensors").read_bytes()
    other = prepare(run_cli, records, model, out, "--seed", "5")
    assert other.returncode == 2
    assert "prepared with other options" in other.stderr
    assert (out / "state.safetensors").read_bytes() == before
    same = prepare(run_cli, records, model, out)
    assert same.returncode == 0
    assert "already prepared" in same.stdout


def test_a_bad_pool_leaves_nothing_behind(run_cli, make_model, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"instruction": "x", "output": "y"}\n{"instruction": "\xff", "output": "z"}\n')
    done = prepare(run_cli, bad, make_model("llama"), tmp_path / "prepared")
    assert done.returncode == 2
    assert "bad.jsonl:2" in done.stderr
    assert "--skip-bad" in done.stderr
    assert not (tmp_path / "prepared").exists()


def test_topics_beside_named_tasks_are_refused(records: Path, make_model, tmp_path: Path) -> None:
    """One record that names its `dataset` is enough for names to count; --tasks would be ignored."""
    mixed = tmp_path / "mixed.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    mixed.write_text(
        "".join(json.dumps({**line, "dataset": "a" if i == 7 else ""}) + "\n" for i, line in enumerate(lines))
    )
    config = PrepareConfig(pool=(str(mixed),), model=str(make_model("llama")), out=tmp_path / "P", tasks=3)
    with pytest.raises(UserError, match=r"--tasks 3: 1 of 120 records name .*mixed\.jsonl, line 8 .*leave --tasks out"):
        prepare_here(config)
    assert not config.out.exists()


def test_what_its_warm_up_would_refuse_is_refused_at_once(run_ranks, records: Path, make_model, tmp_path: Path) -> None:
    more = ["--warmup-share", "0.1", "--runtime.replicate", "2"]
    ended = run_ranks(
        "prepare", "--pool", records, "--model", make_model(), "--out", tmp_path / "pool", *OPTIONS, *more, check=False
    )
    assert "--runtime.replicate 2: 1 ranks cannot be parted" in ended.output()
    assert not (tmp_path / "pool").exists()
