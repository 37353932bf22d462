"""Fixtures of the kernel tests: both forms of the operators, their allocations, and a host that cannot read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from inside_operators import InsideOperators
from lead_kernels import backend


@pytest.fixture(autouse=True, scope="session")
def interpreter_computes_as_a_gpu() -> Iterator[None]:
    """Two things that Triton's interpreter (3.6 to 3.9) does to bf16, put right.

    It truncates fp32 to bf16, where a GPU rounds to nearest, ties to even: twice the error, and a biased one. And it
    keeps bf16 as 16-bit integers, which `tl.dot` multiplies as such.
    """
    cast = interpreter.InterpreterBuilder.cast_impl
    dot = interpreter.InterpreterBuilder.create_dot

    def nearest(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        bits = source.data.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return interpreter.TensorHandle(np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)

    def widened(self: Any, *operands: Any) -> Any:
        return dot(
            self, *(cast(self, x, tl.float32) if getattr(x, "dtype", None) == tl.bfloat16 else x for x in operands)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", nearest)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)
        yield


@pytest.fixture(params=["host", "kernels"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test twice: with the operators' host form and with their kernels (interpreted without a GPU)."""
    if request.param == "kernels":
        if not os.environ.get("TRITON_INTERPRET"):
            pytest.skip("kernels run on CPU tensors only in Triton's interpreter; test_on_cuda.py runs them here")
        monkeypatch.setattr(backend, "_kernels_on_cpu", True)
    return request.param


READS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "bincount",
}


class NoHostReads(InsideOperators):
    """Raises on every PyTorch operator that waits for a device to learn a value or a shape."""

    def see(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        assert name not in READS, f"{func} reads the device"
        assert not by_mask, f"{func} by a mask reads the device"
        return func(*args, **kwargs)


@pytest.fixture
def no_host_reads() -> type[NoHostReads]:
    return NoHostReads


class Recorder(InsideOperators):
    """Notes every operator's name, its inputs' shapes and the bytes of the tensors it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []
        self.largest = 0

    def see(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        self.calls.append(
            (func.overloadpacket.__name__, [tuple(x.shape) for x in tree_leaves(args) if isinstance(x, Tensor)])
        )
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

    FakeTensorMode raises on every data-dependent step but lets `.cpu()` pass, which the second mode catches. A CPU-only
    build of torch cannot index fake "cuda" tensors, so that there the device is "meta": also one without data.
    """

    @contextmanager
    def enter() -> Iterator[str]:
        with FakeTensorMode(), _NoCopyToHost():
            yield "cuda" if torch.version.cuda or torch.version.hip else "meta"

    return enter
