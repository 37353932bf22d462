"""On a GPU: a round's steps never wait for the device.

(Without one, test_round_is_static shows that they read nothing from it.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lead_engine.config import BatchConfig, SelectionConfig, TrainConfig
from lead_engine.selection.methods.lead import LeadOptions
from lead_engine.selection.plan import Plan
from lead_engine.selection.selector import Selector
from lead_engine.training.build import build
from lead_engine.training.distributed import process_group
from lead_engine.training.rounds import Header, Progress, read_header
from runs import options_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is here")


SELECTIONS = {
    "lead": ("lead", {}),
    "paper": ("lead", LeadOptions.recipe("paper")),
    "mixture, soft, drift": ("lead", {"draw": "mixture", "ranking": "soft", "unseen": "drift"}),
    "estimate": ("lead", {"unseen": "estimate", "bandit": "exp3s"}),
    "random order": ("lead", {"ranking": "random", "bandit": "none", "task_quotas": "none"}),
    "random": ("random", {}),
}


# Several blocks of every kernel: of token places (512), slots (128), segments, and the attention's rows (128).
CAPACITIES = [
    128,
    4096,
]


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_rounds_do_not_synchronise(selection: str, capacity: int, make_model, make_pool, monkeypatch) -> None:
    """A whole round, copies for the logs and the timers included; only the header between plan and steps is read.

    At the larger capacity the pool does not fill a round: micro-batches end in a long tail, or are empty.
    """
    method, options = SELECTIONS[selection]
    config = TrainConfig(
        pool=make_pool(samples=300),
        model=str(make_model("llama")),
        out=Path("unused"),
        method=method,
        batch=BatchConfig(capacity=capacity, micro_batches=2),
        selection=SelectionConfig(round_steps=3),
        options=options_for(method, sketch_dim=8, calibrate_every=2, **options),
    )

    def read(plan: Plan, selector: Selector) -> Header:
        """The one read that may wait."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        header = read_header(plan, selector)
        torch.cuda.set_sync_debug_mode(before)
        return header

    monkeypatch.setattr("lead_engine.training.trainer.read_header", read)
    waiting, progress = [], Progress()
    with process_group() as ranks:
        trainer = build(config, ranks).trainer
        trainer.budget = 1 << 40
        for number in range(3):
            with silent(number > 0):  # the first round builds caches
                waiting.append(trainer.train_round(progress))
            progress = waiting[-1].after
        torch.cuda.synchronize()
        assert trainer.selection_timer.take() >= 0
        for finished in waiting:
            values = finished.values.read()
            assert len(values.steps) == 3
            assert not values.stats.samples.is_cuda
            assert int(values.stats.samples) == int((values.plan.sample_ids < 300).sum()) > 0


def test_the_proof_can_fail() -> None:
    value = torch.ones(3, device="cuda")
    with silent(True), pytest.raises(RuntimeError, match="synchroniz"):
        value.sum().item()


@contextmanager
def silent(strictly: bool) -> Iterator[None]:
    """Where `strictly`, whatever makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error" if strictly else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
