from __future__ import annotations

import pytest
import torch

from lead_engine.base.errors import UserError
from lead_engine.prepare.difficulty import cluster_by_difficulty, difficulty, tasks_by_name, tasks_by_topic


def test_difficulty_is_a_ratio_of_mean_losses() -> None:
    ratio = difficulty(torch.tensor([1.0, 3.0, 0.0, 2.0]), torch.tensor([2.0, 3.0, 1.0, 0.0]))
    assert ratio.tolist() == [0.5, 1.0, 0.0, 1.0]


def test_clusters_are_ordered_and_separate_what_is_separate() -> None:
    torch.manual_seed(0)
    ratio = torch.cat(
        [
            0.3 + 0.01 * torch.randn(40),
            0.9 + 0.01 * torch.randn(10),
            0.6 + 0.01 * torch.randn(20),
            torch.tensor([1.2, 5.0]),
        ]
    )
    dropped = ratio >= 1
    cluster, centers = cluster_by_difficulty(ratio, dropped, 3, seed=0)
    assert cluster[~dropped].tolist() == [0] * 40 + [2] * 10 + [1] * 20
    assert centers == sorted(centers)
    for k, center in enumerate(centers):
        assert center == pytest.approx(float(ratio[~dropped & (cluster == k)].mean()), abs=1e-5)


def test_too_many_clusters_are_refused() -> None:
    with pytest.raises(UserError, match="--clusters 3"):
        cluster_by_difficulty(torch.tensor([0.1, 0.1, 0.2, 2.0]), torch.tensor([False, False, False, True]), 3, seed=0)


def test_tasks_by_name() -> None:
    task, names = tasks_by_name(["maths", "", "code", "maths"])
    assert names == ["code", "maths", "unnamed"]
    assert task.tolist() == [1, 2, 0, 1]


def test_tasks_by_topic_follow_directions() -> None:
    torch.manual_seed(0)
    means = torch.cat(
        [torch.tensor([[1.0, 0, 0]]) * torch.rand(30, 1), torch.tensor([[0, 1.0, 0]]) * (1 + torch.rand(30, 1))]
    )
    task, names = tasks_by_topic(means + 1e-3 * torch.randn(60, 3), 2, seed=0)
    assert len(names) == 2
    assert task[:30].unique().numel() == task[30:].unique().numel() == 1
    assert task[0] != task[-1]
    with pytest.raises(UserError, match="--tasks 3"):
        tasks_by_topic(means[:2], 3, seed=0)
