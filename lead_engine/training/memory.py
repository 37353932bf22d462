"""Memory of one rank: what it holds now, its peak, and what training is going to need, by count."""

from __future__ import annotations

import os
import resource
import sys
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lead_engine.config import OptimizerKind

GIB = 1 << 30
_SMALL_8BIT = 4096
"""The 8-bit optimizer keeps the moments of smaller parameters, and of vectors, in fp32."""
_BLOCKS_8BIT = (64, 128, 256)
"""Numbers of a row that share one fp32 scale in its moments: the smallest that holds the row, or the largest."""


def used_bytes(device: torch.device) -> int:
    """Bytes in use: on a GPU the most that tensors took so far, on a CPU what the process holds now.

    The GPU's number is a counter of the host's: reading it waits for nothing.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def peak_bytes(device: torch.device) -> int:
    """The most so far: of tensors on a GPU, of the process on a CPU (whatever it did before training included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Estimate(NamedTuple):
    """Bytes on this rank, from its shards' sizes. Activations, gathered units and the logits' chunk come on top."""

    parameters: int
    gradients: int
    optimizer: int

    def __str__(self) -> str:
        parts = [f"{name} {size(value)}" for name, value in zip(self._fields, self, strict=True)]
        return f"{size(sum(self))} a rank: {', '.join(parts)}; activations come on top"


def estimate(model: nn.Module, kind: OptimizerKind) -> Estimate:
    """What parameters, their gradients and the optimizer's two moments take on this rank."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return Estimate(sum(map(_bytes, parameters)), sum(map(_bytes, trained)), sum(_moments(p, kind) for p in trained))


def total_bytes(device: torch.device) -> int:
    """Memory of the device, or a CPU's share for one of this machine's ranks."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fits_gathered(needed: Estimate, gathered: int, total: int) -> bool:
    """Whether weights may stay gathered through a step.

    Half of the memory is left for activations, whose size nobody knows yet.
    """
    return 2 * (sum(needed) + gathered) <= total


def size(count: float) -> str:
    """Bytes for people: "1.5 GiB", "12 MiB"."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / (1 << 20):.3g} MiB"


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _bytes(parameter: Tensor) -> int:
    local = _local(parameter)
    return local.numel() * local.element_size()


def _moments(parameter: Tensor, kind: OptimizerKind) -> int:
    if kind == "adamw" or parameter.ndim < 2 or parameter.numel() < _SMALL_8BIT:
        return 2 * _bytes(parameter)  # parameters that are trained are fp32, as these moments are
    local = _local(parameter)
    rows, columns = local.shape[0], local[:1].numel()
    block = next((block for block in _BLOCKS_8BIT if block >= columns), _BLOCKS_8BIT[-1])
    return 2 * (local.numel() + 4 * rows * -(-columns // block))
