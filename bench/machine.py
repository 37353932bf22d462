"""What every result file says about where it was measured."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """Machine and versions."""
    names = ("torch", "transformers", "triton", "peft", "numpy")
    gpu = torch.cuda.is_available()
    return {
        "date": date.today().isoformat(),
        "processor": torch.cuda.get_device_name() if gpu else _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names if _installed(name)},
    }


def product_tflops(dtype: torch.dtype) -> float:
    """TFLOP/s of one large matrix product here, the best of several: 8192 wide on a GPU, 1024 on a CPU."""
    gpu = torch.cuda.is_available()
    width = 8192 if gpu else 1024
    a, b = (torch.randn(width, width, dtype=dtype, device="cuda" if gpu else "cpu") for _ in range(2))
    return 2 * width**3 / _best_seconds(lambda: a @ b) / 1e12


def copy_gb_per_s(size: int) -> float:
    """What copying `size` bytes reaches here, in GB/s read and written: the best of several."""
    source = torch.empty(size, dtype=torch.int8, device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source)) / 1e9


def _best_seconds(run: Callable[[], object], repeats: int = 8) -> float:
    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    times = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - started)
    return min(times)


def write(name: str, result: dict[str, Any], out: Path | None) -> None:
    """Print a result and keep it in OUT, or bench/results/NAME.json."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"bench": name, **describe(), **result}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    print(text)


def arguments(description: str) -> argparse.ArgumentParser:
    """The flags that every engine benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pool", type=Path, required=True, help="prepared pool")
    parser.add_argument("--model", required=True, help="model folder or hub name")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/NAME.json")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--capacity", type=int, default=4096, help="tokens in a micro-batch")
    parser.add_argument("--lr", type=float, default=5e-4)
    return parser


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    """What this machine reaches: the yardsticks of every other result."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, help="result file; default bench/results/machine.json")
    flags = parser.parse_args()
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    rates = {"product_tflops": product_tflops(dtype), "copy_gb_per_s": copy_gb_per_s(1 << (32 if gpu else 26))}
    write("machine", rates, flags.out)


if __name__ == "__main__":
    main()
