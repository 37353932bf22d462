"""Fixtures of the kernel tests: both forms of the operators, what they allocate, and a world in which the host cannot look."""
from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BRANCHING = ("linear_cross_entropy", "gradient_signature", "segment_reduce")  # modules that ask whether the host may look


@pytest.fixture(params=["host", "device"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test twice: as in host memory, and with the static-shape formulation that any other device gets."""
    if request.param == "device":
        for name in BRANCHING:
            monkeypatch.setattr(importlib.import_module(f"lead_kernels.{name}"), "on_host", lambda tensor: False)
    return request.param


class Recorder(TorchDispatchMode):
    """Notes every operator's name, its inputs' shapes and the bytes of the tensors it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func.overloadpacket.__name__, [tuple(x.shape) for x in tree_leaves(args) if isinstance(x, Tensor)]))
        sizes = [x.numel() * x.element_size() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result

    def products(self) -> list[list[tuple[int, ...]]]:
        """Input shapes of every matrix product."""
        return [shapes for name, shapes in self.calls if name in ("mm", "addmm", "addmm_", "bmm")]


@pytest.fixture
def recorder() -> type[Recorder]:
    return Recorder


class _NoCopyToHost(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        outputs = {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
        assert "cpu" in inputs or "cpu" not in outputs, f"{func} copies from the device to the host"
        return result


@pytest.fixture
def blind_host() -> Callable[[], Any]:
    """A context in which any look of the host at the device raises; its value is the device's name.

    FakeTensorMode raises on every data-dependent step but lets `.cpu()` pass, which the second mode catches. A CPU-only build of torch
    cannot index fake "cuda" tensors, so that there the device is "meta": also one without data.
    """

    @contextmanager
    def enter() -> Iterator[str]:
        with FakeTensorMode(), _NoCopyToHost():
            yield "cuda" if torch.version.cuda or torch.version.hip else "meta"

    return enter
