"""Process group, ranks and devices: the same code under torchrun and as a plain process.

Under torchrun the backend is gloo or NCCL; a plain process is a group of one.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from lead_engine.base.console import warn
from lead_engine.base.errors import UserError
from lead_engine.training.heartbeat import current_phase, enter_phase
from lead_engine.training.watchdog import Watchdog, lost_connection

BEHIND_WATCHDOG = timedelta(seconds=60)
"""How much later than the watchdog, which knows who is missing, a collective gives up by itself."""
Result = TypeVar("Result")
PATIENT = timedelta(days=7)
"""For host collectives in which ranks wait while rank 0 works, for how long nobody knows.

The watchdog looks after them.
"""


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    host_group: dist.ProcessGroup
    """A gloo group of all ranks for the checkpoint thread, whose collectives must not mix with training's."""
    signal_group: dist.ProcessGroup
    """Another, for the main thread while the checkpoint thread may be at work."""
    timeout: timedelta
    """Of training's collectives."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(self.host_group)

    def everyone(self, value: Any) -> list[Any]:
        """Every rank's value, in order. Not while a checkpoint is being written."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def first_problem(self, problem: str | None) -> str | None:
        """The problem of the first rank that has one, on all ranks; None if no rank has.

        Not while a checkpoint is being written.
        """
        problems: list[str | None] = self.everyone(problem)
        return next(filter(None, problems), None)

    def first_says(self, compute: Callable[[], Result]) -> Result:
        """What rank 0 computes while the others wait; UserError on all of them if that raises one.

        Not while a checkpoint is being written. For what would be the same work on every rank: reading and digesting
        whole files, say.
        """
        mine: tuple[Result | None, str | None] = (None, None)
        if self.first:
            try:
                mine = (compute(), None)
            except UserError as error:
                mine = (None, str(error))
        value: Result
        value, reason = self.everyone(mine)[0]
        if reason is not None:
            raise UserError(reason)
        return value


@contextmanager
def process_group(timeout: float = 1800.0) -> Iterator[Ranks]:
    """Join the group that torchrun's environment describes, or a group of one without it; leave it at the end.

    A rank that waits longer than `timeout` seconds for the others in training ends, and says who is missing
    (watchdog.py). On GPUs, NCCL's own watchdog (TORCH_NCCL_ASYNC_ERROR_HANDLING, on by default) would abort a
    collective a minute later.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    limit = timedelta(seconds=timeout) + BEHIND_WATCHDOG
    watchdog = _join(backend, limit, timeout) if launched else None
    if not launched:
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch exports it under a condition
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
        groups = [dist.new_group(backend="gloo", timeout=PATIENT) for _ in range(2)]
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, mesh, groups[0], groups[1], limit)
    except RuntimeError as error:
        if not lost_connection(error):
            raise
        message = (
            f"lost the connection to another rank in {current_phase()}: it has ended, and its own output says why, or "
            f"its machine is out of reach; go on with --resume ({str(error).strip().splitlines()[0][:200]})"
        )
        if any(thread.name.startswith("AsyncCheckpointExecutor") for thread in threading.enumerate()):
            # The checkpoint thread may be waiting for the rank that is gone, and Python would wait for the thread at
            # its exit.
            print(f"[rank {dist.get_rank()}] error: {message}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(2)
        raise UserError(message) from error
    finally:
        if watchdog is not None:
            watchdog.stop()
        dist.destroy_process_group()


def _join(backend: str, limit: timedelta, timeout: float) -> Watchdog | None:
    """Meet the other ranks; the watchdog, running, if there are others. UserError if they do not come."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, rank, size = next(rendezvous("env://", timeout=limit))
        store = PrefixStore(_attempt(), store)
        dist.init_process_group(
            backend, store=PrefixStore("training", store), rank=rank, world_size=size, timeout=limit
        )
    except (dist.DistError, RuntimeError) as error:
        raise UserError(
            f"the ranks did not come together at {where} within {limit.total_seconds():.0f} s "
            f"({str(error).splitlines()[0]}): is every node started, with the same --nnodes, --nproc-per-node and "
            "--rdzv-endpoint, and can it reach that address?"
        ) from error
    if size == 1:
        return None
    # A connection that nobody else waits on. torch's annotations know no clone.
    own = PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
    own.set_timeout(timedelta(seconds=5))
    enter_phase("starting up", limited=False)
    watchdog = Watchdog(own, rank, size, timeout)
    watchdog.start()
    return watchdog


def _attempt() -> str:
    """In the names of all that ranks leave in the store: which of torchrun's restarts they belong to.

    torch 2.13's agents keep one store over their restarts, in which the addresses of dead ranks still stand
    (docs/SCALE.md). Every agent counts its restarts by itself, so the number says nothing to other nodes; there the
    store must be a new one each time.
    """
    several, kept = (
        int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1,
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )
    if several and kept and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        warn(
            "torchrun: with several nodes, --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
            "environment of every agent"
        )
    return "all" if several else os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def data_mesh(ranks: Ranks, replicate: int) -> DeviceMesh:
    """The mesh to shard a model over: all ranks, or `replicate` groups of them.

    In HSDP each group of neighbouring ranks holds a whole model.

    Neighbours usually share a machine: parameters are gathered within a group, and only gradients' shards cross to the
    others.
    """
    if replicate == 1:
        return ranks.mesh
    shape = (replicate, ranks.size // replicate)
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():
        _set_pg_timeout(ranks.timeout, group)  # else they have torch's default
    return mesh
