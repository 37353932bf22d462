"""How many samples of each task the first k places can hold, and in what order tasks take turns: exact, in int64.

Legend: J tasks, n_j eligible samples of task j, n of all, w_j its weight, c_j its quota, r a sample's rank in its task.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reach_of(k: int, num_samples: int, num_tasks: int, offset: bool = False) -> int:
    """2 (k - 1) + J, see `quota`, with offsets 2 (k - 1) + 2 J; more than N places change nothing."""
    tasks = 2 * num_tasks if offset else num_tasks
    return 2 * (min(k, num_samples) - 1) + tasks


def quota(size_J: Tensor, reach: int) -> Tensor:
    """c_j = min(n_j, floor((n_j (2 (k - 1) + J) + n) / (2 n))): the most samples of task j among the first k.

    Let x be the k-th key of the order. Of task j, ceil(x n_j - 1/2) samples have keys below x, and these are fewer than
    k over all tasks: x n - J/2 <= k - 1. And floor(x n_j + 1/2) of its samples have keys up to x, so that c_j =
    floor(n_j (k - 1 + J/2) / n + 1/2) is enough. The sum over the tasks is at most k - 1 + J/2 + J/2.
    """
    eligible = size_J.sum()
    return torch.minimum(size_J, (size_J * reach + eligible) // (2 * eligible).clamp(min=1))


def weighted_quota(size_J: Tensor, weight_J: Tensor, reach: int, offset: bool = False) -> Tensor:
    """c_j = min(n_j, floor(X w_j + 1/2)): the most samples of task j among the first k, where tasks may run out before.

    X is the level up to which water fills the tasks, vessels of width w_j and volume n_j, when k - 1 + J/2 of it are
    poured in: f(X) = sum_j min(n_j, X w_j) = k - 1 + J/2; no bound where they hold less. A task without weight holds
    nothing: n_j = 0 below.

    Let x be the k-th key of the order, or the last if there are fewer. Of task j, min(n_j, ceil(x w_j - 1/2)) >=
    min(n_j, x w_j) - 1/2 samples have keys below x, and these are fewer than k over all tasks: f(x) <= k - 1 + J/2 and
    so, f growing up to the last key, x <= X. And min(n_j, floor(x w_j + 1/2)) of its samples have keys up to x, so that
    c_j is enough. The sum over the tasks is at most f(X) + J/2 <= k - 1 + J.

    With the tasks in ascending order of n_j / w_j, where they run out, let N be the samples of those before task j and
    W the weights of the others. Task j has run out at X where f(n_j / w_j) = N + W n_j / w_j <= k - 1 + J/2, that is
    where n_j <= w_j (2 (k - 1) + J - 2 N) / (2 W). These tasks taken out, X = (2 (k - 1) + J - 2 N) / (2 W) with the N
    of all of them and the W of the rest. All in int64: with n <= 2^30 and w_j <= 2^28 the products stay below
    2^28 (2^31 + J).

    With `offset`, keys are (r + u_j) / w_j for any u_j in [0, 1). Then min(n_j, x w_j) - 1 samples at least have keys
    below x and min(n_j, floor(x w_j) + 1) at most keys up to x: reach is 2 (k - 1) + 2 J, c_j = min(n_j, floor(X w_j) +
    1), and their sum at most k - 1 + 2 J.
    """
    size_J = size_J * (weight_J > 0)
    order = ascending(size_J, weight_J.clamp(min=1))
    size, weight = size_J[order], weight_J[order]
    size_before = size.cumsum(0) - size
    weight_left = weight.sum() - (weight.cumsum(0) - weight)  # of this task and those after it
    runs_out = size <= weight * (reach - 2 * size_before) // (2 * weight_left).clamp(min=1)
    # The level X is rest / (2 left) for the tasks that do not run out.
    rest, left = reach - 2 * (size * runs_out).sum(), (weight * ~runs_out).sum()
    rounding = 2 * left if offset else left  # floor(X w_j) + 1, or floor(X w_j + 1/2)
    bound_J = (weight_J * rest + rounding) // (2 * left).clamp(min=1)
    return torch.where(left > 0, torch.minimum(size_J, bound_J), size_J)


def fraction(above: Tensor, below: Tensor) -> Tensor:
    """floor(2^62 a / b) for 0 <= a < b <= 2^31, in int64."""
    high = (above << 31) // below
    rest = (above << 31) - high * below
    return (high << 31) | ((rest << 31) // below)


def share(rank: Tensor, size: Tensor) -> Tensor:
    """floor(2^62 (2 r + 1) / (2 n)): orders candidates by (r + 1/2) / n exactly, in int64.

    Two unequal fractions with denominators 2 n and 2 m differ by at least 1 / (2 n m) > 2^-62, as n + m <= 2^30; equal
    ones stay equal.
    """
    return fraction(2 * rank + 1, 2 * size)


def sorted_by_parts(whole: Tensor, rest: Tensor) -> Tensor:
    """The indices that sort numbers of two parts, the earlier first among equal ones."""
    by_rest = torch.sort(rest, stable=True).indices
    return by_rest[torch.sort(whole[by_rest], stable=True).indices]


def ascending(above: Tensor, below: Tensor) -> Tensor:
    """Indices that sort the quotients a / b exactly, ties in order; 0 <= a < 2^63, 1 <= b <= 2^29.

    Two unequal fractions with denominators up to 2^29 differ by at least 2^-58, so that 62 bits after the point tell
    them apart; with the bits before it they do not fit into one integer.
    """
    whole = above // below
    return sorted_by_parts(whole, fraction(above - whole * below, below))


def task_quota(size_J: Tensor, weight_J: Tensor | None, reach: int, offset: bool) -> Tensor:
    """`quota`, or `weighted_quota` where tasks have weights."""
    return quota(size_J, reach) if weight_J is None else weighted_quota(size_J, weight_J, reach, offset)
