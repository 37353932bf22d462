"""The counter-based generator against published numbers and Python's own integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lead_engine.selection import counter_rng

MASK = (1 << 64) - 1


def scalar(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


def slow_mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def slow_bits(seed: int, *counters: int) -> int:
    bits = seed & MASK
    for counter in counters:
        bits = slow_mix((bits + (counter + 1) * 0x9E3779B97F4A7C15) & MASK)
    return bits


def test_first_outputs_of_splitmix64_seeded_with_0():
    """Counter n of seed 0 is the (n+1)th output of the published generator."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [int(v) & MASK for v in counter_rng.random_bits(0, torch.arange(4))] == published


@given(seed=st.integers(-(2**70), 2**70), counters=st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_equals_python_integers(seed, counters):
    tensors = [scalar(c) for c in counters]
    bits = slow_bits(seed, *counters)
    assert int(counter_rng.random_bits(seed, *tensors)) & MASK == bits
    assert int(counter_rng.order_keys(seed, *tensors)) == bits >> 2
    assert float(counter_rng.uniform(seed, *tensors)) == (bits >> 40) / 2**24


def test_uniform_never_reaches_one(monkeypatch):
    monkeypatch.setattr(counter_rng, "random_bits", lambda seed, *counters: torch.tensor([-1, 0]))
    high, low = counter_rng.uniform(0).tolist()
    assert low == 0
    assert 1 - 2**-23 < high < 1


@pytest.mark.parametrize("vary", ["seed", "stream", "counter"])
def test_uniform_is_flat_and_every_argument_matters(vary):
    n = 4096
    if vary == "seed":
        values = torch.stack([counter_rng.uniform(seed, scalar(0), scalar(7)) for seed in range(n)])
    elif vary == "stream":
        values = counter_rng.uniform(3, torch.arange(n), scalar(7))
    else:
        values = counter_rng.uniform(3, scalar(0), torch.arange(n))
    counts = torch.histc(values, 16, 0, 1)
    assert ((counts - n / 16) ** 2 / (n / 16)).sum() < 37.7  # chi-squared, 15 degrees of freedom, 0.1 %
    assert abs(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]) < 4 / n**0.5


def test_keys_of_a_large_pool_are_distinct():
    keys = counter_rng.order_keys(1, scalar(1), scalar(0), torch.arange(1 << 20))
    assert keys.unique().numel() == 1 << 20
    assert 0 <= int(keys.min()) <= int(keys.max()) < 1 << 62
