"""`rescore`: LEAD with the utility that LEAD estimates *measured*, for the whole pool before every round. What LEAD replaces."""

from __future__ import annotations

from lead_engine.config import SelectionConfig
from lead_engine.pool.state import PoolState
from lead_engine.selection.methods.base import Scorer
from lead_engine.selection.methods.lead import Lead
from lead_engine.selection.samples import Samples


class Rescore(Lead):
    """Bandit, quotas and ranking are LEAD's, and its options apply; U is the true loss under the model of the round's start."""

    uses_loss_change = False

    def __init__(
        self, samples: Samples, state: PoolState, config: SelectionConfig, order_length: int, seed: int
    ) -> None:
        super().__init__(samples, state, config, order_length, seed)
        self.unseen = None  # nothing is estimated for samples that were not trained: they are measured

    def refresh(self, round: int, spent: float, scorer: Scorer) -> None:
        if round == 0 and bool((self.samples.visits == 0).all()):
            return  # nothing was trained: what `prepare` measured is the base model's loss
        ids = self.open_samples().cpu().nonzero().squeeze(1)
        if len(ids):
            self.samples.utility[:-1].index_copy_(0, ids.to(self.samples.device), scorer.given(ids))
