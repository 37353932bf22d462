"""The fine stage of the selection: tasks in proportion in every prefix of the order, the best samples first.

On a GPU a radix select over the pool (`radix_select`), in host memory a sort of the eligible samples. Both take of each
task only as many samples as can be among the first k (`task_shares`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lead_kernels.backend import current_device, uses_kernels
from lead_kernels.checks import GROUP_DTYPES, check_device, check_shape
from lead_kernels.radix_select import select_on_gpu
from lead_kernels.task_shares import ascending, reach_of, share, task_quota

MAX_SAMPLES = 2**30
"""So that a key has at most 62 bits, and a quota's products and a share's fraction fit into int64."""
MAX_WEIGHT = 2**28
"""So that the products of a weighted quota fit into int64, and 62 bits after the point tell weighted shares apart."""
OFFSETS = 2**12
"""Steps in which a task's first key may lie; times a weight of 2^18 they are a denominator of 2^30."""


def _descending_on_host(utility: Tensor) -> Tensor:
    """`_descending` in PyTorch."""
    bits = (torch.where(utility.isnan(), -torch.inf, utility) + 0.0).view(torch.int32)
    return 0x7FFFFFFF - (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def _on_host(
    utility: Tensor,
    eligible: Tensor,
    task: Tensor,
    num_tasks: int,
    k: int,
    weight: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """The eligible samples' number is known here, and sorting them all as integers is no slower than selecting."""
    num_samples = utility.shape[0]
    ids = eligible.nonzero().squeeze(1)
    group = task.index_select(0, ids).long()
    descending = _descending_on_host(utility.index_select(0, ids))
    by_task = torch.sort((group << 32) | descending, stable=True).indices  # ids ascend, and stay so among equal ones

    # Of each task, its c_j best samples: they stand at the beginning of its part of `by_task`.
    size_J = torch.bincount(group, minlength=num_tasks)
    reach = reach_of(k, num_samples, num_tasks, offset is not None)
    quota_J = task_quota(size_J, weight, reach, offset is not None)
    group = torch.repeat_interleave(quota_J)
    rank = torch.arange(group.shape[0]) - (quota_J.cumsum(0) - quota_J).index_select(0, group)
    if weight is None:
        order = torch.sort(share(rank, size_J.index_select(0, group)), stable=True).indices
    elif offset is None:
        order = ascending(2 * rank + 1, 2 * weight.index_select(0, group))
    else:
        order = ascending((rank << 12) + offset.index_select(0, group), weight.index_select(0, group) << 12)
    best = order[:k]
    place = (size_J.cumsum(0) - size_J).index_select(0, group[best]) + rank[best]
    return ids[by_task[place]]


@torch.library.custom_op("lead_kernels::select_topk", mutates_args=())
def _select_topk(
    utility: Tensor,
    eligible: Tensor,
    task: Tensor,
    num_tasks: int,
    k: int,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    with current_device(utility):
        if weight is not None:  # a wrong one would give more candidates than there is room for
            weight = weight.clamp(0, MAX_WEIGHT if offset is None else MAX_WEIGHT >> 10).contiguous()
        if offset is not None:
            offset = offset.clamp(0, OFFSETS - 1).contiguous()
        form = select_on_gpu if uses_kernels(utility) else _on_host
        order = form(utility, eligible, task, num_tasks, k, weight, offset)
        missing = k - order.shape[0]
        return torch.cat([order, order.new_full((missing,), utility.shape[0])]) if missing else order


@_select_topk.register_fake
def _(
    utility: Tensor,
    eligible: Tensor,
    task: Tensor,
    num_tasks: int,
    k: int,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    return utility.new_empty((k,), dtype=torch.int64)


def select_topk(
    utility: Tensor,
    eligible: Tensor,
    task: Tensor,
    num_tasks: int,
    k: int,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The first `k` eligible samples, tasks interleaved in proportion to their eligible samples, highest utility first.

    Within a task, samples are ranked r = 0, 1, ... by utility descending, ties by id. A sample's key is (r + 0.5) /
    (eligible samples of its task), and the order is by key ascending, ties by task, compared exactly. So any prefix
    holds the tasks in proportion: of m samples, m n_j / n of task j to within 1/2 + J/2 n_j / n (J tasks, n_j eligible
    samples of task j, n of all).

    Args:
        utility: fp32 [N]; NaN ranks last, with -inf.
        eligible: bool [N].
        task: integer [N] in [0, num_tasks), which is not checked. Any integer type; one byte is read fastest.
        num_tasks, k: at least 1.
        weight: int64 [num_tasks], 0 to 2^28 (not checked: what is outside counts as the nearest of these). The key is
            then (r + 0.5) / weight[task]: tasks of equal weight get equally many places, whatever their sizes. A task
            of weight 0 gives no sample. When a task runs out, the others fill the places in proportion to their
            weights. Weights in proportion to the eligible samples give the same order as None.
        offset: int64 [num_tasks], 0 to 4095, only with weights, which may then be at most 2^18. The key is then
            (r + offset[task] / 4096) / weight[task]. With 1/2 for all, a task that is due less than half a sample in a
            prefix gets none, and again in every short prefix; with offsets drawn uniformly it gets what it is due on
            average.

    Returns:
        int64 [k] ids. Entries past the number of eligible samples (of the tasks with a weight) are N.

    Raises:
        ValueError: shapes, dtypes, devices, k or num_tasks below 1, N above 2^30, or offset without weight.

    Time and memory: see `radix_select.launch_shape`; weights add a sort of [num_tasks] and one of the candidates.
    """
    num_samples = utility.shape[0]
    check_shape("utility", utility, (num_samples,), (torch.float32,))
    check_shape("eligible", eligible, (num_samples,), (torch.bool,))
    check_shape("task", task, (num_samples,), GROUP_DTYPES)
    if weight is not None:
        check_shape("weight", weight, (num_tasks,), (torch.int64,))
    if offset is not None:
        check_shape("offset", offset, (num_tasks,), (torch.int64,))
        if weight is None:
            raise ValueError("offset is given without weight: give both")
    check_device(utility.device, eligible=eligible, task=task, weight=weight, offset=offset)
    if not 1 <= num_samples <= MAX_SAMPLES or num_tasks < 1 or k < 1:
        found = f"{num_samples} samples, num_tasks {num_tasks}, k {k}"
        raise ValueError(f"{found}: expected 1 to 2^30 samples, and at least 1 of the others")
    order: Tensor = _select_topk(utility, eligible, task, num_tasks, k, weight, offset)
    return order
