"""Where a run's scalars go besides metrics.jsonl: TensorBoard always, Weights & Biases and MLflow where asked for.

A tracker gets groups of scalars: `train/...` and `eval/...` by optimizer step, `selection/...` by round. One that fails
while the run trains is dropped with one warning: training goes on. A resumed run goes on in the same W&B or MLflow run,
whose id lies in the run folder; steps that it repeats are logged again (they are bit for bit what they were), and what
a killed process had not handed over yet is missing there. The run folder's own files have every step once.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from lead_engine.base.console import warn
from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json, write_text
from lead_engine.config import TrainConfig, to_dict

STATE = "trackers.json"
"""In the run folder: {tracker: its run's id}."""
PATIENCE = 30.0
"""Seconds that the end of a run waits for a tracker's server."""


class Tracker(Protocol):
    """One destination."""

    id: str
    """By which a resumed run finds it again; empty where the folder is enough."""

    def log(self, group: str, place: int, values: dict[str, float]) -> None:
        """Scalars `group/name` at step or round `place`."""

    def flush(self) -> None:
        """A round is complete."""

    def close(self, complete: bool) -> None:
        """The run is over: trained to its end, or not."""


class TensorBoard:
    """Event files in RUN/tensorboard; those of steps that are repeated are purged."""

    id = ""

    def __init__(self, config: TrainConfig, steps: int) -> None:
        self._board = SummaryWriter(str(config.out / "tensorboard"), purge_step=steps)

    def log(self, group: str, place: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{group}/{name}", value, place)

    def flush(self) -> None:
        pass  # it writes every two minutes by itself

    def close(self, complete: bool) -> None:
        self._board.close()


class Wandb:
    """A W&B run named as the run folder. WANDB_MODE=offline writes it to RUN/wandb, for `wandb sync`."""

    def __init__(self, config: TrainConfig, run_id: str) -> None:
        import wandb

        self._run = wandb.init(
            project=config.wandb,
            name=config.out.name,
            id=run_id or None,
            resume="allow" if run_id else None,
            dir=config.out,
            config=to_dict(config),
            allow_val_change=True,
        )
        self.id = self._run.id
        for group in _COUNTER:  # each against its own counter: W&B's is that of calls
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/{_COUNTER[group]}")

    def log(self, group: str, place: int, values: dict[str, float]) -> None:
        self._run.log(
            {f"{group}/{_COUNTER[group]}": place, **{f"{group}/{name}": value for name, value in values.items()}}
        )

    def flush(self) -> None:
        pass  # a process of its own sends

    def close(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


_COUNTER = {"train": "step", "selection": "round", "eval": "step"}


class Mlflow:
    """An MLflow run named as the run folder, on the store that MLFLOW_TRACKING_URI names.

    A thread of its own talks to the store, a batch a round, so that a slow one does not hold up training.
    """

    def __init__(self, config: TrainConfig, run_id: str) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        self._pending: list[Any] = []
        self._sent: list[Future[Any]] = []
        if run_id:
            self._client.update_run(run_id, status="RUNNING")
        else:
            experiment = self._client.get_experiment_by_name(config.mlflow)
            number = experiment.experiment_id if experiment else self._client.create_experiment(config.mlflow)
            run_id = self._client.create_run(number, run_name=config.out.name).info.run_id
            for name, value in _flatten(to_dict(config)).items():
                self._client.log_param(run_id, name, value)
        self.id = run_id
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")

    def log(self, group: str, place: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._pending += [Metric(f"{group}/{_mlflow_name(name)}", value, now, place) for name, value in values.items()]

    def flush(self) -> None:
        for done in [future for future in self._sent if future.done()]:
            self._sent.remove(done)
            done.result()  # raises what the thread raised
        for start in range(0, len(self._pending), 1000):  # the most that the store takes at a time
            self._sent.append(self._thread.submit(self._client.log_batch, self.id, self._pending[start : start + 1000]))
        self._pending = []

    def close(self, complete: bool) -> None:
        self.flush()
        status = "FINISHED" if complete else "FAILED"
        self._sent.append(self._thread.submit(self._client.set_terminated, self.id, status))
        self._thread.shutdown(wait=False)
        _wait(self._sent)


def _mlflow_name(name: str) -> str:
    """A task may have any name; MLflow takes letters, digits and a few signs, as parts of a path that goes nowhere."""
    parts = [re.sub(r"[^\w\-. ]", "_", part) for part in name.split("/")]
    return "/".join("_" if set(part) <= {"."} else part for part in parts)[:200]


def _wait(futures: list[Future[Any]]) -> None:
    deadline = time.monotonic() + PATIENCE
    for future in futures:
        future.result(max(0.0, deadline - time.monotonic()))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


PACKAGES = {"wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow-skinny")}
"""Option -> (module, package)."""


def check_packages(config: TrainConfig) -> None:
    """UserError for a tracker that was asked for and is not installed."""
    for option, (module, package) in PACKAGES.items():
        if getattr(config, option) and importlib.util.find_spec(module) is None:
            raise UserError(f"--{option} {getattr(config, option)}: {module} is not installed; pip install {package}")


class Trackers:
    """All trackers of a run, on its first rank.

    steps: what the run has done when it starts. Raises UserError where a tracker that was asked for cannot start.
    """

    def __init__(self, config: TrainConfig, steps: int) -> None:
        self._path = config.out / STATE
        self._state = read_json(self._path) if self._path.exists() else {}
        self._live: dict[str, Tracker] = {"tensorboard": TensorBoard(config, steps)}
        for option, kind in (("wandb", Wandb), ("mlflow", Mlflow)):
            if getattr(config, option):
                self._live[option] = self._start(config, option, kind)
        if self._state:
            write_text(self._path, json.dumps(self._state))

    def _start(self, config: TrainConfig, option: str, kind: Callable[[TrainConfig, str], Tracker]) -> Tracker:
        try:
            tracker = kind(config, self._state.get(option, ""))
        except Exception as error:  # the packages' own errors have no common type
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--{option} {getattr(config, option)}: cannot start ({reason})") from None
        self._state[option] = tracker.id
        return tracker

    def log(self, group: str, place: int, values: dict[str, float | None]) -> None:
        """Scalars `group/name` at step or round `place`; those that are None or not finite are left out."""
        finite = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        for name in list(self._live):
            self._guard(name, lambda tracker: tracker.log(group, place, finite))

    def flush(self) -> None:
        """A round is complete."""
        for name in list(self._live):
            self._guard(name, lambda tracker: tracker.flush())

    def close(self, complete: bool) -> None:
        """End every tracker's run."""
        for name in list(self._live):
            self._guard(name, lambda tracker: tracker.close(complete))
        self._live = {}

    def _guard(self, name: str, call: Callable[[Tracker], None]) -> None:
        try:
            call(self._live[name])
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            warn(
                f"{name} failed and gets no more of this run ({reason}); training goes on, metrics.jsonl has everything"
            )
            del self._live[name]
