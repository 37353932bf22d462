"""Small pools and a way to put a selector on a device that does not exist."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lead_engine.config.methods import options_of
from lead_engine.pool.state import PoolState
from lead_engine.selection.methods.lead import LeadOptions
from lead_engine.selection.plan import Layout
from lead_engine.selection.selector import Selector

OFTEN = {field.name for field in fields(LeadOptions)} | {"match"}
"""Options that a test may name for all methods: those that have none leave them out."""
SelectorFactory = Callable[..., Selector]


@pytest.fixture
def make_state() -> Callable[..., PoolState]:
    """A random pool's state; clusters and tasks of uneven size, every fifth sample dropped."""

    def make(samples: int, *, clusters: int = 4, tasks: int = 3, seed: int = 0) -> PoolState:
        generator = torch.Generator().manual_seed(seed)
        skewed = torch.rand(samples, generator=generator) ** 2
        return PoolState(
            utility=torch.rand(samples, generator=generator) * 4,
            difficulty=torch.rand(samples, generator=generator),
            answer_nll=torch.full((samples,), 5.0),
            cluster=(torch.rand(samples, generator=generator) * clusters).long(),
            task=(skewed * tasks).long(),
            dropped=torch.rand(samples, generator=generator) < 0.2,
            task_names=[f"task{t}" for t in range(tasks)],
            num_clusters=clusters,
        )

    return make


@pytest.fixture
def make_lengths() -> Callable[..., Tensor]:
    """Random lengths from 2 to `longest`."""

    def make(samples: int, longest: int, seed: int = 0) -> Tensor:
        return torch.randint(2, longest + 1, (samples,), generator=torch.Generator().manual_seed(1000 + seed))

    return make


@pytest.fixture
def make_selector(make_state, make_lengths) -> SelectorFactory:
    """A selector on a random pool; keyword arguments of Layout and of the method's options are taken apart by name.

    What is not said is the published setting, so that a new default changes no test.
    """

    def make(
        samples: int = 120, *, method: str = "lead", seed: int = 0, state: PoolState | None = None, **options
    ) -> Selector:
        shape = {"steps": 2, "micro_batches": 2, "slots": 4, "capacity": 40}
        layout = Layout(**{name: options.pop(name, default) for name, default in shape.items()})
        device = options.pop("device", "cpu")
        longest = options.pop("longest", min(20, layout.capacity))
        pool_options = {name: options.pop(name) for name in ("clusters", "tasks") if name in options}
        state = state or make_state(samples, seed=seed, **pool_options)
        lengths = make_lengths(state.num_samples, longest, seed)
        rows = (lengths // 2).clamp(min=1)
        own = options_of(method)
        published = {name: value for name, value in own.recipe("paper").items() if name != "loss_change"}
        there = {field.name for field in fields(own)}
        options = {name: value for name, value in options.items() if name in there or name not in OFTEN}
        chosen = {**published, **options}
        return Selector(state, lengths, rows, method=method, options=chosen, layout=layout, seed=seed, device=device)

    return make


class MadeUpLosses:
    """A scorer whose losses are a function of the round and the sample alone; remembers whom it was asked for."""

    def __init__(self, round: int) -> None:
        self.round, self.asked = round, []

    def given(self, ids: Tensor) -> Tensor:
        self.asked += ids.tolist()
        return ((ids * 37 + self.round * 11) % 101).float() / 25

    def alone(self, ids: Tensor) -> Tensor:
        raise AssertionError("no method here measures answers alone")


@pytest.fixture
def finished_run(tmp_path) -> Callable[..., Path]:
    """A function that writes the folder of a run which trained `rounds`, lists of samples, of a pool of `samples`; and
    the pool's names.
    """

    def write(samples: int, rounds: Sequence[Sequence[int]], name: str = "imitated") -> Path:
        pool, run = tmp_path / f"{name}-pool", tmp_path / name
        for folder in (pool, run):
            folder.mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": [f"sample-{i}" for i in range(samples)]}), pool / "records.parquet")
        (run / "summary.json").write_text(json.dumps({"pool": str(pool)}), encoding="utf-8")
        lines = [json.dumps({"round": r, "ids": [f"sample-{i}" for i in ids]}) + "\n" for r, ids in enumerate(rounds)]
        (run / "selection.jsonl").write_text("".join(lines), encoding="utf-8")
        return run

    return write


@pytest.fixture
def made_up_losses() -> type[MadeUpLosses]:
    return MadeUpLosses


class Blind(NamedTuple):
    """A device that cannot be looked at."""

    device: str
    mode: Callable[[], AbstractContextManager]
    convert: Callable[[Any], None]
    """Replace, in place and inside the mode, every tensor that an object of lead_engine.selection holds."""


@pytest.fixture(params=["meta", "fake"])
def blind(request) -> Blind:
    """Two proofs that the host reads nothing, each of which sees what the other does not.

    `meta`: tensors without values on a device of their own. Reading one, copying one to the host, or computing with it
    and a CPU vector raises. `fake`: FakeTensorMode, where every data-dependent value or shape raises. Its device is
    `cuda` where this torch knows CUDA; a CPU build cannot index fake CUDA tensors, there it is `cpu`.
    """
    if request.param == "meta":
        return Blind("meta", nullcontext, lambda thing: _replace_tensors(thing, "meta"))
    device = "cuda" if torch.backends.cuda.is_built() else "cpu"
    return Blind(device, FakeTensorMode, lambda thing: _replace_tensors(thing, device))


def _replace_tensors(thing: Any, device: str) -> None:
    for name, value in vars(thing).items():
        if isinstance(value, Tensor):
            setattr(thing, name, torch.empty(value.shape, dtype=value.dtype, device=device))
        elif isinstance(value, torch.device):
            setattr(thing, name, torch.device(device))
        elif name == "signature" and value is not None:
            setattr(thing, name, tuple(torch.empty(part.shape, device=device) for part in value))
        elif type(value).__module__.startswith("lead_engine.selection") and hasattr(value, "__dict__"):
            _replace_tensors(value, device)
