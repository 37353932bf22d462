"""Process group, ranks and devices: the same code under torchrun (gloo or NCCL) and as a plain process (a group of one)."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    host_group: dist.ProcessGroup
    """A gloo group of all ranks for the checkpoint thread, whose collectives must not mix with training's."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(self.host_group)


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the group that torchrun's environment describes, or a group of one without it; leave it at the end."""
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if launched:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, mesh, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def data_mesh(ranks: Ranks, replicate: int) -> DeviceMesh:
    """The mesh to shard a model over: all ranks, or (HSDP) `replicate` groups of neighbouring ranks with a whole model each.

    Neighbours usually share a machine: parameters are gathered within a group, and only gradients' shards cross to the others.
    """
    if replicate == 1:
        return ranks.mesh
    shape = (replicate, ranks.size // replicate)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))
