"""Whatever seed a config takes, everything that draws from it takes too."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lead_engine.base.errors import UserError
from lead_engine.config import TrainConfig
from lead_engine.model.adapter import initialise
from lead_engine.prepare.difficulty import cluster_by_difficulty, tasks_by_topic
from lead_engine.selection import counter_rng
from lead_engine.selection.loss_change import make_loss_change
from lead_engine.selection.methods.random_matched import like_permutation


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**31, 2**32 - 1])
def test_every_generator_takes_the_first_and_last_seeds(seed: int) -> None:
    assert TrainConfig("p", "m", "o", seed=seed).seed == seed
    values = torch.rand(40, generator=torch.Generator().manual_seed(seed))
    cluster, _ = cluster_by_difficulty(values, values > 0.9, 3, seed)
    assert set(cluster.tolist()) == {0, 1, 2}
    assert len(tasks_by_topic(torch.randn(40, 4), 3, seed)[1]) == 3
    ids = torch.arange(9)
    assert float(counter_rng.uniform(seed, ids).min()) >= 0
    assert len(set(counter_rng.order_keys(seed, ids).tolist())) == 9
    assert make_loss_change("inner", 4, 1, "cpu", seed, sketch_dim=2).signature is not None
    zeros = np.zeros(9, dtype=np.int64)
    assert sorted(like_permutation(zeros, zeros + 1, zeros + 2, zeros > 0, seed)) == list(range(9))
    initialise(torch.nn.Linear(2, 2), seed, skip=False)
    np.random.default_rng(seed), np.random.RandomState(seed), random.Random(seed), torch.manual_seed(seed)


@pytest.mark.parametrize("seed", [-1, 2**32, 99999999999, 18446744073709551616])
def test_others_are_refused_before_anything_is_read(seed: int) -> None:
    with pytest.raises(UserError, match=f"^--seed {seed}: must be between 0 and 4294967295$"):
        TrainConfig("p", "m", "o", seed=seed)
