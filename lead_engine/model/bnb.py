"""bitsandbytes, which 8-bit optimizers and 4-bit bases need, and which may be missing."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

from lead_engine.base.errors import UserError


def bitsandbytes_functional(flag: str) -> ModuleType:
    """`bitsandbytes.functional`; importing it registers `torch.ops.bitsandbytes`.

    Raises UserError naming `flag` where it is missing.
    """
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise UserError(
            f"{flag}: needs bitsandbytes, which cannot be imported ({error}); pip install 'lead-engine[quant]'"
        ) from None


def quieten() -> None:
    """Drop a line that bitsandbytes logs when it finds no package `kernels`.

    It does so when peft imports it on a CPU with bf16 instructions.

    It speaks of a kernel for inference on 4-bit weights, which nothing here calls; without it bitsandbytes takes its
    own.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "gemm_4bit_forward" not in str(record.msg)
    )
