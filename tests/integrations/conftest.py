"""A trainer and the engine on the same pool, model and options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LR = 1e-3


@pytest.fixture(scope="session")
def make_args(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """make_args(per_device_train_batch_size=4, ...) -> TrainingArguments, or `cls`.

    In fp32, with a constant rate and the engine's AdamW; without files.
    """

    def make(cls: type | None = None, **options: Any) -> Any:
        from transformers import TrainingArguments

        plain = {
            "output_dir": str(tmp_path_factory.mktemp("trainer")),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "adam_beta2": 0.95,
            "optim": "adamw_torch_fused",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "seed": 0,
            "logging_nan_inf_filter": False,
        }
        return (cls or TrainingArguments)(**{**plain, **options})

    return make


@pytest.fixture(scope="session")
def load() -> Callable[..., Any]:
    """load(folder, **options) -> the transformers model in fp32."""

    def model(folder: Path, **options: Any) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})

    return model


@pytest.fixture(scope="session")
def collator() -> Callable[[Path], Any]:
    """collator(folder with a tokenizer) -> transformers' padding collator for labelled sequences."""

    def make(folder: Path) -> Any:
        from transformers import AutoTokenizer, DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder), label_pad_token_id=-100)

    return make


@pytest.fixture(scope="session")
def engine_rounds() -> Callable[..., tuple[list[Any], Any]]:
    """engine_rounds(pool, model, micro_batches=2, slots=4, rounds=3, budget=1000.0, method="lead", options=...).

    Returns (reports, selector).
    """

    def run(
        pool: Path,
        model: Path,
        *,
        micro_batches: int = 2,
        slots: int = 4,
        rounds: int = 10**6,
        budget: float = 1000.0,
        lora: Any = None,
        capacity: int | None = None,
        **options: Any,
    ) -> tuple[list[Any], Any]:
        from lead_engine import (
            BatchConfig,
            LoraConfig,
            OptimizerConfig,
            RuntimeConfig,
            Session,
            TokenStore,
            TrainConfig,
        )

        capacity = capacity or slots * int(TokenStore.open(pool / "store").lengths.max())
        config = TrainConfig(
            pool=pool,
            model=str(model),
            out=Path("unused"),
            budget=budget,
            batch=BatchConfig(capacity=capacity, micro_batches=micro_batches, slots=slots),
            optimizer=OptimizerConfig(lr=LR, warmup=0.0, schedule="constant"),
            runtime=RuntimeConfig(precision="fp32"),
            lora=lora or LoraConfig(),
            **options,
        )
        reports = []
        with Session(config) as session:
            for report in session.rounds():
                reports.append(report)
                if len(reports) == rounds:
                    break
            return reports, session.selector

    return run
