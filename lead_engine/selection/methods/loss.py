"""`loss`: the samples whose answers the base model finds hardest, once and for all."""

from __future__ import annotations

import torch
from torch import Tensor

from lead_engine.config.methods import MethodOptions
from lead_engine.pool.state import PoolState
from lead_engine.selection.methods.base import Draw, Method, Order
from lead_engine.selection.samples import Samples


class Loss(Method):
    """Highest initial mean loss first (IU before training, arXiv 2505.07437, section on baselines), over the whole
    pool.
    """

    def __init__(
        self, samples: Samples, state: PoolState, options: MethodOptions, order_length: int, seed: int
    ) -> None:
        super().__init__(samples, state, options, order_length, seed)
        self.score, self.candidates = self._ranking(samples, state)

    def _ranking(self, samples: Samples, state: PoolState) -> tuple[Tensor, Tensor]:
        """(score fp32 [N], who may be chosen bool [N])."""
        return samples.utility[:-1].clone(), torch.ones_like(samples.dropped)

    def order(self, round: int, drawn: Draw) -> Order:
        return self.plain(self.best_by(self.score, self.candidates))
