"""A rank that hangs: the others find out who it is and where it stands, say so, and end.

Every rank says where it is (`at`, a tuple assigned, nothing more). A thread tells it to the ranks' store every few seconds. One that has
been in the same place for the time-out asks the store for all others. Those that are silent, or are further behind than anybody, are named.

Two kinds of places. In training all ranks move together: whoever has waited for the time-out ends the run. At start-up, where rank 0 works
while the others wait, and where a slow disk is written to, nothing is known of how long it takes: there the run ends only if a rank has
fallen silent for that long.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

from torch.distributed import DistNetworkError, DistStoreError, Store

EXIT_HANG = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
SILENCE = 60.0
"""Seconds: at start-up, importing and loading may keep a rank's threads from speaking for a while."""


class Place(NamedTuple):
    """Where a rank stands."""

    number: int = 0
    """How many places it has been to: the greater, the further."""
    phase: str = "starting up"
    round: int | None = None
    step: int | None = None
    limited: bool = False
    """Whether the time-out counts here."""

    def __str__(self) -> str:
        parts = [f"{name} {value}" for name, value in (("round", self.round), ("step", self.step)) if value is not None]
        return f"{', '.join(parts)} ({self.phase})" if parts else self.phase


_here, _since = Place(), time.monotonic()


def at(phase: str, round: int | None = None, step: int | None = None, *, limited: bool = True) -> None:
    """Say where this rank is now. To be called alike on all ranks."""
    global _here, _since
    _here, _since = Place(_here.number + 1, phase, round, step, limited), time.monotonic()


def here() -> Place:
    """Where this rank is."""
    return _here


@dataclass
class _Heard:
    """What is known of another rank."""

    place: Place
    beat: int
    since: float
    """When this beat was first seen, by this rank's clock."""


class Watchdog:
    """Two threads of one rank: one talks to the store, which may not answer; one watches the time, which must not wait for it.

    `store`: shared by all ranks, a connection for this object alone; `timeout` in seconds. Others are asked for from half of it on.
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
                self.store.set(_key(self.rank), json.dumps([beat, *_here]))
                if self._waited() > self.timeout / 2 and time.monotonic() - asked >= self.refresh:
                    asked = time.monotonic()
                    self._ask()
            except Exception:  # the store, or who holds it, is gone: the watching thread sees that nothing is heard
                continue

    def _ask(self) -> None:
        """Take down where the others are."""
        for rank in range(self.size):
            if rank == self.rank or not self.store.check([_key(rank)]):
                continue
            beat, *place = json.loads(self.store.get(_key(rank)))
            if rank not in self._heard or self._heard[rank].beat != beat:
                self._heard[rank] = _Heard(Place(*place), beat, time.monotonic())
        self._last_answer = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            if self._waited() > self.timeout and not self._may_wait():
                self._end()

    def _waited(self) -> float:
        return time.monotonic() - _since

    def _silent(self, seconds: float) -> list[int]:
        """Other ranks that were not heard of for so long. A store that does not answer says nothing of anyone but who holds it."""
        now = time.monotonic()
        if now - self._last_answer > max(seconds, 2 * self.refresh):
            return [0] if self.rank else []
        return [rank for rank in range(self.size) if rank != self.rank and self._quiet_for(rank, now) > seconds]

    def _quiet_for(self, rank: int, now: float) -> float:
        return now - self._heard[rank].since if rank in self._heard else self._waited()

    def _may_wait(self) -> bool:
        patient = not _here.limited or any(not heard.place.limited for heard in self._heard.values())
        return patient and not self._silent(max(self.timeout, SILENCE))

    def _end(self) -> None:
        silent = self._silent(2.5 * self.refresh)
        places = {rank: heard.place for rank, heard in self._heard.items() if rank not in silent} | {self.rank: _here}
        if self.rank == min(places):
            message = self._report(silent, places)
        else:
            message = f"waited {self._waited():.0f} s for the other ranks in {_here}; rank {min(places)} says who did not arrive"
        place = f"[rank {self.rank}] " if self.rank else ""
        print(f"{place}error: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_HANG)

    def _report(self, silent: list[int], places: dict[int, Place]) -> str:
        """What to tell: who is missing, where the others wait, and what to look at."""
        furthest = max(place.number for place in places.values())
        behind = {rank: place for rank, place in sorted(places.items()) if place.number < furthest}
        lines = [f"--runtime.timeout: for {self._waited():.0f} s the ranks waited for each other in {_here}."]
        for rank in silent:
            last = f"; it was last heard of in {self._heard[rank].place}" if rank in self._heard else ""
            lines.append(
                f"  rank {rank} did not arrive and is not heard of{last}: its process is stopped or its machine out of reach."
            )
        for rank, place in behind.items():
            lines.append(f"  rank {rank} did not arrive: it is alive, but still in {place}.")
        if not silent and not behind:
            lines.append(
                "  All ranks are alive and in this place: the network between them is stuck (NCCL_DEBUG=INFO tells more)."
            )
        lines.append(
            "Look at the output and the machine of the ranks named (dmesg, nvidia-smi, disks), then go on with --resume."
        )
        lines.append("If nothing hung and a step just takes that long, raise --runtime.timeout.")
        return "\n".join(lines)


def _key(rank: int) -> str:
    return f"lead_engine/place/{rank}"


def lost_connection(error: BaseException) -> bool:
    """Whether an exception tells that another rank has gone."""
    words = ("gloo", "Connection closed", "Connection reset", "ncclRemoteError", "ncclSystemError", "was aborted")
    return isinstance(error, (DistNetworkError, DistStoreError)) or any(word in str(error) for word in words)
