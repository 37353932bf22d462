"""Whether a contestant of bench/head.py computes the right thing: its loss and gradients against float64."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from head_peers import PACKAGES, Inputs, Loss
from torch import Tensor

FAR_OFF = 0.1
"""A relative error that is not rounding any more."""


@dataclass(frozen=True)
class Reference:
    loss: float
    dhidden: Tensor
    dweight: Tensor


def reference(inputs: Inputs, dtype: torch.dtype = torch.float64, rows: int = 256) -> Reference:
    """Loss and gradients by the textbook, in `dtype`, `rows` rows at a time."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach().to(dtype)
    total, dhidden, dweight = 0.0, torch.empty_like(hidden, dtype=dtype), torch.zeros_like(weight)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        h, y = hidden[part].to(dtype), inputs.targets[part, None]
        log_p = torch.log_softmax(h @ weight.T, -1)
        total -= float(log_p.gather(1, y).sum())
        g = log_p.exp_().scatter_add_(1, y, torch.full_like(y, -1, dtype=dtype)).div_(hidden.shape[0])
        dhidden[part] = g @ weight
        dweight.addmm_(g.T, h)
    return Reference(total / hidden.shape[0], dhidden, dweight)


def best_reference(inputs: Inputs) -> tuple[Reference, str]:
    try:
        return reference(inputs), "float64"
    except torch.OutOfMemoryError:
        return reference(inputs, torch.float32), "float32"


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm, by blocks of rows: no float64 copy of a whole weight gradient."""
    rows = max(1, 2**26 // max(1, expected[0].numel()))
    blocks = zip(value.split(rows), expected.split(rows), strict=True)
    difference = sum(float((a.to(b.dtype) - b).square().sum()) for a, b in blocks)
    return math.sqrt(difference / float(torch.linalg.vector_norm(expected)) ** 2)


def errors(loss: Loss, inputs: Inputs, expected: Reference) -> dict[str, float]:
    inputs.drop_gradients()
    value = loss(inputs.hidden, inputs.weight, inputs.targets)
    value.backward()
    found = {
        "loss": abs(float(value.detach()) - expected.loss) / expected.loss,
        "dh": relative_error(inputs.hidden.grad, expected.dhidden),
        "dW": relative_error(inputs.weight.grad, expected.dweight),
    }
    inputs.drop_gradients()
    return found


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not ready after {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def admit(
    build: Callable[[Inputs], Loss], inputs: Inputs, expected: Reference, seconds: int
) -> tuple[Loss | None, dict[str, Any]]:
    """A contestant that runs and is right, or the reason why it does not take part."""
    try:
        with time_limit(seconds):
            loss = build(inputs)
            found = errors(loss, inputs, expected)
    except Exception as error:
        return None, {"absent": _reason(error)}
    if not all(x < FAR_OFF for x in found.values()):
        return None, {"absent": "wrong result", "error": found}
    return loss, {"error": found}


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        return f"{PACKAGES[error.name]} is not installed"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
