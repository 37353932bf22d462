"""The pool as a selection sees it: vectors over its samples, on the training device.

In bytes a sample: utility 4, visits 4, tokens 8, response tokens 4, dropped and barred 1 each, cluster, task and cell 1
each (2 where there are more than 256 of them). That is 25: 15 MB for 600 thousand samples, 2.5 GB for 100 million.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lead_engine.pool.state import PoolState


class Samples:
    """N samples. Sample id N is the dummy of empty slots; vectors that are indexed by planned ids have an entry for it,
    at their end.

    lengths int64 [N], tokens; rows int32 [N+1], counted response tokens; cluster, task [N], of the smallest integer
    type that holds them; dropped bool [N]; utility fp32 [N+1], U, at first as `prepare` measured it; visits int32
    [N+1], how often a sample was trained; barred bool [N+1], whose loss was not finite once: no method names them
    again.

    A *cell* is a cluster's part of a task: cell = cluster x num_tasks + task.
    """

    def __init__(self, state: PoolState, lengths: Tensor, response_rows: Tensor, device: torch.device | str) -> None:
        self.device = device = torch.device(device)
        self.num_samples = len(state.utility)
        self.num_tasks, self.num_clusters = len(state.task_names), state.num_clusters
        self.num_cells = self.num_clusters * self.num_tasks
        self.lengths = lengths.to(device)
        self.rows = F.pad(response_rows.to(device, torch.int32), (0, 1))
        self.cluster = state.cluster.to(_narrowest(self.num_clusters)).to(device)
        self.task = state.task.to(_narrowest(self.num_tasks)).to(device)
        self.cell = (state.cluster * self.num_tasks + state.task).to(_narrowest(self.num_cells)).to(device)
        self.dropped = state.dropped.to(device)
        self.utility = F.pad(state.utility.to(device, torch.float32), (0, 1))
        self.visits = torch.zeros(self.num_samples + 1, dtype=torch.int32, device=device)
        self.barred = torch.zeros(self.num_samples + 1, dtype=torch.bool, device=device)

    def scalar(self, value: int) -> Tensor:
        """A host number on the device, by a fill: a copy from pageable memory would make the host wait."""
        return torch.full((), value, dtype=torch.int64, device=self.device)

    def real(self, ids: Tensor) -> Tensor:
        """The ids with the dummy replaced by any sample, to index vectors of N entries."""
        return ids.clamp(max=self.num_samples - 1)

    def count(self, group: Tensor, ids: Tensor, mask: Tensor, size: int) -> Tensor:
        """int64 [size]: how many of `ids` lie in each group (of the vector `group` [N]), where `mask` holds."""
        return count(group[self.real(ids)], mask, size)


def count(index: Tensor, mask: Tensor, size: int) -> Tensor:
    """int64 [size]: how often each index occurs where `mask` holds. (`bincount` would make the host wait.)"""
    counts = torch.zeros(size, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index.reshape(-1).long(), mask.reshape(-1).long())


def _narrowest(count: int) -> torch.dtype:
    """The smallest integer type that holds 0 to count - 1: planning reads clusters and tasks of the whole pool."""
    return torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32
