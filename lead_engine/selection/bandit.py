"""The coarse stage: which difficulty cluster a round is trained on, and what the bandit learns from it.

EXP3 and EXP3.S are those of Auer, Cesa-Bianchi, Freund, Schapire, "The nonstochastic multiarmed bandit problem",
SIAM J. Comput. 32 (2002). Everything is a tensor on the selector's device; the host reads none of it during a round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lead_engine.config import SelectionConfig
from lead_kernels import draw_arm, exp3_probabilities, exp3_update


class RewardScale:
    """Maps raw rewards to [-1, 1] by the range seen so far.

    scaled = 2 (r - low) / (high - low) - 1, where low and high are the least and the greatest reward seen, this one
    included. While they are equal (the first reward, or only equal ones) there is nothing to compare with, and the
    reward counts 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.low = torch.full((), float("inf"), device=device)
        self.high = torch.full((), float("-inf"), device=device)

    def scale(self, reward: Tensor, counts: Tensor) -> Tensor:
        """The scaled reward, 0-d fp32. Where `counts` (0-d bool) is false the range stays and the result is 0."""
        self.low.copy_(torch.where(counts, torch.minimum(self.low, reward), self.low))
        self.high.copy_(torch.where(counts, torch.maximum(self.high, reward), self.high))
        span = self.high - self.low
        known = counts & (span > 0)
        scaled = 2 * (reward - self.low) / torch.where(known, span, 1.0) - 1
        return torch.where(known, scaled, 0.0)


class Bandit:
    """EXP3 or EXP3.S over `num_arms` arms; `uniform` is EXP3 that never learns, `none` has one arm."""

    def __init__(self, config: SelectionConfig, num_arms: int, device: torch.device) -> None:
        self.gamma = config.gamma
        self.alpha = config.exp3s_alpha if config.bandit == "exp3s" else 0.0
        self.learns = config.bandit in ("exp3", "exp3s")
        self.log_weights = torch.zeros(num_arms, device=device)

    def draw(self, available: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """(arm 0-d int64, probabilities fp32 [K]) among the available arms (bool [K]); `uniform` is 0-d in [0, 1)."""
        probabilities = exp3_probabilities(self.log_weights, available, self.gamma)
        return draw_arm(probabilities, uniform), probabilities

    def update(self, arm: Tensor, probabilities: Tensor, reward: Tensor, counts: Tensor) -> None:
        """Learn from a scaled reward (0-d, in [-1, 1]); nothing changes where `counts` (0-d bool) is false."""
        if self.learns:
            learned = exp3_update(self.log_weights, probabilities, arm, reward, self.gamma, alpha=self.alpha)
            self.log_weights.copy_(torch.where(counts, learned, self.log_weights))
