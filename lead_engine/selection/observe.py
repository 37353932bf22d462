"""What every training loop does with the losses of an optimizer step, the engine's own and Hugging Face's alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lead_engine.selection.replicas import gather_statistics
from lead_engine.selection.selector import Selector


def observe_step(
    selector: Selector,
    sample_ids: Tensor,
    losses: Sequence[Tensor],
    change: Tensor,
    *,
    world: int = 1,
    skipped: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather one optimizer step's losses over the ranks and update every rank's selector by them; a collective.

    A = this rank's micro-batches, M = all ranks', B = slots. sample_ids: int64 [M, B] of the plan. losses: A tensors
    fp32 [B], means over each sample's response tokens. change: fp32 [A, B], what the step is estimated to have changed
    in them. skipped: 0-d bool, whether the step was not taken; then nothing is learned from it, and samples whose loss
    is not finite are barred. Returns loss and change, fp32 [M, B] each.
    """
    loss, change = gather_statistics(torch.stack([torch.stack(list(losses)), change]), world)
    # A first-order estimate may overshoot; a cross-entropy cannot fall below zero.
    change = torch.maximum(change, -loss)
    observed = sample_ids if skipped is None else selector.bar(sample_ids, loss, skipped)
    selector.observe(observed, loss, change)
    return loss, change
