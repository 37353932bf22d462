"""Compute precision. Master weights and gradient reductions are fp32 whatever is chosen here."""

from __future__ import annotations

import torch

from lead_engine.base.errors import UserError
from lead_engine.config import Precision


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions (AVX-512 BF16 or AMX); without them bf16 is slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_precision(requested: Precision, device: torch.device) -> torch.dtype:
    """bf16 or fp32. Raises UserError where bf16 is asked of a GPU that has none."""
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_multiplies_bf16()
    if requested == "bf16" and device.type == "cuda" and not native:
        raise UserError("--runtime.precision bf16: this GPU has no bf16 arithmetic; use fp32")
    if requested == "auto":
        return torch.bfloat16 if native else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[requested]
