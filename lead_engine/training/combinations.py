"""Which options of `train` go together.

Unsupported combinations raise an error before anything is loaded, with the reason and the way out.

`AXES` and `REFUSED` say the same to a reader: docs/COMBINATIONS.md is made of them (`python -m
lead_engine.training.combinations`), and tests/invariants/test_combinations.py trains every pair that is not refused,
and sees every refused one refused for the reason given.
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lead_engine.base.errors import UserError
from lead_engine.config import PrepareConfig, TrainConfig


@dataclass(frozen=True)
class Rule:
    """An unsupported combination: where `applies`, the run ends with `message`.

    The message is formatted with `config` and `ranks` (their number).
    """

    applies: Callable[[TrainConfig | PrepareConfig, int, torch.device], bool]
    message: str


RULES = [
    Rule(
        lambda config, ranks, device: config.batch.micro_batches % ranks != 0,
        "--batch.micro-batches {config.batch.micro_batches}: must be a multiple of the {ranks} ranks",
    ),
    Rule(
        lambda config, ranks, device: ranks % config.runtime.replicate != 0,
        "--runtime.replicate {config.runtime.replicate}: {ranks} ranks cannot be parted into so many equal groups; "
        "give a divisor of {ranks}, or start another number of ranks",
    ),
    Rule(
        lambda config, ranks, device: config.runtime.compile and device.type == "cpu" and not _has_compiler(),
        "--runtime.compile: needs a C++ compiler on a CPU, and none is found; install g++ (or name one in CXX), or "
        "leave the flag out",
    ),
    Rule(
        lambda config, ranks, device: (
            config.runtime.compile and device.type != "cpu" and importlib.util.find_spec("triton") is None
        ),
        "--runtime.compile: needs Triton on a GPU, and it is not installed; pip install triton, or leave the flag out",
    ),
]


def check_combination(config: TrainConfig | PrepareConfig, ranks: int, device: torch.device) -> None:
    """Raises UserError for the first rule that the options break on this number of ranks and device."""
    for rule in RULES:
        if rule.applies(config, ranks, device):
            raise UserError(rule.message.format(config=config, ranks=ranks))


def _has_compiler() -> bool:
    from torch._inductor import config

    return any(name and shutil.which(name) for name in config.cpp.cxx)


Options = dict[str, Any]

AXES: dict[str, dict[str, Options]] = {
    "weights": {
        "full": {},
        "LoRA": {"lora": {"rank": 4}},
        "LoRA + head": {"lora": {"rank": 4, "head": True}},
        "QLoRA": {"lora": {"rank": 4, "quantize": "nf4"}},
        "DoRA + modules": {"lora": {"rank": 4, "dora": True, "dropout": 0.1, "modules_to_save": ("lm_head", "norm")}},
    },
    "model": {"dense": {}, "tied embedding": {}, "mixture of experts": {}},
    "optimizer": {"adamw": {}, "adamw8bit": {"optimizer": {"kind": "adamw8bit"}}},
    "recomputed": {
        "nothing": {},
        "selective": {"runtime": {"checkpointing": "selective"}},
        "full recompute": {"runtime": {"checkpointing": "full"}},
    },
    "compiled": {"eager": {}, "compile": {"runtime": {"compile": True}}},
    "parameters on": {"device": {}, "offload": {"runtime": {"offload": True}}},
    "sharded": {"FSDP": {}, "HSDP": {"runtime": {"replicate": 2}}},
    "precision": {"fp32": {"runtime": {"precision": "fp32"}}, "bf16": {"runtime": {"precision": "bf16"}}},
    "method": {
        "lead": {},
        "lead, exact": {"options": {"sketch_dim": 0}},
        "lead, paper": {"recipe": "paper"},
        "rescore": {"method": "rescore"},
        "iterit": {"method": "iterit"},
        "random": {"method": "random"},
        "full pool": {"method": "full"},
    },
}
"""Axis -> value -> the options of TrainConfig that it is.

Of `model`, it is the folder that differs. `loss` and `ifd` order the pool once, by numbers of `prepare`;
`random-matched` imitates another run: to all other axes they are `random`.
"""


@dataclass(frozen=True)
class Refused:
    """Two values that cannot be combined."""

    first: str
    second: str
    reason: str
    """As in the error's message."""
    instead: str


REFUSED = [
    Refused(
        "LoRA + head",
        "tied embedding",
        "this model's LM head and embedding are one matrix",
        "an adapter on the head alone would part them; leave --lora.head off",
    ),
    Refused(
        "DoRA + modules",
        "tied embedding",
        "this model's LM head and embedding are one matrix",
        "lm_head among the modules to save would part them; name others",
    ),
    Refused(
        "QLoRA",
        "mixture of experts",
        "which bitsandbytes cannot quantise",
        "experts are one three-dimensional weight; train with --lora.quantize none",
    ),
]
"""Combinations that depend on the model are refused in model/adapter.py and model/nf4.py.

They raise an error once config.json is read, before the weights are.
"""


def refusal(first: str, second: str) -> Refused | None:
    """What stands against two values, in any order."""
    return next((each for each in REFUSED if {each.first, each.second} == {first, second}), None)


def table() -> str:
    """The pairwise table and its notes, as Markdown."""
    values = [(axis, value) for axis, some in AXES.items() for value in some]
    columns = values[: -len(AXES["method"])]  # the last axis needs none: its pairs stand in its rows
    lines = ["| | " + " | ".join(value for _, value in columns) + " |", "|---|" + ":-:|" * len(columns)]
    rows = values[len(AXES["weights"]) :]  # and the first none as a row
    for axis, value in rows:
        cells = [
            _cell(axis, value, *other) if number < values.index((axis, value)) else ""
            for number, other in enumerate(columns)
        ]
        lines.append(f"| **{value}** | " + " | ".join(cells) + " |")
    notes = [
        f'{number}. **{each.first}** with **{each.second}**: "{each.reason}": {each.instead}.'
        for number, each in enumerate(REFUSED, 1)
    ]
    wrapped = (textwrap.fill(note, 120, subsequent_indent=" " * 3, break_on_hyphens=False) for note in notes)
    return "\n".join([*lines, "", *wrapped]) + "\n"


def _cell(axis: str, value: str, other_axis: str, other: str) -> str:
    if axis == other_axis:
        return ""
    against = refusal(value, other)
    return f"no ({REFUSED.index(against) + 1})" if against else "yes"


def pairs() -> list[tuple[str, str]]:
    """Every pair of values of two axes, refused or not."""
    return [pair for one, two in itertools.combinations(AXES.values(), 2) for pair in itertools.product(one, two)]


if __name__ == "__main__":
    print(table(), end="")
