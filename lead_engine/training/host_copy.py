"""Reads the device without waiting for it.

Values are copied behind the work that makes them, and read a round later.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


class HostCopy(Generic[T]):
    """An asynchronous copy of a structure of tensors to the host: on a GPU, into pinned memory.

    `read` waits until the copy has arrived; a round later it has.
    """

    def __init__(self, values: T) -> None:
        tensors = pytree.tree_leaves(values)
        self._event: torch.cuda.Event | None = None
        self._values: T = pytree.tree_map_only(Tensor, _to_host, values)
        if any(isinstance(x, Tensor) and x.is_cuda for x in tensors):
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> T:
        """The same structure, of tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()  # the device is the host: later steps may overwrite the tensor before it is read
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
