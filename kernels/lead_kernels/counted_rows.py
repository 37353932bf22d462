"""The rows of a head call whose target counts, and the samples that they belong to.

Legend: T rows, V vocabulary, B samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lead_kernels.backend import uses_kernels
from lead_kernels.segment_reduce import segment_bounds


class CountedRows(NamedTuple):
    """The rows whose target is not ignored, taken out so that the others cost no products."""

    taken: Tensor | None
    """int64 [rows taken]: their numbers, T where a place is left empty. None: all rows are taken, ignored ones with
    zeros for hidden states."""
    valid_T: Tensor
    before: Tensor
    """int64 [T + 1]: counted rows before row t."""

    @staticmethod
    def of(targets_T: Tensor, ignore_index: int, max_rows: int | None) -> CountedRows:
        """On a GPU `max_rows` places, without a look at the data; with None, the number of counted rows is read."""
        valid_T = targets_T != ignore_index
        before = torch.cat([valid_T.new_zeros(1, dtype=torch.int64), valid_T.cumsum(0)])
        if not uses_kernels(targets_T):  # in host memory: reading waits for no device
            count = int(before[-1])
            if max_rows is not None and count > max_rows:
                raise ValueError(
                    f"max_rows is {max_rows}, but {count} targets are not ignored: raise it or leave it out"
                )
            all_count = count == targets_T.shape[0]
            return CountedRows(None if all_count else valid_T.nonzero().squeeze(1), valid_T, before)
        if max_rows is None:
            max_rows = int(before[-1])
        else:
            torch._assert_async(before[-1] <= max_rows, "linear_cross_entropy: more than max_rows targets count")
        total = targets_T.shape[0]
        if max_rows >= total:
            return CountedRows(None, valid_T, before)
        # A compaction without a data-dependent shape: counted row number r goes to place r, the others to one that is
        # cut off.
        place_T = torch.where(valid_T, before[:-1], max_rows).clamp(max=max_rows)
        rows_T = torch.arange(total, device=place_T.device)
        index = place_T.new_full((max_rows + 1,), total).scatter_(0, place_T, rows_T)
        return CountedRows(index[:max_rows], valid_T, before)

    def take(self, values: Tensor, fill: float = 0) -> Tensor:
        """The counted rows of `values` [T, ...].

        `fill` goes to empty places and, where all rows are taken, to ignored ones.
        """
        if self.taken is None:
            # In host memory all rows are taken only where all of them count.
            return self._masked(values, self.valid_T, fill) if uses_kernels(values) else values
        if not uses_kernels(values) or self.taken.shape[0] == 0:
            return values[self.taken]
        filled = self.taken < self.valid_T.shape[0]
        return self._masked(values[torch.where(filled, self.taken, 0)], filled, fill)

    def put(self, rows: Tensor) -> Tensor:
        """Results of the rows taken at their places among all rows [T, ...], 0 elsewhere."""
        if self.taken is None:
            return rows
        # One more row receives the empty places' results, and is cut off.
        total = self.valid_T.shape[0]
        return rows.new_zeros(total + 1, *rows.shape[1:]).index_copy_(0, self.taken, rows)[:total]

    def bounds(self, bounds: Tensor) -> Tensor:
        """Bounds of samples among all rows as bounds among the rows taken."""
        return bounds if self.taken is None else self.before[bounds]

    @staticmethod
    def _masked(values: Tensor, mask: Tensor, fill: float) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (values.dim() - 1)), values, fill)


def sample_bounds(sample_ids: Tensor | None, cu_seqlens: Tensor | None, num_samples: int, rows: int) -> Tensor:
    """Samples' first rows, int64 [B + 1].

    ValueError (on a GPU a device-side assertion) where cu_seqlens decreases or leaves the rows, where sample_ids
    decrease or one is outside [0, num_samples).
    """
    if sample_ids is not None:
        bounds = segment_bounds(sample_ids, num_samples)
        if rows:
            _check_ids(sample_ids, num_samples)
        return bounds
    assert cu_seqlens is not None
    bounds = cu_seqlens[: num_samples + 1].long()
    right = (bounds.diff() >= 0).all() & (bounds[0] >= 0) & (bounds[-1] <= rows)
    if uses_kernels(bounds):
        torch._assert_async(right, "linear_cross_entropy: cu_seqlens must be non-decreasing and within the rows")
    elif not right:
        raise ValueError(f"cu_seqlens must be non-decreasing and within 0 to {rows}, got {bounds.tolist()}")
    return bounds


def _check_ids(sample_ids: Tensor, num_samples: int) -> None:
    """Of ids that do not decrease, which `segment_bounds` looks at in host memory, the first and the last tell."""
    first, last = sample_ids[0], sample_ids[-1]
    if uses_kernels(sample_ids):
        right = (sample_ids.diff() >= 0).all() & (first >= 0) & (last < num_samples)
        message = "linear_cross_entropy: sample_ids must be non-decreasing and within [0, num_samples)"
        torch._assert_async(right, message)
    elif not 0 <= int(first) <= int(last) < num_samples:
        raise ValueError(f"sample_ids hold {int(first)} to {int(last)}, expected 0 to {num_samples - 1}")


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Targets outside the vocabulary: an error in host memory, an assertion on the device elsewhere."""
    if uses_kernels(targets):
        inside = ((targets >= 0) & (targets < vocabulary)).all()
        torch._assert_async(inside, "linear_cross_entropy: a target is outside the vocabulary")
    elif targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        found = f"{int(targets.min())} to {int(targets.max())}"
        raise ValueError(f"targets hold {found}, expected 0 to {vocabulary - 1} or ignore_index")
