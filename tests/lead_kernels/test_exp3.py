"""EXP3 and EXP3.S against a literal transcription, 10^4 rounds of extreme rewards, masked arms, the draw."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, getcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lead_kernels import draw_arm, exp3_probabilities, exp3_update, reference

K, GAMMA = 7, 0.1
EVERYONE = torch.ones(K, dtype=torch.bool)


class Literal:
    """Auer et al. 2002, figures 1 and 5, with weights as they stand there; decimals do not overflow."""

    def __init__(self, alpha: float) -> None:
        getcontext().prec = 40
        self.weights, self.alpha = [Decimal(1)] * K, Decimal(alpha)

    def probabilities(self) -> list[float]:
        total = sum(self.weights)
        return [float((1 - Decimal(GAMMA)) * w / total + Decimal(GAMMA) / K) for w in self.weights]

    def update(self, arm: int, reward: float, probability: float) -> None:
        share = Decimal(1).exp() * self.alpha / K * sum(self.weights)
        self.weights[arm] *= (Decimal(GAMMA) / K * Decimal(reward) / Decimal(probability)).exp()
        if self.alpha:
            self.weights = [w + share for w in self.weights]


@pytest.mark.slow
@pytest.mark.parametrize(("rewards", "alpha"), [("best arm", 0.0), ("worst case", 0.0), ("switching", 1e-3)])
def test_ten_thousand_extreme_rounds(rewards: str, alpha: float) -> None:
    literal, log_weights = Literal(alpha), torch.zeros(K, dtype=torch.float64)
    for step, u in enumerate(torch.rand(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)):
        p = exp3_probabilities(log_weights, EVERYONE, GAMMA)
        exact = literal.probabilities()
        if step % 100 == 0 or step == 9999:
            torch.testing.assert_close(p, torch.tensor(exact, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        # The worst case always pays the least likely arm, which makes the longest step: r / p = K / gamma.
        arm = int(p.argmin()) if rewards == "worst case" else int(draw_arm(p, u))
        best = step // 2500 if rewards == "switching" else 2
        reward = torch.tensor(1.0 if rewards == "worst case" or arm == best else -1.0, dtype=torch.float64)
        literal.update(arm, float(reward), exact[arm])
        log_weights = exp3_update(log_weights, p, torch.tensor(arm), reward, GAMMA, alpha)
    assert bool(log_weights.isfinite().all())
    assert float(log_weights.max()) == 0


def test_ten_thousand_payments_to_one_arm_do_not_overflow_fp32() -> None:
    log_weights, arm, one = torch.zeros(3), torch.tensor(1), torch.ones(())
    least = torch.full((3,), GAMMA / 3)  # as if that arm were never likely: 10^4 steps of 1
    for _ in range(10_000):
        log_weights = exp3_update(log_weights, least, arm, one, GAMMA)
    assert log_weights.tolist() == [-10_000.0, 0.0, -10_000.0]
    p = exp3_probabilities(log_weights, torch.ones(3, dtype=torch.bool), GAMMA)
    torch.testing.assert_close(p, torch.tensor([GAMMA / 3, 1 - 2 * GAMMA / 3, GAMMA / 3]))
    assert bool(exp3_update(log_weights, p, arm, one, GAMMA, 1e-3).isfinite().all())


def test_one_step_agrees_with_reference() -> None:
    log_weights = torch.randn(K, generator=torch.Generator().manual_seed(0)).double()
    available = torch.tensor([True, False, True, True, False, True, True])
    p = exp3_probabilities(log_weights, available, GAMMA)
    torch.testing.assert_close(p, reference.exp3_probabilities(log_weights, available, GAMMA))
    for alpha in (0.0, 0.02):
        ours = exp3_update(log_weights, p, torch.tensor(3), torch.tensor(-0.7).double(), GAMMA, alpha)
        torch.testing.assert_close(
            ours, reference.exp3_update(log_weights, p, torch.tensor(3), torch.tensor(-0.7).double(), GAMMA, alpha)
        )


def test_masked_arms_have_no_probability() -> None:
    log_weights = torch.tensor([500.0, 0.0, -500.0])
    p = exp3_probabilities(log_weights, torch.tensor([False, True, True]), GAMMA)
    assert p[0] == 0
    assert float(p.sum()) == pytest.approx(1)
    assert float(p[1]) == pytest.approx(0.5)  # both are left with gamma / K
    assert exp3_probabilities(log_weights, torch.zeros(3, dtype=torch.bool), GAMMA).tolist() == [0, 0, 0]


def test_a_drifting_reward_moves_exp3s_sooner() -> None:
    """After 2000 rounds for arm 0 the reward moves to arm 1: EXP3.S keeps weight in reserve for that."""
    seen = {}
    for alpha in (0.0, 1e-2):
        log_weights, since = torch.zeros(2), 0
        for step, u in enumerate(torch.rand(4000, generator=torch.Generator().manual_seed(1))):
            p = exp3_probabilities(log_weights, torch.ones(2, dtype=torch.bool), GAMMA)
            arm = draw_arm(p, u)
            since += int(step >= 2000 and int(arm) == 1)
            reward = torch.tensor(1.0 if int(arm) == step // 2000 else 0.0)
            log_weights = exp3_update(log_weights, p, arm, reward, GAMMA, alpha)
        seen[alpha] = since
    assert seen[1e-2] > 1.5 * seen[0.0]


MASSES = st.lists(st.sampled_from([0.0, 1e-30, 0.1, 0.5, 1.0]), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(weights=MASSES, u=st.floats(0, 1, exclude_max=True, width=32))
def test_draw_never_takes_an_impossible_arm(weights: list[float], u: float) -> None:
    p = torch.tensor(weights)
    arm = draw_arm(p, torch.tensor(u))
    assert arm.dtype == torch.int64
    if p.sum() > 0:
        p = p / p.sum()
        assert p[int(draw_arm(p, torch.tensor(u)))] > 0
    else:
        assert int(arm) == 0


def test_draw_follows_the_probabilities() -> None:
    p = torch.tensor([0.2, 0.0, 0.5, 0.3])
    uniform = (torch.arange(1000) + 0.5) / 1000
    counts = torch.bincount(torch.stack([draw_arm(p, u) for u in uniform]), minlength=4)
    assert counts.tolist() == [200, 0, 500, 300]
    assert [int(reference.draw_arm(p, u)) for u in uniform[::50]] == [int(draw_arm(p, u)) for u in uniform[::50]]


def test_the_largest_uniform_number_rounds_to_the_last_possible_arm() -> None:
    assert int(draw_arm(torch.tensor([0.7, 0.3, 0.0]), torch.tensor(1 - 2**-24))) == 1
    assert int(draw_arm(torch.tensor([1.0, 0.0]), torch.tensor(1 - 2**-24))) == 0


def one_round(log_weights: Tensor, available: Tensor, uniform: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
    p = exp3_probabilities(log_weights, available, GAMMA)
    arm = draw_arm(p, uniform)
    return arm, exp3_update(log_weights, p, arm, reward, GAMMA, 0.01)


def test_a_round_reads_nothing(no_host_reads: type, blind_host: Callable[[], Any]) -> None:
    arguments = torch.randn(K), EVERYONE, torch.tensor(0.3), torch.tensor(-0.5)
    with no_host_reads():
        arm, new = one_round(*arguments)
        with pytest.raises(AssertionError, match="reads the device"):
            int(arm)
    assert new.isfinite().all()
    with blind_host() as device:
        arm, new = one_round(*(torch.empty(x.shape, dtype=x.dtype, device=device) for x in arguments))
        assert (arm.shape, arm.dtype, new.shape) == ((), torch.int64, (K,))


def test_a_round_is_one_graph() -> None:
    arguments = (
        torch.randn(K, generator=torch.Generator().manual_seed(0)),
        EVERYONE,
        torch.tensor(0.3),
        torch.tensor(-0.5),
    )
    compiled = torch.compile(one_round, fullgraph=True, backend="aot_eager")(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(compiled, one_round(*arguments), strict=True))
