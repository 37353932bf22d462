"""The contenders of bench/training.py in processes of their own, which train in turns."""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from training_data import Setting
from training_link import Spec

HERE = Path(__file__).parent


class Worker:
    """One contender's process. RuntimeError where it fails, or has worked for longer than `limit` seconds in all."""

    def __init__(self, spec: Spec, limit: float) -> None:
        self.spec, self.left = spec, limit
        command = [sys.executable, str(HERE / "training_contenders.py"), json.dumps(asdict(spec))]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def ask(self, order: str) -> dict[str, Any]:
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        started = time.perf_counter()
        if not select.select([self.process.stdout], [], [], max(0.0, self.left))[0]:
            self.process.kill()
            raise RuntimeError(f"{self.spec.name}: took too long; --contender-seconds allows more")
        self.left -= time.perf_counter() - started
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.spec.name} failed:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def steps(self, base: int) -> int:
        """A turn's steps: about as long for each contender."""
        if self.spec.kind in ("lead", "random"):
            return 2 * self.spec.round_steps
        slow = not self.spec.grouped and not torch.cuda.is_available()
        return max(1, base // 2) if slow else base

    def end(self) -> dict[str, Any]:
        told = self.ask("stop")
        self.process.wait(60)
        return told


def in_turns(
    specs: list[Spec], setting: Setting, flags: argparse.Namespace, tell: Callable[[dict], Any]
) -> dict[str, dict[str, Any]]:
    """All processes stay, and one trains at a time: {name: {"seconds_per_step": [turns], "peak", "before", ...}}."""
    raw: dict[str, dict[str, Any]] = {spec.name: fresh() for spec in specs}
    workers = [Worker(spec, flags.contender_seconds) for spec in specs]
    workers = [worker for worker in workers if attempt(worker, raw, lambda w: raw[w.spec.name].update(w.answer()))]
    for turn in range(-1, setting.turns):  # the first warms up
        first = turn % max(1, len(workers))
        for worker in workers[first:] + workers[:first]:
            if not attempt(
                worker, raw, lambda w, turn=turn: keep(raw[w.spec.name], w.ask(f"run {w.steps(setting.steps)}"), turn)
            ):
                workers.remove(worker)
        tell(raw)
        print(f"{setting.model}: turn {turn + 1} of {setting.turns}", file=sys.stderr, flush=True)
    for worker in workers:
        attempt(worker, raw, lambda w: raw[w.spec.name].update(w.end()))
    return raw


def one_after_another(
    specs: list[Spec], setting: Setting, flags: argparse.Namespace, tell: Callable[[dict], Any]
) -> dict[str, dict[str, Any]]:
    """On a GPU, whose memory they do not share: a process per contender, all of its turns at once. Profiles LEAD."""
    raw: dict[str, dict[str, Any]] = {}

    def run(worker: Worker) -> None:
        own = raw[worker.spec.name]
        own.update(worker.answer())
        for turn in range(-1, setting.turns):
            keep(own, worker.ask(f"run {worker.steps(setting.steps)}"), turn)
        if worker.spec.kind == "lead" and not worker.spec.compiled:
            trace = flags.trace or Path(tempfile.gettempdir(), "training-trace.json")
            found = worker.ask(f"profile {trace}")["synchronisations"]
            own["host_waits_in_two_rounds"] = found
            print(
                f"{trace}: "
                + (f"the host waits inside a round: {found}" if found else "the host waits for nothing inside a round")
            )
        own.update(worker.end())

    for spec in specs:
        raw[spec.name] = fresh()
        attempt(Worker(spec, flags.contender_seconds), raw, run)
        tell(raw)
    return raw


def attempt(worker: Worker, raw: dict[str, dict[str, Any]], action: Callable[[Worker], object]) -> bool:
    """Whether `action` succeeded. A contender that fails keeps the reason in its row, and the others go on."""
    try:
        action(worker)
    except (RuntimeError, OSError) as error:  # OSError: a pipe that its process has closed
        print(error, file=sys.stderr)
        raw[worker.spec.name]["failed"] = str(error).strip().splitlines()[-1]
        worker.process.kill()
        return False
    return True


def fresh() -> dict[str, Any]:
    """A contender's measurements before the first: means over the steps of a turn."""
    return {"seconds_per_step": [], "tokens_per_step": []}


def keep(raw: dict[str, Any], told: dict[str, Any], turn: int) -> None:
    if turn >= 0:
        raw["seconds_per_step"].append(told["seconds"] / told["steps"])
        raw["tokens_per_step"].append(told["tokens"] / told["steps"])
    if told["losses"] and "first_loss" not in raw:
        raw["first_loss"] = statistics.mean(told["losses"])
