"""Argument checks that read nothing from a device, and the question whether the host may read a tensor."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

GROUP_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
"""Of a label of every sample in the pool: a byte is read fastest."""


def on_host(tensor: Tensor) -> bool:
    """Whether reading values of `tensor` is free: it lies in host memory and is not a fake tensor of a tracing run."""
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = ()) -> None:
    """Raise ValueError unless `tensor` has exactly this shape and, where `dtypes` names any, one of these dtypes."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if dtypes and tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(str(d) for d in dtypes)}")


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every given tensor lies on `device`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Keep products in their operands' dtype inside a caller's `torch.autocast`, which would round fp32 ones."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
