"""The utility update: the formula, visits, dummies."""
from __future__ import annotations

import pytest
import torch

from lead_kernels import idu_update, reference


def test_agrees_with_reference_and_leaves_the_rest_alone() -> None:
    g = torch.Generator().manual_seed(0)
    utility, visits = torch.randn(21, generator=g), torch.arange(21, dtype=torch.int32)
    ids = torch.tensor([[3, 20, 7, 20], [0, 19, 20, 12]])
    loss, change = torch.randn(2, 4, generator=g), torch.randn(2, 4, generator=g)
    exact, exact_visits = utility.double(), visits.clone()
    reference.idu_update(exact, exact_visits, ids, loss.double(), change.double(), 0.1)
    before = utility.clone()
    idu_update(utility, visits, ids, loss, change, 0.1)
    torch.testing.assert_close(utility.double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(visits, exact_visits)
    untouched = [i for i in range(21) if i not in {3, 7, 0, 19, 12}]
    assert torch.equal(utility[untouched], before[untouched])


def test_dummies_do_nothing_whatever_they_carry() -> None:
    utility, visits = torch.ones(4), torch.zeros(4, dtype=torch.int32)
    idu_update(utility, visits, torch.full((3,), 3), torch.tensor([torch.nan, torch.inf, 2.0]), torch.zeros(3), 0.5)
    assert utility.tolist() == [1.0] * 4
    assert visits.tolist() == [0] * 4


def test_smoothing_keeps_a_share_of_the_old_value() -> None:
    utility, visits = torch.tensor([2.0, 0.0]), torch.zeros(2, dtype=torch.int32)
    idu_update(utility, visits, torch.tensor([0]), torch.tensor([1.0]), torch.tensor([-0.5]), 0.1)
    assert utility[0].item() == pytest.approx(0.9 * 0.5 + 0.1 * 2.0)
    assert visits.tolist() == [1, 0]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="visits"):
        idu_update(torch.ones(3), torch.zeros(3, dtype=torch.int64), torch.tensor([0]), torch.ones(1), torch.ones(1), 0.1)
    with pytest.raises(ValueError, match="loss has shape"):
        idu_update(torch.ones(3), torch.zeros(3, dtype=torch.int32), torch.tensor([0]), torch.ones(2), torch.ones(1), 0.1)
