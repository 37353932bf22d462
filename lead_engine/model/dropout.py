"""Dropout of adapters' inputs, a function of (seed, step, micro-batch) and nothing else.

The generator of torch that layers draw from is seeded before each micro-batch. So a step does not depend on how many
ranks share it, on what was drawn before it, or on whether the run was resumed; what is recomputed in the backward pass
is given the same numbers (recompute.py). It does depend on how samples are packed, and on the kind of device.
"""

from __future__ import annotations

import torch
from torch import nn

_PRIME = 1_000_003


def draws_random_numbers(module: nn.Module) -> bool:
    """Whether a forward pass in training draws from torch's generator."""
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Seed torch's default generators for a micro-batch, counted over all ranks. The device is not waited for."""
    torch.manual_seed(((seed * _PRIME + step) * _PRIME + micro_batch) % (1 << 63))
