"""Random numbers as a pure function of (seed, counters), in int64 tensor arithmetic.

Nothing is drawn from a generator with hidden state: the same counters give the same bits on CPU and GPU, on every
rank, and after a resume. The hash is the output function of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable
pseudorandom number generators"), chained over the counters. int64 tensors wrap on overflow, so signed arithmetic
gives the same bits as unsigned.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
ORDER_BITS = 62  # an order key stays below int64's largest value, which then can stand for "not in this order"


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as `value`."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """Logical shift; torch's `>>` copies the sign bit down."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def mix64(bits: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64 tensors of any shape: a bijection; each input bit flips half the output bits.

    In place on what the shifts allocate: for a whole pool, a fresh tensor for every operation costs more than the
    operations.
    """
    bits = _shift_right(bits, 30).bitwise_xor_(bits).mul_(_signed(0xBF58476D1CE4E5B9))
    bits = _shift_right(bits, 27).bitwise_xor_(bits).mul_(_signed(0x94D049BB133111EB))
    return _shift_right(bits, 31).bitwise_xor_(bits)


def random_bits(seed: int, *counters: Tensor) -> Tensor:
    """64 random bits, as int64, for every combination of the counters (int64, broadcast against each other)."""
    bits = torch.full((), _signed(seed), dtype=torch.int64, device=counters[0].device)
    for counter in counters:
        bits = mix64(bits + (counter + 1).mul_(_signed(GOLDEN)))
    return bits


def order_keys(seed: int, *counters: Tensor) -> Tensor:
    """Random sort keys in [0, 2**62), int64. That any two of N keys are equal has a probability of about N^2 / 2^63."""
    return _shift_right(random_bits(seed, *counters), 64 - ORDER_BITS)


def uniform(seed: int, *counters: Tensor) -> Tensor:
    """fp32 numbers in [0, 1): the top 24 bits, which fp32 holds exactly, so that none rounds up to 1."""
    return _shift_right(random_bits(seed, *counters), 40).to(torch.float32).mul_(2.0**-24)
