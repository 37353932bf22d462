"""lead_engine: fine-tune a language model on the part of an instruction pool that is worth it, chosen as it trains.

This module is the public interface (docs/API.md): names, arguments and results stay through a major version. Everything
else may change. Each name is imported when it is first used, so `import lead_engine` needs no torch and takes
milliseconds.

    whole runs      prepare_pool, train, evaluate: the commands of the same names, from a config
    round by round  Session, RoundReport: a run that you drive yourself
    your own loop   TokenStore, PoolState, Selector, Layout, Plan, RoundStats, make_loss_change, LossChange; and the
                    head, from lead_kernels
    options         PrepareConfig, TrainConfig, EvalConfig and their parts BatchConfig, SelectionConfig,
                    OptimizerConfig, LoraConfig, RuntimeConfig; every option is also a flag of the command line.
                    A method's own options are its own (docs/METHODS.md)
    errors          UserError, the one exception for what the caller can correct

`lead_engine.integrations` brings the selection into Hugging Face's Trainer and TRL's SFTTrainer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lead_engine.api import RoundReport, Session, evaluate, prepare_pool, train
    from lead_engine.base.errors import UserError
    from lead_engine.config import (
        BatchConfig,
        EvalConfig,
        LoraConfig,
        OptimizerConfig,
        PrepareConfig,
        RuntimeConfig,
        SelectionConfig,
        TrainConfig,
    )
    from lead_engine.pool.state import PoolState
    from lead_engine.pool.store import TokenStore
    from lead_engine.selection.loss_change import LossChange, make_loss_change
    from lead_engine.selection.plan import Layout, Plan, RoundStats
    from lead_engine.selection.selector import Selector

__all__ = [
    "BatchConfig",
    "EvalConfig",
    "Layout",
    "LoraConfig",
    "LossChange",
    "OptimizerConfig",
    "Plan",
    "PoolState",
    "PrepareConfig",
    "RoundReport",
    "RoundStats",
    "RuntimeConfig",
    "SelectionConfig",
    "Selector",
    "Session",
    "TokenStore",
    "TrainConfig",
    "UserError",
    "evaluate",
    "make_loss_change",
    "prepare_pool",
    "train",
]

_HOMES = {
    "lead_engine.api": ("RoundReport", "Session", "evaluate", "prepare_pool", "train"),
    "lead_engine.config": (
        "BatchConfig",
        "EvalConfig",
        "LoraConfig",
        "OptimizerConfig",
        "PrepareConfig",
        "RuntimeConfig",
        "SelectionConfig",
        "TrainConfig",
    ),
    "lead_engine.base.errors": ("UserError",),
    "lead_engine.pool.state": ("PoolState",),
    "lead_engine.pool.store": ("TokenStore",),
    "lead_engine.selection.loss_change": ("LossChange", "make_loss_change"),
    "lead_engine.selection.plan": ("Layout", "Plan", "RoundStats"),
    "lead_engine.selection.selector": ("Selector",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lead-engine")
    if name not in _HOME:
        raise AttributeError(f"module 'lead_engine' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # found at once the next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
