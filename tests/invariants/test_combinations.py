"""Options of `train` that go together train together; those that do not are refused at the start, for the reason that
the docs give.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lead_engine.base.errors import UserError
from lead_engine.config import (
    BatchConfig,
    LoraConfig,
    OptimizerConfig,
    RuntimeConfig,
    SelectionConfig,
    TrainConfig,
)
from lead_engine.training import combinations, train
from lead_engine.training.combinations import AXES, check_combination, pairs, refusal, table
from ranks import free_port
from runs import options_for

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SECTIONS = {"lora": LoraConfig, "optimizer": OptimizerConfig, "runtime": RuntimeConfig, "selection": SelectionConfig}
SMALL = {
    "optimizer": {"lr": 1e-3},
    "selection": {"round_steps": 2},
    "runtime": {"precision": "fp32"},
}
MODELS = {
    "dense": ("llama", {}),
    "tied embedding": ("qwen3", {"tie_word_embeddings": True}),
    "mixture of experts": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
}
COSTLY = ("compile", "HSDP", "mixture of experts")
"""Values that are taken only where they cover something."""


def covering_rows() -> list[tuple[str, ...]]:
    """Rows, a value of every axis each, such that every pair of values that is not refused is in one of them."""
    axes = list(AXES.values())
    wanted = {frozenset(pair) for pair in pairs() if not refusal(*pair)}
    candidates = [
        row for row in itertools.product(*axes) if not any(refusal(*pair) for pair in itertools.combinations(row, 2))
    ]
    of_row = {row: [frozenset(pair) for pair in itertools.combinations(row, 2)] for row in candidates}
    rows = []
    while wanted:
        best = max(
            candidates, key=lambda row: (sum(p in wanted for p in of_row[row]), -sum(value in COSTLY for value in row))
        )
        wanted.difference_update(of_row[best])
        rows.append(best)
    return rows


def options_of(row: tuple[str, ...]) -> dict[str, Any]:
    """TrainConfig's arguments: SMALL, the recipe, then what the row's values say."""
    chosen = [AXES[axis][value] for axis, value in zip(AXES, row, strict=True)]
    layers = [SMALL, *chosen]
    plain = {name: value for layer in layers for name, value in layer.items() if name not in SECTIONS}
    sections = {name: {k: v for layer in layers for k, v in layer.get(name, {}).items()} for name in SECTIONS}
    made = {name: kind(**sections[name]) for name, kind in SECTIONS.items()}
    small = {"sketch_dim": 8, "max_visits": 1}
    method = plain.get("method", "lead")
    own = {"epochs": 1} if method == "iterit" else options_for(method, **{**small, **plain.get("options", {})})
    return {**plain, **made, "options": own}


def train_forked(config: TrainConfig, ranks: int, log: Path) -> list[str]:
    """`train.run` in forked ranks on the CPU, whatever the machine has: each rank's error, or "".

    Blocks are compiled without the code generator, which takes most of the time.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    receive, send = context.Pipe(duplex=False)

    def one(rank: int) -> None:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.cuda.is_available = lambda: False
        torch._dynamo.reset()
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        error = ""
        try:
            train.run(config)
        except UserError as told:
            error = str(told)
        except Exception as unexpected:
            error = f"{type(unexpected).__name__}: {unexpected}"
        send.send((rank, error))

    processes = [context.Process(target=one, args=(rank,), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = []
    try:
        for _ in processes:
            assert receive.poll(60), "a rank did not end in time"
            found.append(receive.recv())
    finally:
        for process in processes:
            process.join(2)
            process.kill()
    return [error for _, error in sorted(found)]


@pytest.fixture(scope="module")
def folders(make_pool, make_model, tmp_path_factory) -> dict[str, Path]:
    """The pool, and a model of every kind: wide enough for 4 bits."""
    shape = {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 1}
    torch.compile(torch.sin, backend="aot_eager")(
        torch.ones(1, requires_grad=True)
    ).backward()  # imports what forked ranks then have
    heldout = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    records = [{"prompt": f"say {i}", "completion": "word " * i} for i in range(1, 4)]
    heldout.write_text("".join(json.dumps(record) + "\n" for record in records))
    models = {name: make_model(kind, **shape, **more) for name, (kind, more) in MODELS.items()}
    return {"pool": make_pool(samples=60), "heldout": heldout, **models}


def config_of(row: tuple[str, ...], folders: dict[str, Path], out: Path) -> TrainConfig:
    options = options_of(row)
    model = next(value for value in row if value in MODELS)
    capacity, slots = (512, 16) if options.get("method") == "full" else (64, 2)
    batch = BatchConfig(capacity=capacity, micro_batches=2, slots=slots)
    options |= {"eval_data": (str(folders["heldout"]),)}  # goes with everything
    options |= {} if options.get("method") == "full" else {"budget": 0.2}
    return TrainConfig(pool=folders["pool"], model=str(folders[model]), out=out, batch=batch, **options)


@pytest.mark.timeout(300)
def test_every_pair_trains(folders: dict[str, Path], tmp_path: Path) -> None:
    """Few runs of two steps or more, which together have every pair of values in them that is not refused."""
    rows = covering_rows()
    print(f"{len(rows)} runs for {len(pairs())} pairs")
    failed = {}
    for number, row in enumerate(rows):
        out = tmp_path / str(number)
        errors = train_forked(config_of(row, folders, out), 2 if "HSDP" in row else 1, tmp_path / f"{number}.log")
        if any(errors):
            failed[row] = errors
            continue
        losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert len(losses) >= 2, row
        assert all(4 < loss < 8 for loss in losses), (row, losses)  # about ln(320), where random weights start
        heldout = [json.loads(line)["loss"]["overall"] for line in (out / "heldout.jsonl").read_text().splitlines()]
        assert len(heldout) >= 2, row
        assert all(4 < loss < 8 for loss in heldout), (row, heldout)
    assert not failed


@pytest.mark.parametrize("refused", combinations.REFUSED, ids=lambda refused: f"{refused.first}, {refused.second}")
def test_every_refused_pair_is_refused(refused: combinations.Refused, folders: dict[str, Path], tmp_path: Path) -> None:
    plain = [next(iter(values)) for values in AXES.values()]
    row = tuple(
        next((value for value in (refused.first, refused.second) if value in values), default)
        for values, default in zip(AXES.values(), plain, strict=True)
    )
    [error] = train_forked(config_of(row, folders, tmp_path / "run"), 1, tmp_path / "log")
    assert refused.reason in error
    assert error.startswith("--lora.")
    assert not (tmp_path / "run" / "model").exists()


def refusing(**sections: Any) -> TrainConfig:
    return TrainConfig(pool=Path("pool"), model="model", out=Path("out"), **sections)


def test_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    four, hsdp, compiled = BatchConfig(micro_batches=4), RuntimeConfig(replicate=2), RuntimeConfig(compile=True)
    for ranks in (2, 4):
        check_combination(refusing(batch=four, runtime=hsdp), ranks, CPU)
    with pytest.raises(UserError, match=r"--batch.micro-batches 4: must be a multiple of the 3 ranks"):
        check_combination(refusing(batch=four), 3, CPU)
    with pytest.raises(UserError, match=r"--runtime.replicate 2: 1 ranks cannot be parted .* give a divisor of 1"):
        check_combination(refusing(runtime=hsdp), 1, CPU)
    check_combination(refusing(runtime=compiled), 1, CPU)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    with pytest.raises(UserError, match=r"--runtime.compile: needs a C\+\+ compiler on a CPU"):
        check_combination(refusing(runtime=compiled), 1, CPU)
    monkeypatch.setattr(combinations.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--runtime.compile: needs Triton on a GPU"):
        check_combination(refusing(runtime=compiled), 1, torch.device("cuda"))


def test_refused_before_anything_is_loaded(run_ranks, make_pool, make_model, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [
        "--pool",
        make_pool(samples=60),
        "--model",
        make_model("llama"),
        "--out",
        out,
        "--batch.micro-batches",
        "3",
    ]
    told = run_ranks("train", *options, "--runtime.replicate", "2", ranks=3, check=False)
    assert "--runtime.replicate 2: 3 ranks cannot be parted into so many equal groups" in told.output(0)
    assert "Traceback" not in told.output()
    assert not out.exists()


def test_the_docs_have_the_table(repository: Path) -> None:
    """Written anew by `python -m lead_engine.training.combinations`, between the two marks."""
    text = (repository / "docs" / "COMBINATIONS.md").read_text()
    assert text.split("<!-- table -->")[1].strip() == table().strip()
