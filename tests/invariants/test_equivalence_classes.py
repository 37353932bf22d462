"""What only changes where and in which order a run is computed leaves every step as it was: one table, through the real
command line.

Ranks, accumulation, packing, recomputation, compilation, offload, replicas (HSDP) and a resumed run. Steps train the
same samples in all of them: slots bind before capacity does, so a step is 8 samples however they are packed.

TOLERANCE is a few times what the plain run itself is off by, which the run in float64 shows. Measured, the largest
relative difference over the steps of (loss, gradient norm): all classes from the plain run (8e-8, 3e-7), the plain run
from float64 (1.3e-7, 2.7e-7). Estimates of mean change: 5e-6 between classes. They rest on a difference of two inner
products that agree in four or five digits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lead_engine.config import BatchConfig, LoraConfig, OptimizerConfig, RuntimeConfig, SelectionConfig, TrainConfig
from lead_engine.model.load import build_model
from lead_engine.pool.store import TokenStore
from lead_engine.training.build import build
from lead_engine.training.distributed import process_group
from lead_engine.training.rounds import Progress
from needs import SHARDED_INTEGERS
from runs import fitting
from separate import reference

pytestmark = pytest.mark.slow

TOLERANCE = {"loss": 1e-6, "grad_norm": 2e-6, "mean_change": 3e-5}
LONGEST, SAMPLES_A_STEP = 40, 8
COMMON = [
    "--budget",
    "0.5",
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


@dataclass(frozen=True)
class Run:
    """One command line."""

    ranks: int = 1
    micro_batches: int = 4
    flags: str = ""
    weights: str = ""
    """Flags that are the plain run's, too."""
    exact: bool = False
    """Nothing is added in another order: equal to the last bit."""

    def arguments(self) -> list[str]:
        slots = SAMPLES_A_STEP // self.micro_batches
        packing = [
            "--batch.micro-batches",
            self.micro_batches,
            "--batch.slots",
            slots,
            "--batch.capacity",
            slots * LONGEST,
        ]
        return [*map(str, packing), *fitting(COMMON, *self.weights.split(), *self.flags.split())]


QLORA = "--lora.rank 4 --lora.quantize nf4 --lora.head --optimizer.kind adamw8bit --method random"
CLASSES = {
    "every sample alone": Run(micro_batches=8),
    "one large micro-batch": Run(micro_batches=1),
    "one mask for all": Run(flags="--runtime.attention mask"),
    "recomputed": Run(flags="--runtime.checkpointing full", exact=True),
    "recomputed, selective": Run(flags="--runtime.checkpointing selective", exact=True),
    "offloaded": Run(flags="--runtime.offload", exact=True),
    "compiled, selective": Run(flags="--runtime.compile --runtime.checkpointing selective"),
    "2 ranks": Run(ranks=2),
    "2 ranks, every sample alone, recomputed": Run(ranks=2, micro_batches=8, flags="--runtime.checkpointing full"),
    "4 ranks": Run(ranks=4),
    "2 x 2 ranks": Run(ranks=4, flags="--runtime.replicate 2"),
    "2 x 1 ranks, offloaded": Run(ranks=2, flags="--runtime.replicate 2 --runtime.offload"),
    "QLoRA, 8 bits, head: 2 x 1 ranks, selective": Run(
        ranks=2, flags="--runtime.replicate 2 --runtime.checkpointing selective", weights=QLORA
    ),
}


@dataclass
class Log:
    """What a run left."""

    folder: Path
    steps: dict[str, np.ndarray]
    ids: list[list[str]]


def read(folder: Path) -> Log:
    files = ("metrics.jsonl", "selection.jsonl")
    metrics, rounds = ([json.loads(line) for line in (folder / name).read_text().splitlines()] for name in files)
    return Log(
        folder, {key: np.array([line[key] for line in metrics]) for key in TOLERANCE}, [line["ids"] for line in rounds]
    )


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest relative difference over all steps."""
    assert one.shape == other.shape
    return float(np.abs(one / other - 1).max())


@pytest.fixture(scope="module")
def pool(make_pool) -> Path:
    return make_pool(samples=160, longest=LONGEST)


@pytest.fixture(scope="module")
def model(make_model) -> Path:
    return make_model("llama", hidden_size=64, head_dim=16)


@pytest.fixture(scope="module")
def trained(run_ranks, pool: Path, model: Path, tmp_path_factory) -> Callable[..., Log]:
    """trained(Run(...)) -> Log, run once however often it is asked for."""
    done: dict[tuple, Log] = {}
    cache = tmp_path_factory.mktemp("compiled")

    def run(what: Run, *more: str, out: Path | None = None) -> Log:
        key = (what, more, out)
        if key not in done:
            folder = out or tmp_path_factory.mktemp("run") / "out"
            line = ["train", "--pool", pool, "--model", model, "--out", folder, *what.arguments(), *more]
            run_ranks(*line, ranks=what.ranks, env={"TORCHINDUCTOR_CACHE_DIR": str(cache)}, timeout=120)
            done[key] = read(folder)
        return done[key]

    return run


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=SHARDED_INTEGERS) if run.ranks > 1 and run.weights == QLORA else name
        for name, run in CLASSES.items()
    ],
)
@pytest.mark.timeout(200)
def test_every_step_is_the_same(name: str, trained: Callable[..., Log]) -> None:
    what = CLASSES[name]
    plain, found = trained(Run(weights=what.weights)), trained(what)
    assert len(plain.steps["loss"]) >= 9
    assert found.ids == plain.ids
    differences = {key: difference(found.steps[key], plain.steps[key]) for key in TOLERANCE if np.any(plain.steps[key])}
    print(name, differences)
    for key, tolerance in TOLERANCE.items():
        assert differences.get(key, 0.0) <= (0.0 if what.exact else tolerance), key


def resume_from(whole: Path, checkpoint: int, out: Path) -> None:
    """A copy of a finished run as it would be had it been killed before its next checkpoint was complete."""
    shutil.copytree(whole, out)
    kept = sorted(out.glob("checkpoints/step-*"))
    for later in kept[checkpoint:]:
        shutil.rmtree(later)
    for name in ("summary.json", "model", "utility.npz"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.timeout(200)
def test_resumed_with_replicas_and_without(trained: Callable[..., Log], tmp_path: Path) -> None:
    """Replicas write every number once; what they wrote goes on bit for bit with replicas, and to rounding without."""
    replicas, plain = CLASSES["2 x 2 ranks"], trained(Run())
    keep = ("--checkpoint-every", "1", "--keep-checkpoints", "9")
    whole = trained(replicas, *keep)
    sharded = trained(CLASSES["4 ranks"], *keep)
    sizes = [
        sum(path.stat().st_size for path in log.folder.glob("checkpoints/step-*/*.distcp")) for log in (whole, sharded)
    ]
    assert sizes[0] < 1.2 * sizes[1], "replicas were written more than once"
    resume_from(whole.folder, 2, tmp_path / "again")
    again = trained(replicas, *keep, "--resume", out=tmp_path / "again")
    assert again.ids == whole.ids
    assert all(np.array_equal(again.steps[key], whole.steps[key]) for key in TOLERANCE)
    one, two = (load_file(log.folder / "model" / "model.safetensors") for log in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    resume_from(whole.folder, 2, tmp_path / "other")
    other = trained(Run(ranks=2), *keep, "--resume", out=tmp_path / "other")
    assert other.ids == plain.ids
    for key, tolerance in TOLERANCE.items():
        assert difference(other.steps[key], plain.steps[key]) <= tolerance, key


def test_what_rounding_does(trained: Callable[..., Log], pool: Path, model: Path) -> None:
    """The plain run against the same in float64, and without FSDP: TOLERANCE hides no more than a few times that.

    Of method `random`: the estimates of `lead` are made in fp32 by design.
    """
    config = TrainConfig(
        pool=pool,
        model=str(model),
        method="random",
        out=Path("unused"),
        budget=0.5,
        batch=BatchConfig(capacity=2 * LONGEST, micro_batches=4, slots=2),
        selection=SelectionConfig(round_steps=2),
        optimizer=OptimizerConfig(lr=1e-3),
        runtime=RuntimeConfig(precision="fp32"),
        lora=LoraConfig(),
    )
    alone = {"rank": 0, "size": 1, "device": torch.device("cpu"), "mesh": None, "first_says": lambda make: make()}
    session = build(config, SimpleNamespace(**alone))
    session.trainer.distributed = False
    session.trainer.model.double()
    observe = session.trainer.selector.observe
    session.trainer.selector.observe = lambda ids, loss, change: observe(
        ids, loss.float(), change.float()
    )  # its state is fp32
    rounds = list(session.trainer.rounds(Progress()))
    exact = [step for each in rounds for step in each.values.read().steps]
    plain = trained(Run(weights="--method random"))
    for key in ("loss", "grad_norm"):
        error = difference(plain.steps[key], np.array([float(getattr(step, key)) for step in exact]))
        print(f"{key}: {error:.1e} from float64")
        assert TOLERANCE[key] / 30 < error < TOLERANCE[key], key


def test_bf16_is_as_good_as_that_of_transformers(make_pool, model: Path) -> None:
    """Gradients of a step of four micro-batches under FSDP: bf16 products, accumulated and reduced in fp32.

    Their error is at most 1.2 times that of transformers' own bf16 on every sample alone; so is that of the losses.
    """
    store = TokenStore.open(make_pool(samples=16, longest=LONGEST) / "store")
    true_losses, truth = reference(model, store, list(range(16)), torch.float64)
    their_losses, theirs = reference(model, store, list(range(16)), torch.bfloat16)
    tokens = int(store.response_rows[:16].sum())
    with process_group() as ranks:
        ours = build_model(
            model, device=ranks.device, mesh=ranks.mesh, runtime=RuntimeConfig(precision="bf16"), max_length=LONGEST
        )
        found = []
        for first in range(0, 16, 4):
            ours.set_requires_gradient_sync(first == 12)
            head = ours(
                store.batch(torch.arange(first, first + 4), capacity=4 * LONGEST, num_rows=128), token_weight=1 / tokens
            )
            head.loss.backward()
            found.append(head.sample_nll)
        names = ours.checkpoint_names()
        gradients = {names[name]: parameter.grad.full_tensor() for name, parameter in ours.named_parameters()}
    assert gradients.keys() == truth.keys()
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())

    def error(of: dict[str, torch.Tensor]) -> float:
        return sum(float((of[name].double() - truth[name]).norm() ** 2) for name in truth) ** 0.5

    print(f"gradients: {error(gradients) / error(theirs):.2f} of transformers' error")
    assert 0 < error(gradients) <= 1.2 * error(theirs)
    own, other = ((losses.double() - true_losses).norm() for losses in (torch.cat(found), their_losses))
    print(f"losses: {own / other:.2f} of transformers' error")
    assert own <= 1.2 * other
