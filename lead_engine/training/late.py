"""Reading the device without waiting for it: values are copied behind the work that makes them, and looked at one round later."""

from __future__ import annotations

import time
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


class LateCopy(Generic[T]):
    """A structure of tensors on its way to the host: on a GPU by copies into pinned memory that nobody waits for.

    `read` waits until they have arrived; asked for one round later, that is at once.
    """

    def __init__(self, values: T) -> None:
        tensors = pytree.tree_leaves(values)
        self._event = torch.cuda.Event() if any(isinstance(x, Tensor) and x.is_cuda for x in tensors) else None
        self._values = pytree.tree_map_only(Tensor, _to_host, values)
        if self._event is not None:
            self._event.record()

    def read(self) -> T:
        """The same structure, of tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()  # the device is the host; what is on it may change until it is read
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Stopwatch:
    """Seconds of the device's own time between `start` and `stop`, over any number of pairs; on a CPU, of the clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._started: Any = None
        self._open: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self._started = self._mark()

    def stop(self) -> None:
        self._open.append((self._started, self._mark()))

    def take(self) -> float:
        """Seconds of the pairs that are over and were not taken yet. Waits for nothing: what the device has still to do is taken later."""
        done = [pair for pair in self._open if not self._cuda or pair[1].query()]
        self._open = [pair for pair in self._open if pair not in done]
        return sum(start.elapsed_time(end) / 1e3 if self._cuda else end - start for start, end in done)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Lap:
    """Seconds of the device's own time from construction to `stop`; `seconds` may be read once the device has passed the end."""

    def __init__(self, device: torch.device) -> None:
        self._watch, self._seconds = Stopwatch(device), 0.0
        self._watch.start()

    def stop(self) -> None:
        self._watch.stop()

    @property
    def seconds(self) -> float:
        self._seconds = self._seconds or self._watch.take()
        return self._seconds
