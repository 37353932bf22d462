"""Sums over contiguous segments of rows: deterministic, and without a device read."""
from __future__ import annotations

import torch
from torch import Tensor

from lead_kernels.checks import check_shape, on_host


def segment_bounds(sample_ids_T: Tensor, num_samples: int) -> Tensor:
    """First rows of the samples, int64 [num_samples + 1]: sample b owns rows [bounds[b], bounds[b+1]).

    Raises ValueError, for ids in host memory, unless they are non-decreasing.
    """
    if on_host(sample_ids_T) and bool((sample_ids_T.diff() < 0).any()):
        raise ValueError("sample_ids must be non-decreasing: the rows of a sample lie side by side")
    edges = torch.arange(num_samples + 1, device=sample_ids_T.device, dtype=sample_ids_T.dtype)
    return torch.searchsorted(sample_ids_T.contiguous(), edges)


def segment_sum(values: Tensor, bounds: Tensor) -> Tensor:
    """Sum of `values[bounds[b]:bounds[b+1]]` for every b; at least fp32 inside and out."""
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    if values.shape[0] == 0:
        return values.new_zeros((bounds.shape[0] - 1, *values.shape[1:]))
    flat = values.reshape(values.shape[0], -1) if values.dim() > 2 else values
    # Each segment is added up by one thread (or one fixed tree) in row order, so that two runs agree bit for bit; index_add_ would
    # use atomics on a GPU. unsafe=True leaves out the checks of `offsets`, which read the device.
    sums = torch.segment_reduce(flat.contiguous(), "sum", offsets=bounds, axis=0, unsafe=True)
    return sums.reshape(bounds.shape[0] - 1, *values.shape[1:])


def segment_reduce(values: Tensor, sample_ids: Tensor, num_samples: int) -> Tensor:
    """Sum the rows of each sample.

    values: floating [T, ...]; sample_ids: int64 [T], non-decreasing, in [0, num_samples). Returns [num_samples, ...], fp32 (float64 for
    float64 values); 0 for a sample without rows. Rows are added in order: two runs agree bit for bit.
    Raises ValueError on integer values, on lengths that differ and, in host memory, on ids that decrease. Not differentiable.
    """
    if not values.is_floating_point():
        raise ValueError(f"values is {values.dtype}, expected a floating-point dtype")
    check_shape("sample_ids", sample_ids, (values.shape[0],))
    return segment_sum(values.detach(), segment_bounds(sample_ids, num_samples))
