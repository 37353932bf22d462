"""A whole round, backward pass and optimizer included, under FakeTensorMode: tensors have no data, so any step that
reads some raises.

Fake CPU tensors, since autograd has no engine for a GPU that is not there; each op also runs on fake CUDA tensors in
its own tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from lead_engine.config import MethodOptions, OptimizerConfig
from lead_engine.model.attention import NAME, Held
from lead_engine.model.packed import PackedLM
from lead_engine.pool.state import PoolState
from lead_engine.selection.methods.lead import LeadOptions
from lead_engine.selection.plan import Layout, Plan
from lead_engine.selection.selector import Selector
from lead_engine.training.optimizer import make_optimizer
from lead_engine.training.rounds import Header, Progress
from lead_engine.training.trainer import Trainer
from lead_kernels import gather_batch
from runs import options_for

DEVICE, SAMPLES, LENGTH = "cpu", 50, 12
LAYOUT = Layout(steps=3, micro_batches=2, slots=4, capacity=64)


class DeviceStore:
    """What the loop uses of a TokenStore in placement `device`; the real one opens files, which has no fake
    counterpart.
    """

    wants_prefetch = False

    def __init__(self) -> None:
        total = SAMPLES * LENGTH
        self.tokens = torch.zeros(total, dtype=torch.int32, device=DEVICE)
        self.response = torch.ones(total, dtype=torch.bool, device=DEVICE)
        self.offsets = torch.arange(0, total + 1, LENGTH, device=DEVICE)

    def batch(self, sample_ids, *, capacity, num_rows):
        return gather_batch(self.tokens, self.response, self.offsets, sample_ids, capacity=capacity, num_rows=num_rows)


def blind(thing: object, mode: FakeTensorMode) -> object:
    """Replace every tensor that `thing` holds, however deep, by one without data."""
    if isinstance(thing, torch.Tensor):
        # The selector and its method share the pool.
        return thing if isinstance(thing, FakeTensor) else mode.from_tensor(thing)
    if isinstance(thing, tuple):
        return tuple(blind(part, mode) for part in thing)
    if type(thing).__module__.startswith("lead_engine") and not isinstance(thing, torch.nn.Module):
        for name, value in vars(thing).items():
            if not isinstance(value, (MethodOptions, Layout)):
                setattr(thing, name, blind(value, mode))
    return thing


def make_trainer(folder: Path, options: dict[str, Any], mode: FakeTensorMode, world: int = 1) -> Trainer:
    """Built on real tensors (a constructor may check values), then blinded."""
    places, dropped = torch.arange(SAMPLES), torch.zeros(SAMPLES, dtype=torch.bool)
    state = PoolState(
        torch.rand(SAMPLES), torch.rand(SAMPLES), torch.rand(SAMPLES), places % 3, places % 2, dropped, ["a", "b"], 3
    )
    lengths = torch.full((SAMPLES,), LENGTH)
    selector = Selector(
        state, lengths, lengths - 1, method="lead", options=options, layout=LAYOUT, seed=0, device=DEVICE
    )
    config = AutoConfig.from_pretrained(folder)
    change = selector.loss_change(config.hidden_size)
    selector, change = blind(selector, mode), blind(change, mode)
    with mode:
        hf = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
        model = PackedLM(hf, attention="mask", max_length=LENGTH, chunk_bytes=1 << 16)
        model.head.keep_gradient = change.wants_hidden
        optimizer = make_optimizer(model, OptimizerConfig())
        config, scorer = OptimizerConfig(), SimpleNamespace(seconds=0.0)
        return Trainer(
            model,
            optimizer,
            selector,
            change,
            DeviceStore(),
            scorer,
            config,
            budget=10_000,
            world=world,
            distributed=False,
        )


CHANGES = {
    "inner": {},
    "inner exact": {"sketch_dim": 0},
    "paper": {**LeadOptions.recipe("paper"), "sketch_dim": 8},
    "none": {"loss_change": "none"},
    "mixture, soft, drift": {"draw": "mixture", "ranking": "soft", "unseen": "drift"},
    "mixture, estimate": {"draw": "mixture", "ranking": "soft", "unseen": "estimate"},
    "cluster, estimate, exp3s": {"draw": "cluster", "ranking": "soft", "unseen": "estimate", "bandit": "exp3s"},
    "random, no bandit, no tasks": {"ranking": "random", "bandit": "none", "task_quotas": "none"},
}


@pytest.fixture
def two_ranks() -> Iterator[int]:
    """Collectives of two ranks that nobody answers: the other one's tensors stay without data."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield 2
    dist.destroy_process_group()


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_in_a_round_reads_the_device(change: str, make_model, two_ranks: int, monkeypatch) -> None:
    """Plan, batches, head, backward pass, optimizer, gathering, U and visits, reward and bandit, and what is copied for
    the logs.
    """
    folder = make_model("llama")
    options = options_for("lead", **{"sketch_dim": 8, "calibrate_every": 2, **CHANGES[change]})
    each = [Held(slots=4, tokens=4 * LENGTH, longest=LENGTH)] * LAYOUT.micro_batches
    header = Header([100] * LAYOUT.steps, [[128] * LAYOUT.micro_batches] * LAYOUT.steps, [each] * LAYOUT.steps)

    def no_read(plan: Plan, selector: Selector) -> Header:
        """All but the read itself, and what it would have found."""
        assert selector.sizes(plan).shape == (4, LAYOUT.steps, LAYOUT.micro_batches)
        return header

    monkeypatch.setattr("lead_engine.training.trainer.read_header", no_read)
    mode = FakeTensorMode()
    trainer, progress = make_trainer(folder, options, mode, two_ranks), Progress()
    with mode:
        for number in range(1, 3):
            finished = trainer.train_round(progress)
            progress = finished.after
            assert progress.round == number
            assert progress.step == number * LAYOUT.steps
            values = finished.values.read()
            for step in values.steps:
                assert all(value.shape == () and value.device.type == DEVICE for value in step)
            told = (*values.stats, *values.plan, *(value for step in values.steps for value in step))
            assert all(isinstance(value, FakeTensor) for value in told)


def test_the_proof_can_fail(make_model) -> None:
    """The header's read is the one data-dependent step, and FakeTensorMode does refuse it."""
    folder = make_model("llama")
    mode = FakeTensorMode()
    trainer = make_trainer(folder, {"sketch_dim": 8}, mode)
    with mode:
        plan = trainer.selector.plan(0, 10_000)
        with pytest.raises(DataDependentOutputException):
            plan.tokens.sum().item()
