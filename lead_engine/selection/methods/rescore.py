"""`rescore`: LEAD with the utility that LEAD estimates *measured*, for the whole pool before every round. What LEAD
replaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lead_engine.selection.methods.base import Scorer
from lead_engine.selection.methods.lead import ClusterOptions, Clusters


@dataclass(frozen=True)
class RescoreOptions(ClusterOptions):
    """LEAD's clusters, quotas and ranking; U is the true loss."""

    flags: ClassVar[str] = "--rescore."


class Rescore(Clusters):
    """LEAD's clusters, quotas and ranking; U is the true loss under the model of the round's start."""

    Options = RescoreOptions

    @classmethod
    def describe(cls, options: ClusterOptions) -> str:
        return f"{super().describe(options)}; U: measured before every round"

    def refresh(self, round: int, spent: float, scorer: Scorer) -> None:
        if round == 0 and bool((self.samples.visits == 0).all()):
            return  # nothing was trained: what `prepare` measured is the base model's loss
        ids = self.open_samples().cpu().nonzero().squeeze(1)
        if len(ids):
            self.samples.utility[:-1].index_copy_(0, ids.to(self.samples.device), scorer.given(ids))
