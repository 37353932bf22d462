"""On a GPU: a round's steps never wait for the device. (Without one, test_round_is_static shows that they read nothing from it.)"""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lead_engine.config import BatchConfig, SelectionConfig, TrainConfig
from lead_engine.training.distributed import process_group
from lead_engine.training.loop import read_header
from lead_engine.training.train import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is here")


def test_steps_do_not_synchronise(make_model, make_pool) -> None:
    config = TrainConfig(
        pool=make_pool(samples=300),
        model=str(make_model("llama")),
        out=Path("unused"),
        batch=BatchConfig(capacity=128, micro_batches=2),
        selection=SelectionConfig(sketch_dim=8, round_steps=3, calibrate_every=2),
    )
    with process_group() as ranks:
        engine = build(config, ranks).engine
        for number in range(3):
            plan = engine.selector.plan(number, 1 << 40)
            header = read_header(plan)
            torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first round builds caches
            try:
                for step in range(3):
                    engine.train_step(plan, header, step, 3 * number + step, 1e-3)
                engine.selector.finish_round(plan)
                engine.change.finish_round(plan.cluster)
            finally:
                torch.cuda.set_sync_debug_mode("default")
