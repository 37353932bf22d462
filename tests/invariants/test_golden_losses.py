"""The losses of every step and the samples of every round, through the real command line, are those written down in
golden_losses.json.

Other tests compare two forms of the same thing, and pass when both change. This one notices any change of the numbers:
of the model's passes, the optimizer, the schedule, packing, the selection or its estimates. A change that was meant is
written anew with

    LEAD_GOLDEN=write python -m pytest tests/invariants/test_golden_losses.py

and the commit says why the numbers moved. Numbers are fp32 on a CPU. Ids must be equal; losses and gradient norms to
1e-5 of their size, as other machines and versions of torch add in another order. Measured over these runs between
AVX-512, AVX2 and plain C++ kernels: 1.6e-7 in losses, 1.4e-6 in norms. A learning rate that is 1 % off moves them by
1e-4 and more.

Model, pool and utilities are functions of integers alone (a hash written out below), so that no library's random stream
is in the file, but for two that the engine itself draws from torch: the sketch's projections and the adapters' A.
`stream` tells when that is what changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lead_engine.pool.state import PoolState
from lead_engine.pool.store import TokenStore
from lead_engine.pool.tokenizer import train_tokenizer
from lead_engine.prepare.tokenise import write_answers
from runs import fitting

pytestmark = pytest.mark.slow

FILE = Path(__file__).with_name("golden_losses.json")
WRITES = os.environ.get("LEAD_GOLDEN") == "write"
TOLERANCE = 1e-5
SAMPLES, VOCAB, TASKS, CLUSTERS = 400, 320, ["chat", "code", "maths"], 3

COMMON = [
    "--budget",
    "0.3",
    "--batch.capacity",
    "96",
    "--batch.micro-batches",
    "2",
    "--batch.slots",
    "12",
    "--selection.round-steps",
    "2",
    "--lead.sketch-dim",
    "8",
    "--lead.calibrate-every",
    "3",
    "--optimizer.lr",
    "2e-3",
    "--optimizer.weight-decay",
    "0.1",
    "--runtime.precision",
    "fp32",
]
RUNS: dict[str, tuple[int, list[str]]] = {
    "lead": (0, []),
    "lead, two ranks": (2, []),
    "lead --recipe paper": (0, ["--recipe", "paper"]),
    "lead, LoRA, exact": (0, ["--lora.rank", "4", "--lead.sketch-dim", "0"]),
    "lead, drift": (0, ["--lead.unseen", "drift"]),
    "random": (0, ["--method", "random"]),
    "rescore": (0, ["--method", "rescore", "--budget", "0.2"]),
}
"""Ranks (0: without torchrun's environment) and options."""
SHARED = {"lead, two ranks": "lead"}
"""Runs that have no numbers of their own: the number of ranks must not matter."""


# --- numbers from integers: SplitMix64 over (stream, place), in NumPy's unsigned arithmetic ---


def bits(stream: int, count: int) -> np.ndarray:
    """uint64 [count]."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream << 40)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(stream: int, count: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """fp32 [count] in [low, high)."""
    return (low + (high - low) * (bits(stream, count) >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(
        np.float32
    )


def below(stream: int, count: int, limit: int) -> np.ndarray:
    """int64 [count] in [0, limit)."""
    return (bits(stream, count) % np.uint64(limit)).astype(np.int64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks whose weights are hashes of their places."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["."], 260)  # bytes, no merges: nothing is learned
    net = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    with torch.no_grad():
        for stream, (_, parameter) in enumerate(sorted(net.named_parameters()), 1000):
            spread = 0.25 if parameter.ndim == 2 else 0.1  # larger than usual: differences must show
            values = torch.from_numpy(uniform(stream, parameter.numel(), -spread, spread)).view_as(parameter)
            parameter.copy_(values if parameter.ndim == 2 else 1 + values)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared pool of hashed tokens, lengths, utilities, clusters and tasks."""
    folder = tmp_path_factory.mktemp("pool")
    lengths = 4 + below(1, SAMPLES, 37)
    parts = []
    for sample, n in enumerate(lengths):
        response = bits(10_000 + sample, n) % np.uint64(5) < 3
        response[-1] = True
        # Every third token follows from the one before it: there is something to learn.
        ids = 4 + below(20_000 + sample, n, VOCAB - 4)
        ids[2::3] = 4 + (7 * ids[1::3][: len(ids[2::3])]) % 50
        parts.append((ids, response))
    TokenStore.write(folder / "store", parts)
    pq.write_table(pa.table({"id": [str(i) for i in range(SAMPLES)]}), folder / "records.parquet")
    write_answers(TokenStore.open(folder / "store"), folder / "answers", [5, 6])
    PoolState(
        utility=torch.from_numpy(uniform(2, SAMPLES, 4, 7)),
        difficulty=torch.from_numpy(uniform(3, SAMPLES, 0.3, 1.05)),
        answer_nll=torch.from_numpy(uniform(4, SAMPLES, 4, 7)),
        cluster=torch.from_numpy(below(5, SAMPLES, CLUSTERS)),
        task=torch.from_numpy(below(6, SAMPLES, 6) // 2 % len(TASKS)),
        dropped=torch.from_numpy(bits(7, SAMPLES) % np.uint64(10) == 0),
        task_names=TASKS,
        num_clusters=CLUSTERS,
    ).save(folder)
    return folder


# --- the file ---


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def stream() -> list[float]:
    """What torch's generator gives on the CPU: the sketch's projections begin so."""
    normal, even = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    return torch.cat([torch.randn(4, generator=normal), torch.empty(1).uniform_(generator=even)]).tolist()


def keep(name: str, found: dict[str, Any]) -> None:
    """Put one run's numbers into the file: one line for each list, so that a diff shows what moved."""
    runs = json.loads(FILE.read_text()) if FILE.exists() else {}
    runs = {**runs, "torch": torch.__version__.split("+")[0], "stream": stream(), name: found}
    order = sorted(runs, key=lambda key: (isinstance(runs[key], dict), key))
    entries = []
    for key in order:
        value = runs[key]
        inner = (
            ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            if isinstance(value, dict)
            else ""
        )
        entries.append(f" {json.dumps(key)}: " + (f"{{\n{inner}\n }}" if inner else json.dumps(value)))
    FILE.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def compare(name: str, found: dict[str, Any], golden: dict[str, Any]) -> None:
    """Fail with the first difference and the way out."""
    way_out = (
        f"\n{name}: written with torch {golden.get('torch')}, this is {torch.__version__}. "
        "If the change was meant, write the file anew:"
        "\n  LEAD_GOLDEN=write python -m pytest tests/invariants/test_golden_losses.py"
        "\nand say in the commit why the numbers moved."
    )
    if golden.get("stream") != pytest.approx(stream(), rel=1e-6):
        way_out += (
            "\ntorch's own random stream is another than the file's: sketch and adapters start from other numbers."
        )
    assert name in golden, "not in the file yet" + way_out
    expected = golden[name]
    assert found.keys() == expected.keys(), way_out
    for key, values in expected.items():
        assert len(found[key]) == len(values), (
            f"{key}: {len(found[key])} entries, {len(values)} are written down{way_out}"
        )
        if isinstance(values[0], float):
            error = np.abs(np.array(found[key]) - values) / np.abs(values)
            worst = int(error.argmax())
            assert error[worst] <= TOLERANCE, (
                f"{key}[{worst}]: {found[key][worst]!r}, {values[worst]!r} is written down, "
                f"{error[worst]:.2g} of it away{way_out}"
            )
        else:
            first = next((i for i, (a, b) in enumerate(zip(found[key], values, strict=True)) if a != b), None)
            assert first is None, f"{key}[{first}]: {found[key][first]}, {values[first]} is written down{way_out}"


def read(out: Path) -> dict[str, Any]:
    """Losses and gradient norms of every step, ids of every round."""
    steps, rounds = (
        [json.loads(line) for line in (out / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "selection.jsonl")
    )
    # Nine digits hold an fp32.
    found = {key: [float(f"{line[key]:.9g}") for line in steps] for key in ("loss", "grad_norm")}
    return {**found, "ids": [[int(name) for name in line["ids"]] for line in rounds]}


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_choices_are_those_written_down(
    name: str, pool: Path, model: Path, golden: dict[str, Any], run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    ranks, options = RUNS[name]
    run_ranks(
        "train", "--pool", pool, "--model", model, "--out", tmp_path / "run", *fitting(COMMON, *options), ranks=ranks
    )
    found = read(tmp_path / "run")
    assert len(found["loss"]) >= 8, "too short a run to tell anything"
    if WRITES and name not in SHARED:
        keep(name, found)
    elif not WRITES:
        compare(SHARED.get(name, name), found, golden)


def test_prepared_pool_is_the_one_written_down(
    model: Path, golden: dict[str, Any], run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """From records to utility, difficulty and clusters: template, tokens, warm-up training, scoring, k-means."""
    run_ranks("make-pool", "--out", tmp_path / "made", "--samples", "100", ranks=0)
    run_ranks(
        "prepare",
        "--pool",
        tmp_path / "made" / "pool.jsonl",
        "--model",
        model,
        "--out",
        tmp_path / "pool",
        "--max-length",
        "256",
        "--clusters",
        "3",
        "--batch.capacity",
        "512",
        "--optimizer.lr",
        "2e-3",
        "--runtime.precision",
        "fp32",
        ranks=0,
    )
    state = PoolState.load(tmp_path / "pool")
    store = TokenStore.open(tmp_path / "pool" / "store")
    found = {
        name: [float(f"{x:.9g}") for x in getattr(state, name).tolist()]
        for name in ("utility", "difficulty", "answer_nll")
    }
    found |= {
        "lengths": store.lengths.tolist(),
        "cluster": state.cluster.tolist(),
        "dropped": state.dropped.long().tolist(),
    }
    if WRITES:
        keep("prepare", found)
    else:
        compare("prepare", found, golden)
