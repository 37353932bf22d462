"""Whom the message about skipped steps blames."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lead_engine.base.errors import UserError
from lead_engine.training.diagnosis import SkippedSteps

IDS = torch.tensor([[[0, 1, 2], [3, 4, 6]]])  # one step of two micro-batches; 6 is the dummy
NAMES = [f"s{i}" for i in range(6)]


def told(barred: list[int]) -> str:
    """What is said when the losses of these samples were not finite."""
    nan = torch.tensor(torch.nan)
    skipped = SkippedSteps(0, NAMES, Path("RUN"), Path("POOL"))
    finished = SimpleNamespace(header=SimpleNamespace(tokens=[9]), dummy=6, before=SimpleNamespace(step=4, round=1))
    bad = torch.isin(IDS, torch.tensor([*barred, 6]))
    values = SimpleNamespace(
        steps=[SimpleNamespace(skipped=True, loss=nan, grad_norm=nan)],
        plan=SimpleNamespace(sample_ids=IDS),
        stats=SimpleNamespace(barred=bad),
    )
    with pytest.raises(UserError) as error:
        skipped.add(finished, values)
    return str(error.value)


@pytest.mark.parametrize("barred", [[1], [1, 4]])
def test_samples_in_micro_batches_of_their_own_are_to_blame(barred: list[int]) -> None:
    names = ", ".join(NAMES[i] for i in barred)
    assert f"samples {names} (whose own loss was not finite)" in told(barred)


def test_neighbours_in_a_micro_batch_may_have_been_spoilt() -> None:
    assert "samples s0, s2, s4 (whose own loss was not finite; several in one micro-batch: one of them may" in told(
        [0, 2, 4]
    )


def test_without_a_loss_that_is_not_finite_nobody_is_picked_out() -> None:
    assert "samples s0, s1, s2, s3, s4 (all of the step: each one's own loss was finite)" in told([])
