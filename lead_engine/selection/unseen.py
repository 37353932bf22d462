"""What is believed of samples that no step has touched yet, from the losses of those it has.

LEAD's U of a sample stays what the base model's loss was until the sample is trained for the first time. But every step
moves the losses of all others too: the older a U, the more it overestimates. And without a pass over the pool before
training there is no U at all. Both are mended by running means over a *cell*, a cluster's part of a task
(Samples.cell), of what a sample's first step sees.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lead_engine.base.errors import UserError
from lead_engine.selection.samples import Samples

Unseen = Literal["initial", "drift", "estimate"]
KEEP_CELL, KEEP_ALL = 0.95, 0.99
"""What is left of an exponential mean after one more observation: memories of 20 and 100 samples."""


MOST_CELLS = 4096
"""A step's sums over cells are those of a cells x samples table: what is deterministic on a GPU."""


class CellEstimates:
    """U of unseen samples; C cells.

    drift:     U_i = U0_i + m_c, m the mean of L - U0 at first visits in i's cell c: how far the cell has come without
    being trained; estimate:  U_i = m_c + optimism s (1 - a_c), m the mean of L at first visits, s the standard
    deviation of L over all of them.

    A cell's mean is shrunk to that of all samples by how little is known of it: m_c = sum_c + (1 - a_c) m, where sum_c
    is the exponentially weighted sum of its observations and a_c, in [0, 1), the sum of their weights. Losses that are
    not finite are left out.

    Estimates stand in for U only where samples are ranked and rewarded: a first visit smooths with U as `prepare`
    measured it.
    """

    def __init__(self, kind: Unseen, samples: Samples, optimism: float = 1.0) -> None:
        if samples.num_cells > MOST_CELLS:
            raise UserError(
                f"--lead.unseen {kind}: {samples.num_clusters} clusters x {samples.num_tasks} tasks are more than "
                f"{MOST_CELLS} cells; prepare the pool with fewer --clusters or --tasks, or use --lead.unseen initial"
            )
        self.samples, self.drift, self.optimism = samples, kind == "drift", optimism
        self.cell_sum = torch.zeros(samples.num_cells, device=samples.device)
        self.cell_weight = torch.zeros(samples.num_cells, device=samples.device)
        self.all = torch.zeros(3, device=samples.device)
        """Exponentially weighted sums of 1, x and x^2 over all first visits."""

    def utility(self) -> Tensor:
        """fp32 [N+1]: U, estimated where a sample was not trained yet."""
        samples, utility = self.samples, self.samples.utility.clone()
        estimate = self.by_cell().index_select(0, samples.cell.int())
        if self.drift:
            estimate += utility[:-1]
        torch.where(samples.visits[:-1] == 0, estimate, utility[:-1], out=utility[:-1])
        return utility

    def by_cell(self) -> Tensor:
        """The offsets (drift) or utilities (estimate) of the cells: fp32 [C]."""
        weight, first, second = self.all
        known = weight > 0
        mean = torch.where(known, first / torch.where(known, weight, 1.0), 0.0)
        found = self.cell_sum + (1 - self.cell_weight) * mean
        if self.drift:
            return found
        variance = torch.where(known, second / torch.where(known, weight, 1.0) - mean.square(), 1.0).clamp(min=0)
        return found + self.optimism * variance.sqrt() * (1 - self.cell_weight)

    def observe(self, sample_ids: Tensor, loss: Tensor) -> None:
        """Losses (fp32) of one step's samples (int64, N for none), before their visits are counted."""
        samples, ids, loss = self.samples, sample_ids.reshape(-1), loss.reshape(-1)
        value = loss - samples.utility[ids] if self.drift else loss
        counts = (ids < samples.num_samples) & (samples.visits[ids] == 0) & value.isfinite()
        value = torch.where(counts, value, 0.0)
        cell = torch.where(counts, samples.cell[samples.real(ids)].long(), -1)
        member_CP = cell == torch.arange(samples.num_cells, device=cell.device)[:, None]  # sums in a fixed order
        number = member_CP.sum(1)
        mean = torch.where(member_CP, value, 0.0).sum(1) / number.clamp(min=1)
        keep = KEEP_CELL**number
        self.cell_sum.mul_(keep).add_((1 - keep) * mean)
        self.cell_weight.mul_(keep).add_(1 - keep)
        keep = KEEP_ALL ** counts.sum()
        moments = torch.stack([counts.sum().float(), value.sum(), value.square().sum()]) / counts.sum().clamp(min=1)
        self.all.mul_(keep).add_((1 - keep) * moments)

    def state_dict(self) -> dict[str, Tensor]:
        return {"cell_sum": self.cell_sum, "cell_weight": self.cell_weight, "all_first_visits": self.all}
