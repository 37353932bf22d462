"""The fine stage of the selection: an order in which every prefix holds the tasks in proportion and the best samples of each."""
from __future__ import annotations

import torch
from torch import Tensor

from lead_kernels.checks import check_device, check_shape


def _descending_bits(utility: Tensor) -> Tensor:
    """Map fp32 to int64 in [0, 2^32) so that larger utilities become smaller integers; NaN counts as -inf, -0 as 0."""
    utility = torch.where(utility.isnan(), -torch.inf, utility) + 0.0
    bits = utility.view(torch.int32).long()
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # IEEE 754: negative floats order the wrong way round
    return 2**31 - 1 - ascending


def select_topk(utility: Tensor, eligible: Tensor, task: Tensor, num_tasks: int, k: int) -> Tensor:
    """The first `k` eligible samples, tasks interleaved in proportion to their eligible samples, the highest utility first.

    utility: fp32 [N] (NaN ranks last); eligible: bool [N]; task: int64 [N] in [0, num_tasks). Returns int64 [k]; entries past the number
    of eligible samples are N.

    Within a task, samples are ranked r = 0, 1, ... by utility descending (ties by id); a sample's key is (r + 0.5) / (eligible samples of
    the task), and the order is by key ascending (ties by task). The samples of task j with key <= x number x n_j to within 1/2, so
    that with J tasks the share of task j in any prefix of m samples is within 1/2 + J/2 n_j / n of m n_j / n (n = all eligible).
    """
    num_samples = utility.shape[0]
    check_shape("utility", utility, (num_samples,), (torch.float32,))
    check_shape("eligible", eligible, (num_samples,), (torch.bool,))
    check_shape("task", task, (num_samples,), (torch.int64,))
    check_device(utility.device, eligible=eligible, task=task)

    # One stable sort for (task, utility, id): the task in the upper bits, ineligible samples in a task of their own at the end.
    group = torch.where(eligible, task, num_tasks)
    sorted_keys, by_task = torch.sort(group * 2**32 + _descending_bits(utility), stable=True)
    edges = torch.searchsorted(sorted_keys, torch.arange(num_tasks + 1, device=task.device) * 2**32)
    starts, counts = edges[:-1], edges.diff()

    # No task can give more than its first k: the keys of this grid decide, and the pool need not be sorted again.
    width = min(k, num_samples)
    rank = torch.arange(width, device=task.device)
    keys = (rank + 0.5).double() / counts.clamp(min=1)[:, None]
    exists = rank < counts[:, None]
    best = torch.sort(torch.where(exists, keys, torch.inf).flatten(), stable=True).indices[:k]
    sample = by_task[(starts[:, None] + rank).clamp(max=num_samples - 1)]
    order = torch.where(exists, sample, num_samples).flatten()[best]
    return torch.cat([order, order.new_full((k - order.shape[0],), num_samples)])
