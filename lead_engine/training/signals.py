"""SIGTERM, SIGUSR1 (Slurm's --signal) and Ctrl-C: the round is finished, a checkpoint written, and the run ends.

Ranks may be told at different times, or only some of them: after every round they agree. A second signal ends a process
at once; within PAUSE seconds it does not count, for a scheduler that signals all processes of a job also reaches
torchrun, which passes it on.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from lead_engine.base.console import warn
from lead_engine.training.distributed import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PAUSE = 2.0


class Stopped(SystemExit):
    """The run ended because of a signal.

    The exit status is 128 + the signal's number, as in shells.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopSignals:
    """Within this context the signals are only noted, until `agreed` is asked.

    Does nothing outside of the main thread, where Python allows no handlers.

    A thread reads them from a pipe that Python's C handler writes to, since the main thread may be waiting for another
    rank or the device.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._noted, self._when = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _note) for number in SIGNALS}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._fd_before)
            os.close(self._write)  # ends the thread

    def agreed(self) -> int:
        """The number of a signal that any rank has got, 0 if none has; a collective.

        The result is the same on every rank.
        """
        if self._ranks.size == 1:
            return self._noted
        noted = torch.tensor([self._noted])
        dist.all_reduce(noted, dist.ReduceOp.MAX, group=self._ranks.signal_group)
        return int(noted)

    def _listen(self) -> None:
        while number := os.read(self._read, 1):
            self._take(number[0])
        os.close(self._read)

    def _take(self, number: int) -> None:
        if number not in SIGNALS:
            return
        now = time.monotonic()
        if not self._noted:
            self._noted, self._when = number, now
            warn(
                f"{signal.Signals(number).name}: the round is finished and a checkpoint written; another signal ends "
                "the run at once"
            )
        elif now - self._when > PAUSE:
            os._exit(128 + number)


def _note(number: int, frame: FrameType | None) -> None:
    """Python's own part of handling, in the main thread: nothing."""
