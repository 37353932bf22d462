"""The order of the fine stage: proportional prefixes, the highest utility first, ties, dummies."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lead_kernels import reference, select_topk

VALUES = st.sampled_from([0.0, -0.0, 1.5, -2.0, 1e-40, -1e-40, 3e38, -3e38, torch.inf, -torch.inf, 0.1, 0.2])


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(st.tuples(VALUES, st.booleans(), st.integers(0, 3)), min_size=1, max_size=40), k=st.integers(1, 50))
def test_agrees_with_reference(rows: list[tuple[float, bool, int]], k: int) -> None:
    utility, eligible, task = (torch.tensor(column) for column in zip(*rows, strict=True))
    assert torch.equal(select_topk(utility, eligible, task, 4, k), reference.select_topk(utility, eligible, task, 4, k))


def test_every_prefix_is_proportional_and_takes_the_best() -> None:
    g = torch.Generator().manual_seed(0)
    count, tasks = 3000, 5
    utility, eligible = torch.randn(count, generator=g), torch.rand(count, generator=g) < 0.7
    task = torch.multinomial(torch.tensor([0.5, 0.3, 0.15, 0.049, 0.001]), count, replacement=True, generator=g)
    order = select_topk(utility, eligible, task, tasks, 2500)
    valid = order[order < count]
    assert len(valid) == int(eligible.sum()) == len(set(valid.tolist()))
    sizes = torch.bincount(task[eligible], minlength=tasks)
    share = sizes / sizes.sum()
    for length in range(1, len(valid) + 1):
        taken = torch.bincount(task[valid[:length]], minlength=tasks)
        assert bool(((taken - length * share).abs() <= 0.5 + tasks / 2 * share + 1e-9).all())
    for label in range(tasks):
        chosen = utility[valid[task[valid] == label]]
        assert torch.equal(chosen, chosen.sort(descending=True).values)


def test_ties_go_by_task_and_then_by_id() -> None:
    utility, eligible = torch.zeros(6), torch.ones(6, dtype=torch.bool)
    assert select_topk(utility, eligible, torch.tensor([1, 0, 1, 0, 1, 0]), 2, 6).tolist() == [1, 0, 3, 2, 5, 4]
    assert select_topk(utility, eligible, torch.zeros(6, dtype=torch.int64), 1, 4).tolist() == [0, 1, 2, 3]


def test_nan_comes_last_and_ineligible_never() -> None:
    utility = torch.tensor([torch.nan, 1.0, -torch.inf, 5.0])
    eligible = torch.tensor([True, True, True, False])
    assert select_topk(utility, eligible, torch.zeros(4, dtype=torch.int64), 1, 6).tolist() == [1, 0, 2, 4, 4, 4]
    nobody = torch.zeros(4, dtype=torch.bool)
    assert select_topk(utility, nobody, torch.zeros(4, dtype=torch.int64), 1, 2).tolist() == [4, 4]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"utility is torch\.float64"):
        select_topk(torch.zeros(3).double(), torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64), 1, 2)
    with pytest.raises(ValueError, match="eligible has shape"):
        select_topk(torch.zeros(3), torch.ones(2, dtype=torch.bool), torch.zeros(3, dtype=torch.int64), 1, 2)
