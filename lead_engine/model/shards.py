"""Which part of a parameter this rank holds, and the whole of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_part(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """This rank's storage of a parameter, and its place in the whole parameter.

    The parameter itself and all of it, where it is not sharded.
    """
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, n) for n in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def shards_integers() -> bool:
    """Whether this torch's FSDP shards and offloads integers, as 4-bit weights are: from 2.12 on."""
    return bool(torch.__version__ >= (2, 12))  # type: ignore[operator]  # a TorchVersion compares with tuples


def whole(tensor: Tensor) -> Tensor:
    """A (possibly sharded) tensor, whole; a collective."""
    value = tensor.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
