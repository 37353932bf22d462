"""`lead-engine doctor`: what this machine has, what the engine will use of it, and whether its loss is right here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lead_engine.base import console
from lead_engine.model.attention import choose_attention
from lead_engine.model.load import default_device
from lead_engine.model.precision import choose_precision, cpu_multiplies_bf16
from lead_kernels import linear_cross_entropy

PACKAGES = {
    "torch": "",
    "transformers": "",
    "tokenizers": "",
    "safetensors": "",
    "peft": "",
    "triton": "the kernels on GPUs",
    "flash-attn": "attention `flash`; without it GPUs use torch's varlen kernel",
    "bitsandbytes": "8-bit optimizer states and 4-bit bases",
    "datasets": "pools named as hub data sets",
    "tensorboard": "the run folders' tensorboard/",
    "wandb": "--wandb",
    "mlflow-skinny": "--mlflow",
    "lm-eval": "`lead-engine lm-eval`",
    "trl": "lead_engine.integrations with SFTTrainer",
}
"""Package -> what an optional one is needed for."""
BYTES_PER_TOKEN = 5
"""A pool's token takes 4 bytes, its response mark one."""
TEST_SHAPE = (67, 48, 211)
"""Rows, hidden size, vocabulary of the self-test: odd, and more than one chunk of rows."""
TEST_CHUNK_BYTES = 16 * 211 * 4
ALLOWED = 4.0
"""The loss op may be this many times as far from float64 as PyTorch's own cross-entropy in the same precision."""


class Check(NamedTuple):
    """Error of one quantity, relative to its largest entry in float64."""

    name: str
    error: float
    reference_error: float
    floor: float

    @property
    def passed(self) -> bool:
        return self.error <= max(ALLOWED * self.reference_error, self.floor)


def run() -> None:
    """Print the report. Exits with status 1 if the self-test fails."""
    device = default_device()
    console.table("Software", ["package", "version"], software())
    console.table("Hardware", ["what", "found"], hardware())
    console.table("Chosen by `auto`", ["option", "choice"], choices(device))
    checks = [check for dtype in test_dtypes(device) for check in self_test(device, dtype)]
    rows = [[c.name, f"{c.error:.1e}", f"{c.reference_error:.1e}", "passed" if c.passed else "FAILED"] for c in checks]
    columns = ["quantity", "relative error", "PyTorch's own error", "result"]
    console.table("Self-test: loss op against float64", columns, rows)
    if not all(check.passed for check in checks):
        console.say("The self-test failed: losses and gradients cannot be trusted on this machine with this software.")
        raise SystemExit(1)


def software() -> list[list[str]]:
    """[package, version, or what the missing one is needed for]."""
    rows = [["python", f"{platform.python_version()} ({sys.executable})"]]
    for package, purpose in PACKAGES.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed" + (f" (needed for {purpose})" if purpose else "")
        rows.append([package, version])
    return rows


def hardware() -> list[list[str]]:
    """[what, found]: processor, memory, accelerators, ways for ranks to talk."""
    bf16 = "yes" if cpu_multiplies_bf16() else "no (bf16 would be slower than fp32)"
    rows = [
        ["CPU", f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"],
        ["CPU bf16 instructions", bf16],
        ["main memory", _memory()],
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        version = getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}"
        rows.append([f"GPU {index}", f"{properties.name} ({version}), {_gib(free)} of {_gib(total)} GiB free"])
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"torch was built for {built}, but sees none" if built else "this build of torch is for CPUs"
        rows.append(["GPU", f"none ({why})"])
    rows.append(["distributed", _backends()])
    return rows


def choices(device: torch.device) -> list[list[str]]:
    """[option, what `auto` means on this machine]."""
    dtype = choose_precision("auto", device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_memory()
    tokens = free // 4 // BYTES_PER_TOKEN
    return [
        ["device", str(device)],
        ["--runtime.precision", f"{str(dtype).removeprefix('torch.')}, master weights fp32"],
        ["--runtime.attention", choose_attention("auto", device, dtype)],
        ["--runtime.placement", f"device, for pools of up to {tokens:,} tokens (a quarter of free memory); else mmap"],
        ["launch", "torchrun with nccl" if device.type == "cuda" else "one process, or torchrun with gloo"],
    ]


def test_dtypes(device: torch.device) -> list[torch.dtype]:
    """fp32, and what `auto` computes in."""
    return list(dict.fromkeys([torch.float32, choose_precision("auto", device)]))


def self_test(device: torch.device, dtype: torch.dtype) -> list[Check]:
    """The head's loss and gradients against `F.cross_entropy` in float64, on the same (rounded) inputs.

    What counts is not the error itself but that it is of the size that PyTorch's own cross-entropy has in `dtype`.
    """
    rows, width, vocabulary = TEST_SHAPE
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(device, dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(device, dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    targets[::5] = -100
    slots = torch.zeros(rows, dtype=torch.int64, device=device)

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, targets, sample_ids=slots, num_samples=1, chunk_bytes=TEST_CHUNK_BYTES).loss

    def theirs(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), targets)

    truth = _loss_and_gradients(theirs, hidden.double(), weight.double())
    found = _loss_and_gradients(ours, hidden, weight)
    usual = _loss_and_gradients(theirs, hidden, weight)
    floor = 4 * torch.finfo(dtype).eps
    name = str(dtype).removeprefix("torch.")
    return [
        Check(f"{what}, {name}", _relative_error(a, t), _relative_error(b, t), floor)
        for what, a, b, t in zip(("loss", "gradient of hidden", "gradient of weight"), found, usual, truth, strict=True)
    ]


def _loss_and_gradients(function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor) -> list[Tensor]:
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(h, w)
    # An upstream gradient other than 1, which an op that ignores it would not survive.
    return [loss.detach(), *torch.autograd.grad(loss, (h, w), torch.full_like(loss, 0.7))]


def _relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).abs().max() / truth.abs().max())


def _backends() -> str:
    if not torch.distributed.is_available():
        return "none: this build of torch trains on one process only"
    checks = {
        "nccl": torch.distributed.is_nccl_available,
        "gloo": torch.distributed.is_gloo_available,
        "mpi": torch.distributed.is_mpi_available,
    }
    return ", ".join(name for name, available in checks.items() if available())


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _available_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{_gib(memory.available)} of {_gib(memory.total)} GiB free"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
