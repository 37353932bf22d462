"""On a GPU: a round's steps never wait for the device. (Without one, test_round_is_static shows that they read nothing from it.)"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lead_engine.config import RECIPES, BatchConfig, TrainConfig
from lead_engine.training.distributed import process_group
from lead_engine.training.host_copy import HostCopy
from lead_engine.training.loop import RoundValues, read_header
from lead_engine.training.session import build
from runs import selection_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is here")


SELECTIONS = {
    "lead": ("lead", {}),
    "paper": ("lead", RECIPES["paper"]["selection"]),
    "mixture, soft, drift": ("lead", {"draw": "mixture", "ranking": "soft", "unseen": "drift"}),
    "estimate, size": ("lead", {"unseen": "estimate", "prior": "size", "rank_by": "density", "bandit": "exp3s"}),
    "random order": ("lead", {"ranking": "random", "bandit": "none", "use_tasks": False}),
    "random": ("random", {}),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_rounds_do_not_synchronise(selection: str, make_model, make_pool) -> None:
    """A whole round, copies for the logs and the stopwatch included; only the header between plan and steps is read."""
    method, options = SELECTIONS[selection]
    config = TrainConfig(
        pool=make_pool(samples=300),
        model=str(make_model("llama")),
        out=Path("unused"),
        method=method,
        batch=BatchConfig(capacity=128, micro_batches=2),
        selection=selection_for(method, sketch_dim=8, round_steps=3, calibrate_every=2, **options),
    )
    waiting = []
    with process_group() as ranks:
        engine = build(config, ranks).engine
        for number in range(3):
            with silent(number > 0):  # the first round builds caches
                engine.selector.refresh(number, 0.1 * number, engine.scorer)
                engine.watch.start()
                plan = engine.selector.plan(number, 1 << 40)
                engine.watch.stop()
            header = read_header(plan, engine.selector)
            with silent(number > 0):
                steps = [engine.train_step(plan, header, step, 3 * number + step, 1e-3) for step in range(3)]
                engine.watch.start()
                stats = engine.selector.learn(plan)
                engine.change.finish_round(plan.cluster)
                engine.watch.stop()
                waiting.append(HostCopy(RoundValues(steps, stats, plan)))
                engine.watch.take()
        torch.cuda.synchronize()
        assert engine.watch.take() >= 0
        for late in waiting:
            values = late.read()
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
