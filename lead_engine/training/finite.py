"""Steps whose loss or gradient is not finite: found and skipped on the device, on all ranks alike, without a host read.

A loss that is not finite multiplies its rank's gradients by NaN. The gradients' own reduction over the ranks carries
that to all of them, and so does the all-reduced norm: one number, the same everywhere, says whether the step is good.
No collective is added.
"""

from __future__ import annotations

import torch
from torch import Tensor


def loss_gradient(sample_nll: Tensor) -> Tensor:
    """The gradient that a micro-batch's backward pass begins with, 0-d fp32.

    It is 1, or NaN if a sample's loss (fp32 [B]) is not finite.
    """
    return torch.where(sample_nll.isfinite().all(), 1.0, torch.nan)


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Take an optimizer step, unless `skip` (0-d bool) holds.

    A skipped step changes not a bit of parameters, moments and step counters.

    By the protocol of `torch.amp.GradScaler`: an optimizer that knows it reads `found_inf` (0-d fp32, 1.0: skip) on the
    device.
    """
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # GradScaler's protocol: torch declares neither
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()


def check_can_skip(optimizer: torch.optim.Optimizer) -> None:
    """ValueError for one of torch's optimizers that would ignore `found_inf`, and so train on NaN.

    Others are taken at their word.
    """
    if type(optimizer).__module__.startswith("torch.optim") and not getattr(
        optimizer, "_step_supports_amp_scaling", False
    ):
        raise ValueError(
            f"this {type(optimizer).__name__} ignores found_inf, by which steps are skipped; give it fused=True"
        )
