"""A round through the interpreted kernels gives what the host form gives, without a read of the device."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from kernel_round import CASES, TOLERANCE, assert_agree, step, world
from lead_kernels import backend

pytestmark = pytest.mark.slow


@pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET"), reason="kernels run on CPU tensors only in Triton's interpreter"
)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [("plain", dtype) for dtype in TOLERANCE] + [(case, torch.bfloat16) for case in CASES if case != "plain"],
)
def test_a_round_gives_what_the_host_gives(
    monkeypatch: pytest.MonkeyPatch, no_host_reads: Any, case: str, dtype: torch.dtype
) -> None:
    w, expected = world("cpu", dtype), step(world("cpu", dtype), case)
    monkeypatch.setattr(backend, "_kernels_on_cpu", True)
    with no_host_reads():
        ours = step(w, case)
    assert_agree(ours, expected, dtype)
