"""The running estimate of every sample's utility (instance-level dynamic uncertainty)."""
from __future__ import annotations

import torch
from torch import Tensor

from lead_kernels.checks import check_device, check_shape


def idu_update(utility: Tensor, visits: Tensor, sample_ids: Tensor, loss: Tensor, change: Tensor, smoothing: float) -> None:
    """In place: U_i <- (1 - b) (L_i + dL_i) + b U_i and one more visit, for the samples of one optimizer step.

    utility: fp32 [N+1]; visits: int32 [N+1]; sample_ids: int64 of any shape, each real id at most once; loss, change: fp32 of the same
    shape; smoothing: b. The dummy id N may stand any number of times; its entry keeps its value, so that the state stays deterministic.
    Source: arXiv 2505.07437, the definition of IDU.
    """
    check_shape("visits", visits, tuple(utility.shape), (torch.int32,))
    check_shape("loss", loss, tuple(sample_ids.shape))
    check_shape("change", change, tuple(sample_ids.shape))
    check_device(utility.device, visits=visits, sample_ids=sample_ids, loss=loss, change=change)
    ids = sample_ids.flatten()
    real = ids < utility.shape[0] - 1
    old = utility[ids]
    new = (1.0 - smoothing) * (loss + change).flatten().to(utility.dtype) + smoothing * old
    utility.index_put_((ids,), torch.where(real, new, old))
    visits.index_put_((ids,), visits[ids] + real.to(visits.dtype))
