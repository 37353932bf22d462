"""`random`: the whole pool, dropped samples too, in passes of one fixed random order each."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lead_engine.selection import counter_rng
from lead_engine.selection.methods.base import Draw, Method, Order

SHUFFLE = 1  # random stream


class Random(Method):
    """Uniformly random, every sample once before any twice.

    Pass p is the permutation by order_keys(seed, p, id), so the sequence of samples and their packing are the same
    whatever the length of a round. To keep that, a round never crosses the end of a pass: its last steps are short or
    empty instead.

    Planning needs about 40 bytes a sample for its keys and what computes them.
    """

    needs_scores = False

    def order(self, round: int, drawn: Draw) -> Order:
        samples, visits = self.samples, self.samples.visits[:-1]
        visits = torch.where(samples.barred[:-1], torch.iinfo(torch.int32).max, visits)
        current = visits.amin()
        ids = torch.arange(samples.num_samples, device=samples.device)
        keys = counter_rng.order_keys(self.seed, samples.scalar(SHUFFLE), current.long(), ids)
        due = (visits == current) & ~samples.barred[:-1]
        keys = torch.where(due, keys, torch.iinfo(torch.int64).max)
        places = min(self.order_length, samples.num_samples)
        keys, order = keys.topk(places, largest=False, sorted=True)
        order = torch.where(keys < 1 << counter_rng.ORDER_BITS, order, samples.num_samples)
        return self.plain(F.pad(order, (0, self.order_length - places), value=samples.num_samples))
