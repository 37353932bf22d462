"""`ifd`: the samples whose instruction helps least, but does help, once and for all."""

from __future__ import annotations

from torch import Tensor

from lead_engine.pool.state import PoolState
from lead_engine.selection.methods.loss import Loss
from lead_engine.selection.samples import Samples


class Ifd(Loss):
    """Highest instruction-following difficulty first, among those below 1 (Li et al., "From Quantity to Quality", arXiv
    2308.12032).
    """

    def _ranking(self, samples: Samples, state: PoolState) -> tuple[Tensor, Tensor]:
        ifd = state.ifd.to(samples.device)
        return ifd, ifd < 1
