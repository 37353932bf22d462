"""Where an operator runs (Triton kernels on a GPU, plain PyTorch on a CPU), and how a kernel is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without a GPU needs no Triton: the kernels are then never launched

    class _Absent:
        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self

    triton = tl = _Absent()

__all__ = ["KernelBuild", "cdiv", "current_device", "num_warps", "tl", "triton", "uses_kernels", "warps"]

_kernels_on_cpu = False
"""Set by the tests, under TRITON_INTERPRET=1: CPU tensors take the way of the kernels too."""


def uses_kernels(tensor: Tensor) -> bool:
    """Whether operators on `tensor` launch Triton kernels; in host memory they take their PyTorch form."""
    return tensor.device.type != "cpu" or _kernels_on_cpu


def _wave_size(device: torch.device) -> int:
    """Threads that execute together: 32 on NVIDIA, 32 or 64 on AMD."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def current_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one, on which Triton launches; of no effect on CPU tensors."""
    return torch.cuda.device(tensor.get_device() if tensor.is_cuda else -1)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def warps(threads: int, wave: int) -> int:
    """`num_warps` for a program of this many threads.

    Triton counts warps of the hardware's size, so a fixed number would double the program on AMD.
    """
    return max(1, threads // wave)


def num_warps(threads: int, tensor: Tensor) -> int:
    """`warps` on the tensor's GPU."""
    return warps(threads, _wave_size(tensor.device))


@dataclass(frozen=True)
class KernelBuild:
    """One kernel in one configuration, as `python -m lead_kernels.aot` compiles it."""

    name: str
    """What the report calls it, configuration included."""
    kernel: Any
    signature: Mapping[str, str]
    """Argument name -> Triton type ("*bf16", "i32", ...); "constexpr" for those in `constants`. A type that ends in
    ":16" is one that the launch keeps a multiple of 16: a pointer to fresh memory, a padded width."""
    constants: Mapping[str, Any]
    threads: int
    stages: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    columns: int = 0
    """Elements that one turn of each of its hot loops takes; 0: not counted."""
    instructions: float = float("inf")
    """Most instructions an element in its hot loops together, counted for sm_90 with all arguments aligned."""
