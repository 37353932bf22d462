"""8-bit AdamW: bitsandbytes' where blocks are the same, sharded, skipped on the device, and
through real checkpoints.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lead_engine.base.errors import UserError
from lead_engine.config import BatchConfig, OptimizerConfig, SelectionConfig, TrainConfig
from lead_engine.training import adamw8bit
from lead_engine.training.adamw8bit import AdamW8bit
from lead_engine.training.build import build
from lead_engine.training.distributed import process_group
from lead_engine.training.optimizer import check_available, make_optimizer
from lead_engine.training.rounds import read_header
from needs import SHARDED_INTEGERS
from runs import OPTIONS, assert_same_run, kill_after_checkpoint

pytestmark = pytest.mark.slow

bitsandbytes = pytest.importorskip("bitsandbytes", reason="not installed: no 8-bit AdamW")
ROWS_OF_256 = [(64, 256), (40, 512), (5, 4, 256), (256,), (9, 40)]
OTHER_ROWS = [(96, 200), (300, 16), (70, 70), (1, 5000), (3, 7, 300)]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(shapes: list[tuple[int, ...]], step: int) -> list[Tensor]:
    """Of sizes that spread over several powers of ten."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 4 for shape in shapes]


def train(optimizer: torch.optim.Optimizer, shapes: list[tuple[int, ...]], steps: range) -> list[Tensor]:
    """Steps whose lr changes as the loop's does: through param_groups. Returns copies of the parameters."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS["lr"] / (1 + 0.1 * step)
        for parameter, gradient in zip(trained, gradients(shapes, step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [p.detach().clone() for p in trained]


def distance(one: list[Tensor], other: list[Tensor]) -> list[float]:
    return [float((a - b).abs().mean()) for a, b in zip(one, other, strict=True)]


def test_it_is_bitsandbytes_own_where_rows_are_whole_blocks() -> None:
    """To the rounding of fp32, which once in a while puts a moment on the other side of a level: far below what 8 bits
    change.
    """
    shapes = ROWS_OF_256
    ours = train(AdamW8bit(parameters(shapes), **SETTINGS), shapes, range(20))
    theirs = train(bitsandbytes.optim.AdamW8bit(parameters(shapes), **SETTINGS), shapes, range(20))
    exact = train(torch.optim.AdamW(parameters(shapes), fused=True, **SETTINGS), shapes, range(20))
    for shape, apart, eight_bits in zip(shapes, distance(ours, theirs), distance(theirs, exact), strict=True):
        assert apart < (1e-4 * eight_bits if np.prod(shape) >= 4096 else 1e-6), shape
    assert distance(theirs, exact)[0] > 1e-4


def test_other_rows_are_no_further_from_32_bits_than_bitsandbytes() -> None:
    """Blocks end with their row there: shorter ones, so nearer to AdamW in fp32."""
    shapes = OTHER_ROWS
    ours, theirs, exact = (
        train(kind(parameters(shapes), **SETTINGS), shapes, range(20))
        for kind in (AdamW8bit, bitsandbytes.optim.AdamW8bit, torch.optim.AdamW)
    )
    for shape, own, reference in zip(shapes, distance(ours, exact), distance(theirs, exact), strict=True):
        assert own <= 1.05 * reference, shape
        assert own > 0 or np.prod(shape) < 4096, shape


def test_memory_is_a_byte_and_a_scale_a_moment() -> None:
    optimizer = AdamW8bit(parameters([(64, 512)]), **SETTINGS)
    train(optimizer, [(64, 512)], range(1))
    assert (
        sum(value.nbytes for state in optimizer.state.values() for value in state.values())
        == 2 * (64 * 512 + 4 * 64 * 2) + 4
    )


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of whole vector registers, that is: a CPU rounds a loop's rest otherwise than its body."""
    shapes = ROWS_OF_256
    whole = train(AdamW8bit(parameters(shapes), **SETTINGS), shapes, range(4))
    monkeypatch.setattr(adamw8bit, "_PIECE", 1024)
    for a, b in zip(whole, train(AdamW8bit(parameters(shapes), **SETTINGS), shapes, range(4)), strict=True):
        assert torch.equal(a, b)


def test_a_skipped_step_never_was() -> None:
    """Bit for bit, state included; at the first step, later, and over NaN."""
    shapes = ROWS_OF_256 + OTHER_ROWS
    skipping, never = (AdamW8bit(parameters(shapes), **SETTINGS) for _ in range(2))
    for step, skip in enumerate([True, False, False, True, True, False]):
        for optimizer in (skipping, never) if not skip else (skipping,):
            optimizer.found_inf = torch.tensor(float(skip))
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            for parameter, gradient in zip(trained, gradients(shapes, step), strict=True):
                parameter.grad = gradient
                if skip:
                    parameter.grad.view(-1)[::7] = torch.nan
            optimizer.step()
        for a, b in zip(skipping.param_groups[0]["params"], never.param_groups[0]["params"], strict=True):
            assert torch.equal(a, b)
            for key, value in never.state[b].items():
                assert torch.equal(skipping.state[a][key], value), key
    assert all(float(state["step"]) == 3 for state in skipping.state.values())
    # And an optimizer that is never told of skips does the same steps.
    plain = AdamW8bit(parameters(shapes), **SETTINGS)
    for step in (1, 2, 5):
        for parameter, gradient in zip(plain.param_groups[0]["params"], gradients(shapes, step), strict=True):
            parameter.grad = gradient
        plain.step()
    assert all(
        torch.equal(a, b) for a, b in zip(plain.param_groups[0]["params"], never.param_groups[0]["params"], strict=True)
    )


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_a_second_moment_that_fell_to_zero_does_not_throw_the_weight(betas: tuple[float, float]) -> None:
    """m can outlive v in 8 bits: m / eps would follow, thousands of learning rates long.

    A quantiser that rounds to the nearest level (on a GPU it does; on a CPU bitsandbytes rounds 0 up) leaves this
    state.
    """
    parameter = nn.Parameter(torch.zeros(64, 256))
    optimizer = AdamW8bit([parameter], lr=1.0, betas=betas, weight_decay=0.0)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]
    levels, unsigned = optimizer._levels[parameter.device]
    assert unsigned[0] == 0
    state["exp_avg"].fill_(int((levels - 1e-3).abs().argmin()))
    for key in ("exp_avg_sq", "exp_avg_sq_scales"):
        state[key].zero_()
    state["exp_avg_scales"].fill_(1.0)
    state["exp_avg_sq_scales"].fill_(1.0)
    state["step"].fill_(1000)
    optimizer.step()
    assert 0 < parameter.abs().max() <= adamw8bit._bound(*betas) ** 0.5 * 1.05


def test_bound_of_the_moments() -> None:
    """The largest m^2 / v that any history of gradients reaches, found by the history that reaches it; 0 where there is
    none.
    """
    for beta1, beta2 in ((0.9, 0.95), (0.9, 0.999), (0.5, 0.9)):
        history = (beta1 / beta2) ** torch.arange(20_000, dtype=torch.float64)  # equality in Cauchy-Schwarz
        k = torch.arange(20_000, dtype=torch.float64)
        m, v = (1 - beta1) * (beta1**k * history).sum(), (1 - beta2) * (beta2**k * history**2).sum()
        assert adamw8bit._bound(beta1, beta2) == pytest.approx(float(m**2 / v), rel=1e-6)
    assert adamw8bit._bound(0.9, 0.5) == 0.0


def test_it_is_made_with_decay_on_matrices_and_refused_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    config = OptimizerConfig(weight_decay=0.3, kind="adamw8bit")
    optimizer = make_optimizer(model, config)
    assert isinstance(optimizer, AdamW8bit)
    assert [(g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [(0.3, 1), (0.0, 3)]
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"--optimizer\.kind adamw8bit: needs bitsandbytes.*pip install"):
        make_optimizer(model, config)
    with pytest.raises(UserError, match=r"--optimizer\.kind adamw8bit"):
        check_available(config)
    check_available(OptimizerConfig())


def test_a_step_reads_nothing_from_the_device() -> None:
    """Tensors without data: whatever reads one raises."""
    mode = FakeTensorMode()
    optimizer = AdamW8bit(parameters(OTHER_ROWS), **SETTINGS)  # its constructor works out the levels, on the host
    optimizer._levels = {device: [mode.from_tensor(x) for x in levels] for device, levels in optimizer._levels.items()}
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(mode.from_tensor(p.detach())) for p in group["params"]]
    with mode:
        for skip in (None, torch.zeros(())):
            optimizer.found_inf = skip
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()


def test_state_of_another_optimizer_is_refused() -> None:
    optimizer = torch.optim.AdamW(parameters([(64, 256)]), **SETTINGS)
    train(optimizer, [(64, 256)], range(1))
    with pytest.raises(ValueError, match="state of another optimizer"):
        AdamW8bit(parameters([(64, 256)]), **SETTINGS).load_state_dict(optimizer.state_dict())


SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "head_dim": 32,
    "num_key_value_heads": 2,
}


def test_the_loop_skips_a_step_that_is_not_finite(make_model, make_pool, tmp_path: Path) -> None:
    """The second of three steps meets a row of NaN in the embedding: parameters and all 8-bit state are those of a run
    without it.
    """
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama", **SHAPE), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][310] = torch.nan  # a token of no sample
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = TrainConfig(
        make_pool(samples=60),
        str(folder),
        tmp_path,
        batch=BatchConfig(capacity=64, micro_batches=2),
        selection=SelectionConfig(round_steps=3),
        options={"sketch_dim": 8},
        optimizer=OptimizerConfig(kind="adamw8bit"),
    )
    found = []
    with process_group() as ranks:
        for steps in ([0, 1, 2], [0, 2]):
            trainer = build(config, ranks).trainer
            plan = trainer.selector.plan(0, 1 << 40)
            if 1 in steps:
                sample = int(plan.sample_ids[1, 0, 0])
                trainer.store.tokens[(trainer.store.offsets[sample] + trainer.store.offsets[sample + 1]) // 2] = 310
            stats = [trainer.train_step(plan, read_header(plan, trainer.selector), step, step, 1e-2) for step in steps]
            assert [bool(each.skipped) for each in stats] == [step == 1 for step in steps]
            state = trainer.optimizer.state
            assert sum(s["exp_avg"].dtype == torch.uint8 for s in state.values()) > 10
            found.append(
                [[p.to_local().detach(), *(whole(value) for value in state[p].values())] for p in trainer.trained]
            )
    for skipped, left_out in zip(*found, strict=True):
        for a, b in zip(skipped, left_out, strict=True):
            assert torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


KINDS = {
    "full": (1, ["--optimizer.kind", "adamw8bit", "--optimizer.weight-decay", "0.1"]),
    "QLoRA": (3, ["--optimizer.kind", "adamw8bit", "--lora.rank", "32", "--lora.head", "--lora.quantize", "nf4"]),
}
"""Other number of ranks that goes on, and options."""


@pytest.mark.parametrize("kind", ["full", pytest.param("QLoRA", marks=SHARDED_INTEGERS)])
@pytest.mark.timeout(300)
def test_resumed_run_is_the_uninterrupted_one(
    kind: str, make_model, make_pool, run_ranks, start_ranks, tmp_path: Path
) -> None:
    """On two ranks bit for bit; and a checkpoint of two ranks goes on with one or three as the
    same run, to rounding.
    """
    ranks, options = KINDS[kind]
    line = ["train", "--pool", make_pool(samples=220), "--model", make_model("llama", **SHAPE), *OPTIONS, *options]
    line[line.index("--batch.micro-batches") + 1] = "6"
    line += ["--checkpoint-every", "1"]
    whole, parted, other = tmp_path / "whole", tmp_path / "parted", tmp_path / "other"
    run_ranks(*line, "--out", whole, ranks=2, timeout=120)
    kill_after_checkpoint(start_ranks(*line, "--out", parted, ranks=2), parted, more=3)
    copy_run(parted, other)
    run_ranks(*line, "--out", parted, "--resume", ranks=2, timeout=120)
    assert_same_run(whole, parted)
    run_ranks(*line, "--out", other, "--resume", ranks=ranks, timeout=120)
    np.testing.assert_allclose(losses(other), losses(whole), rtol=1e-4)
    weights, found = (load_file(next((out / "model").glob("*.safetensors"))) for out in (whole, other))
    for name, value in found.items():
        assert (value - weights[name]).abs().mean() <= 1e-3 * weights[name].abs().mean(), name


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def copy_run(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    config = (target / "config.yaml").read_text()
    (target / "config.yaml").write_text(config.replace(str(source), str(target)))
