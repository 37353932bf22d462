"""Which dtypes are rounded, and in which sums are kept."""

from __future__ import annotations

import torch

HALVES = (torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are kept: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
