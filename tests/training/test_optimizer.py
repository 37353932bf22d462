from __future__ import annotations

import pytest
import torch

from lead_engine.config import OptimizerConfig
from lead_engine.training.optimizer import clip_gradients, inner_product, learning_rate, make_optimizer


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_rises_to_the_peak_and_falls_to_its_end(schedule: str) -> None:
    config = OptimizerConfig(lr=2.0, warmup=0.1, schedule=schedule)
    assert learning_rate(config, 0.0) == pytest.approx(0.2)
    assert learning_rate(config, 0.05) == pytest.approx(1.1)
    assert learning_rate(config, 0.1) == pytest.approx(2.0)
    assert learning_rate(config, 1.0) == pytest.approx(2.0 if schedule == "constant" else 0.2)
    middle = {"cosine": 1.1, "linear": 1.1, "constant": 2.0}[schedule]
    assert learning_rate(config, 0.55) == pytest.approx(middle)
    quarter = {"cosine": 0.2 + 1.8 * 0.8535533905932737, "linear": 0.2 + 1.8 * 0.75, "constant": 2.0}[schedule]
    assert learning_rate(config, 0.325) == pytest.approx(quarter)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(OptimizerConfig(lr=3.0, warmup=0.0), 0.0) == pytest.approx(3.0)


def test_weight_decay_is_on_matrices_only() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    model[0].weight.requires_grad_(True)
    groups = make_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.3, 1), (0.0, 3)]


def test_first_order_change_is_the_inner_product_with_the_update() -> None:
    """<G, theta after> - <G, theta before> in float64 is <G, dtheta>, also where the update is in the last digits of
    fp32 weights.
    """
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(3 * torch.randn(3000, 1500)), torch.nn.Parameter(torch.randn(17))]
    for p in parameters:
        p.grad = torch.randn_like(p)
    old = [p.detach().clone() for p in parameters]
    before = inner_product(parameters)
    with torch.no_grad():
        for p in parameters:
            p.sub_(1e-5 * p.grad.sign())
    exact = sum(
        ((p.detach().double() - o.double()) * p.grad.double()).sum() for p, o in zip(parameters, old, strict=True)
    )
    assert float(inner_product(parameters) - before) == pytest.approx(float(exact), rel=1e-4)


def test_clipping_gives_norm_and_factor() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([3.0, 0.0, 4.0])
    norm, factor = clip_gradients([p], 1.0)
    assert float(norm) == pytest.approx(5.0)
    assert float(factor) == pytest.approx(0.2, rel=1e-5)
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.0, 0.8]))
    norm, factor = clip_gradients([p], 2.0)
    assert float(factor) == 1.0
