"""The coarse stage: which difficulty cluster a round is trained on, and what the bandit learns from it.

EXP3 and EXP3.S are those of Auer, Cesa-Bianchi, Freund, Schapire, "The nonstochastic multiarmed bandit problem",
SIAM J. Comput. 32 (2002). Everything is a tensor on the selector's device; the host reads none of it during a round.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lead_kernels import draw_arm, exp3_probabilities, exp3_update

BanditKind = Literal["exp3", "exp3s", "uniform", "none"]
EXP3S_ALPHA = 0.01
"""Share of weight that EXP3.S spreads over all arms each round."""


class RewardScale:
    """Maps raw rewards to [-1, 1] by the range seen so far.

    scaled = 2 (r - low) / (high - low) - 1, where low and high are the least and the greatest reward seen, these
    included. While they are equal (the first reward, or only equal ones) there is nothing to compare with, and the
    reward counts 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.low = torch.full((), float("inf"), device=device)
        self.high = torch.full((), float("-inf"), device=device)

    def scale(self, reward: Tensor, counts: Tensor) -> Tensor:
        """The scaled rewards, fp32 like `reward`; 0 where `counts` (bool) is false, whatever the reward is there."""
        self.low.copy_(torch.minimum(self.low, torch.where(counts, reward, torch.inf).amin()))
        self.high.copy_(torch.maximum(self.high, torch.where(counts, reward, -torch.inf).amax()))
        span = self.high - self.low
        known = counts & (span > 0)
        scaled = 2 * (reward - self.low) / torch.where(known, span, 1.0) - 1
        return torch.where(known, scaled, 0.0)


class Bandit:
    """EXP3 or EXP3.S over K arms; `uniform` is EXP3 that never learns, `none` has one arm.

    prior: fp32 [K], the probabilities that it starts from and with which it explores. With q_k for the prior, p = (1 -
    gamma) w / sum w + gamma q, and the drawn arm's weight is multiplied by exp(gamma q_k r / p_k); with q_k = 1 / K
    that is EXP3. The exponent is at most 1 in size for any prior, as p_k >= gamma q_k.
    """

    def __init__(self, kind: BanditKind, gamma: float, prior: Tensor) -> None:
        self.gamma, self.prior = gamma, prior
        self.alpha = EXP3S_ALPHA if kind == "exp3s" else 0.0
        self.learns = kind in ("exp3", "exp3s")
        self.log_weights = prior.clamp(min=torch.finfo(prior.dtype).tiny).log()
        self.log_weights -= self.log_weights.max()

    def draw(self, available: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """(arm 0-d int64, probabilities fp32 [K]) among the available arms (bool [K]); `uniform` is 0-d in [0, 1)."""
        probabilities = exp3_probabilities(self.log_weights, available, self.gamma, self.prior)
        return draw_arm(probabilities, uniform), probabilities

    def update(self, arm: Tensor, probabilities: Tensor, reward: Tensor, counts: Tensor) -> None:
        """Learn from a scaled reward (0-d, in [-1, 1]); nothing changes where `counts` (0-d bool) is false."""
        if self.learns:
            prior = self.prior.gather(0, arm.view(1))[0]  # indexing by a 0-d tensor would read it on the host
            scaled = reward * prior * self.prior.shape[0]
            learned = exp3_update(self.log_weights, probabilities, arm, scaled, self.gamma, alpha=self.alpha)
            self.log_weights.copy_(torch.where(counts, learned, self.log_weights))

    def update_all(self, reward: Tensor, counts: Tensor) -> None:
        """Learn from the rewards of all arms at once (fp32 [K], in [-1, 1]; `counts` bool [K]: whose are known), as a
        mixture sees them.

        Where every arm's reward is seen, r_k is its own unbiased estimate, and EXP3 becomes Hedge: w_k *= exp(gamma
        r_k), the step that EXP3 takes at p_k = 1 / K (Auer et al., section 3).
        """
        if self.learns:
            new = self.log_weights + torch.where(counts, self.gamma * reward, 0.0)
            if self.alpha > 0:
                new = torch.logaddexp(
                    new, torch.logsumexp(self.log_weights, 0) + 1.0 + torch.log(self.alpha * self.prior)
                )
            self.log_weights.copy_(new - new.max())
