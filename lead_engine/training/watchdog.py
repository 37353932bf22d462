"""Ends a run in which a rank hangs, and says which rank it is and what it was doing.

Every rank notes its phase (heartbeat.py), and a thread writes that to the ranks' store every few seconds. A rank that
has stayed in one phase for the time-out reads the phases of all others. It names those that are silent, and those that
are behind.

There are two kinds of phases. In training all ranks move together: whoever has waited for the time-out ends the run. At
start-up, where rank 0 works while the others wait, and at writing to a slow disk nobody knows how long a phase takes:
there the run ends only if a rank has been silent for that long.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass

from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.distributed_c10d import Store

from lead_engine.training.heartbeat import Phase, current_phase, seconds_in_phase

EXIT_HANG = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
SILENCE = 60.0
"""Seconds: at start-up, importing and loading may keep a rank's threads from speaking for a while."""


@dataclass
class _Heard:
    """The last heartbeat of another rank."""

    phase: Phase
    beat: int
    since: float
    """When this beat was first seen, by this rank's clock."""


class Watchdog:
    """Two threads of one rank: one talks to the store, the other watches the time.

    The store may not answer, and the thread that watches must not wait for it.

    `store`: shared by all ranks, a connection for this object alone; `timeout` in seconds. Others are asked for from
    half of it on.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.interval = min(max(timeout / 10, 0.1), 10.0)
        self.refresh = max(self.interval, timeout / 8)
        self._heard: dict[int, _Heard] = {}
        self._last_answer = 0.0
        self._over = threading.Event()

    def start(self) -> None:
        self._last_answer = time.monotonic()
        for target in (self._talk, self._watch):
            threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _talk(self) -> None:
        beat, asked = 0, 0.0
        while not self._over.wait(self.interval):
            beat += 1
            try:
                self.store.set(_key(self.rank), json.dumps([beat, *current_phase()]))
                if seconds_in_phase() > self.timeout / 2 and time.monotonic() - asked >= self.refresh:
                    asked = time.monotonic()
                    self._ask()
            except Exception:  # the store, or who holds it, is gone: the watching thread sees that nothing is heard
                continue

    def _ask(self) -> None:
        """Read the phases of the other ranks."""
        for rank in range(self.size):
            if rank == self.rank or not self.store.check([_key(rank)]):
                continue
            beat, *phase = json.loads(self.store.get(_key(rank)))
            if rank not in self._heard or self._heard[rank].beat != beat:
                self._heard[rank] = _Heard(Phase(*phase), beat, time.monotonic())
        self._last_answer = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            if seconds_in_phase() > self.timeout and not self._may_wait():
                self._end()

    def _silent(self, seconds: float) -> list[int]:
        """Other ranks that were not heard of for so long.

        A store that does not answer says nothing of anyone but who holds it.
        """
        now = time.monotonic()
        if now - self._last_answer > max(seconds, 2 * self.refresh):
            return [0] if self.rank else []
        return [rank for rank in range(self.size) if rank != self.rank and self._quiet_for(rank, now) > seconds]

    def _quiet_for(self, rank: int, now: float) -> float:
        return now - self._heard[rank].since if rank in self._heard else seconds_in_phase()

    def _may_wait(self) -> bool:
        patient = not current_phase().limited or any(not heard.phase.limited for heard in self._heard.values())
        return patient and not self._silent(max(self.timeout, SILENCE))

    def _end(self) -> None:
        silent = self._silent(2.5 * self.refresh)
        phases = {rank: heard.phase for rank, heard in self._heard.items() if rank not in silent}
        phases[self.rank] = current_phase()
        if self.rank == min(phases):
            message = self._report(silent, phases)
        else:
            waited = f"waited {seconds_in_phase():.0f} s for the other ranks in {current_phase()}"
            message = f"{waited}; rank {min(phases)} says who did not arrive"
        speaker = f"[rank {self.rank}] " if self.rank else ""
        print(f"{speaker}error: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_HANG)

    def _report(self, silent: list[int], phases: dict[int, Phase]) -> str:
        """Who is missing, what the others are doing, and what to look at."""
        furthest = max(phase.number for phase in phases.values())
        behind = {rank: phase for rank, phase in sorted(phases.items()) if phase.number < furthest}
        waited = f"for {seconds_in_phase():.0f} s the ranks waited for each other in {current_phase()}"
        lines = [f"--runtime.timeout: {waited}."]
        for rank in silent:
            last = f"; it was last heard of in {self._heard[rank].phase}" if rank in self._heard else ""
            why = "its process is stopped or its machine out of reach"
            lines.append(f"  rank {rank} did not arrive and is not heard of{last}: {why}.")
        for rank, phase in behind.items():
            lines.append(f"  rank {rank} did not arrive: it is alive, but still in {phase}.")
        if not silent and not behind:
            why = "the network between them is stuck (NCCL_DEBUG=INFO tells more)"
            lines.append(f"  All ranks are alive and in this place: {why}.")
        where = "the output and the machine of the ranks named (dmesg, nvidia-smi, disks)"
        lines.append(f"Look at {where}, then go on with --resume.")
        lines.append("If nothing hung and a step just takes that long, raise --runtime.timeout.")
        return "\n".join(lines)


def _key(rank: int) -> str:
    return f"lead_engine/phase/{rank}"


def lost_connection(error: BaseException) -> bool:
    """Whether an exception tells that another rank has gone."""
    words = ("gloo", "Connection closed", "Connection reset", "ncclRemoteError", "ncclSystemError", "was aborted")
    return isinstance(error, (DistNetworkError, DistStoreError)) or any(word in str(error) for word in words)
