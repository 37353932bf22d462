"""Selectors on several ranks: every rank's statistics brought together, and the proof that all states are the same."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lead_engine.selection.selector import Selector

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name changed in torch 2.13


def gather_statistics(local: Tensor, world: int) -> Tensor:
    """[n, A, B] of every rank -> [n, M, B], ranks in order; a collective."""
    if world == 1:
        return local
    everyone = local.new_empty(world, *local.shape)
    _all_gather(everyone.view(-1), local.contiguous().view(-1))
    return everyone.transpose(0, 1).reshape(local.shape[0], -1, local.shape[-1])


def sum_over_ranks(value: Tensor, world: int) -> Tensor:
    """The sum of every rank's tensor, in place; a collective. Returns `value`."""
    if world > 1:
        dist.all_reduce(value)
    return value


def check_replicas(selector: Selector, world: int, step: int) -> None:
    """RuntimeError on all ranks unless every rank's selector is that of rank 0, bit for bit. Waits for the device.

    Ranks that disagree would train different plans from then on, and nothing else would tell.
    """
    if world == 1:
        return
    own = selector.fingerprint().view(1)
    everyone = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(everyone, own)
    first, *others = torch.cat(everyone).tolist()
    different = [str(rank) for rank, other in enumerate(others, 1) if other != first]
    if different:
        raise RuntimeError(
            f"the selection's state of ranks {', '.join(different)} differs from rank 0's after step {step}, though it "
            "is a function of what all ranks see: a machine computes wrongly, or lead_engine has a defect. Checkpoints "
            "up to now agree; go on with --resume"
        )
