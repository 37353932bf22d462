"""Samples that the tests of the token store write."""

from __future__ import annotations

import numpy as np

PLACEMENTS = ("device", "pinned", "mmap")
Samples = list[tuple[list[int], list[bool]]]


def make_samples(count: int = 60, seed: int = 0, longest: int = 40) -> Samples:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest, count)
    return [(rng.integers(0, 5000, n).tolist(), (rng.random(n) < 0.5).tolist()) for n in sizes]
