"""The LM head on a CPU, forward and backward, against `h @ W.T` and fp32 cross-entropy: ratio of median times, in turns.

    python bench/head_cpu.py
"""
from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from lead_kernels import linear_cross_entropy


def ratio(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, turns: int = 9) -> float:
    h = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    w = (torch.randn(vocabulary, hidden) * 0.05).to(dtype).requires_grad_()
    y, samples = torch.randint(0, vocabulary, (tokens,)), torch.arange(tokens) // 64

    def ours() -> torch.Tensor:
        return linear_cross_entropy(h, w, y, sample_ids=samples, num_samples=tokens // 64, chunk_bytes=8 << 20).loss

    def plain() -> torch.Tensor:
        return F.cross_entropy((h @ w.T).float(), y)

    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(turns):
        for name, loss in (("ours", ours), ("plain", plain)):
            h.grad = w.grad = None
            started = time.perf_counter()
            loss().backward()
            times[name].append(time.perf_counter() - started)
    return statistics.median(times["ours"]) / statistics.median(times["plain"])


if __name__ == "__main__":
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for shape in ((2048, 256, 4096), (1024, 512, 8192)):
            for dtype in (torch.float32, torch.bfloat16):
                print(f"{threads} threads, T, H, V = {shape}, {dtype}: {ratio(*shape, dtype):.2f}")
