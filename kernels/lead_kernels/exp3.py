"""EXP3 and EXP3.S, adversarial bandits with weights kept as logarithms.

Source: Auer, Cesa-Bianchi, Freund, Schapire, "The nonstochastic multiarmed bandit problem", SIAM J. Comput. 32 (2002),
figures 1 and 5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lead_kernels.checks import check_device, check_shape


def exp3_probabilities(log_weights: Tensor, available: Tensor, gamma: float, explore: Tensor | None = None) -> Tensor:
    """p = (1 - gamma) w / sum(w) + gamma / K over all K arms, then masked by `available` and renormalised.

    Args:
        log_weights: floating [K].
        available: bool [K].
        explore: [K], probabilities of exploring each arm, instead of 1 / K.

    Returns:
        [K] in the dtype of log_weights; all 0 where no arm is available.
    """
    check_shape("available", available, tuple(log_weights.shape), (torch.bool,))
    check_device(log_weights.device, available=available)
    explored = gamma / log_weights.shape[0] if explore is None else gamma * explore
    probabilities = (1.0 - gamma) * torch.softmax(log_weights, 0) + explored
    probabilities = torch.where(available, probabilities, 0.0)
    return probabilities / probabilities.sum().clamp(min=torch.finfo(log_weights.dtype).tiny)


def exp3_update(
    log_weights: Tensor, probabilities: Tensor, arm: Tensor, reward: Tensor, gamma: float, alpha: float = 0.0
) -> Tensor:
    """The log-weights after `arm`, drawn with `probabilities`, has paid `reward`.

    The largest log-weight returned is 0: only ratios matter, and the sums would otherwise lose digits as they grow.

    Args:
        log_weights, probabilities: floating [K].
        arm: 0-d int64.
        reward: 0-d, in [-1, 1].
        gamma: w_arm *= exp(gamma / K * reward / p_arm), which is EXP3.
        alpha: above 0, EXP3.S for rewards that drift: e * alpha / K * sum of the old weights is added to each new
            weight.
    """
    check_shape("probabilities", probabilities, tuple(log_weights.shape))
    check_device(log_weights.device, probabilities=probabilities, arm=arm, reward=reward)
    num_arms = log_weights.shape[0]
    drawn = torch.arange(num_arms, device=arm.device) == arm
    step = gamma / num_arms * reward / torch.where(drawn, probabilities, 1.0)
    new = log_weights + torch.where(drawn, step, 0.0)
    if alpha > 0.0:
        share = torch.logsumexp(log_weights, 0) + (1.0 + math.log(alpha / num_arms))
        new = torch.logaddexp(new, share)
    return new - new.max()


def draw_arm(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The arm (0-d int64) that a uniform number (0-d, in [0, 1)) picks from `probabilities` [K], never one of 0.

    Where all probabilities are 0, arm 0.
    """
    num_arms = probabilities.shape[0]
    lower = torch.ones(num_arms, num_arms, dtype=torch.bool, device=probabilities.device).tril()
    # Masked sums instead of cumsum, whose GPU kernel is not deterministic for floats. Rounded addition is monotone, so
    # cdf is too.
    cdf = torch.where(lower, probabilities, 0.0).sum(1)
    arm = (cdf <= uniform * cdf[-1]).sum()
    # uniform * cdf[-1] can round up to cdf[-1]: then the last arm that still raised the sum.
    return torch.minimum(arm, (cdf < cdf[-1]).sum())
