"""What bench/training.py and its contenders' processes tell each other."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Spec:
    """What one contender is to run."""

    name: str
    kind: str
    """lead | random (the engine), trainer, sft (TRL's SFTTrainer)."""
    form: str
    """packed | padded."""
    grouped: bool
    """Padded batches of like length, as Trainer's length grouping makes them of the same samples."""
    liger: bool
    data: str
    """Folder of `make_data`."""
    capacity: int
    micro_batches: int
    round_steps: int
    precision: str
    lr: float
    compiled: bool = False
    """The engine with --runtime.compile."""


class Link:
    """Orders come on standard input and answers go to standard output; what libraries print goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def tell(self, **answer: Any) -> None:
        print(json.dumps(answer), file=self._out, flush=True)

    def order(self) -> list[str]:
        return sys.stdin.readline().split() or ["stop"]


def peak_bytes() -> int:
    """Most memory so far: of tensors on the GPU, else of the process."""
    return torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds(train: Callable[[], None]) -> float:
    started = time.perf_counter()
    train()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started
