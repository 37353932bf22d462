"""Every option of the engine: frozen dataclasses, a file a command, and one for each group that commands share.

    commands   make_pool, pretrain, prepare, train, evaluate (eval, lm-eval), compare, report, merge
    groups     batch, selection, optimizer, lora, runtime: fields of the commands that read them
    machinery  bounds (what stands beside a field), convert (values to types), options (the base class), checks,
               reads (which options are read together), from_yaml, yaml_file

The command line is generated from these classes: a field `batch.capacity` is the flag `--batch.capacity`, and its
docstring is the flag's help. A YAML file given with `--config` has the same nesting; flags override it. `Bounds` and
`Rule` stand beside the field that they are about; `__post_init__` holds only rules between fields.
"""

from lead_engine.config.batch import BatchConfig
from lead_engine.config.checks import require, to_dict
from lead_engine.config.compare import CompareConfig, Share, StudyConfig
from lead_engine.config.evaluate import EvalConfig, HarnessConfig
from lead_engine.config.lora import LoraConfig
from lead_engine.config.make_pool import MakePoolConfig
from lead_engine.config.merge import MergeConfig
from lead_engine.config.methods import MethodName, MethodOptions, Recipe, find_method, method_names, register
from lead_engine.config.optimizer import OptimizerConfig, OptimizerKind
from lead_engine.config.prepare import PrepareConfig
from lead_engine.config.pretrain import PretrainConfig
from lead_engine.config.report import ReportConfig
from lead_engine.config.runtime import Attention, Checkpointing, Placement, Precision, RuntimeConfig
from lead_engine.config.selection import SelectionConfig
from lead_engine.config.train import Budget, TrainConfig

__all__ = [
    "Attention",
    "BatchConfig",
    "Budget",
    "Checkpointing",
    "CompareConfig",
    "EvalConfig",
    "HarnessConfig",
    "LoraConfig",
    "MakePoolConfig",
    "MergeConfig",
    "MethodName",
    "MethodOptions",
    "OptimizerConfig",
    "OptimizerKind",
    "Placement",
    "Precision",
    "PrepareConfig",
    "PretrainConfig",
    "Recipe",
    "ReportConfig",
    "RuntimeConfig",
    "SelectionConfig",
    "Share",
    "StudyConfig",
    "TrainConfig",
    "find_method",
    "method_names",
    "register",
    "require",
    "to_dict",
]
