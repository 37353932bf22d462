"""Trainer and SFTTrainer as contenders of bench/training.py."""

from __future__ import annotations

import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training_link import CUDA, Link, Spec, peak_bytes
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer


class Micro(torch.utils.data.Dataset):
    """One item a micro-batch: its samples as (tokens, labels)."""

    def __init__(self, spec: Spec) -> None:
        from lead_engine.pool.store import TokenStore

        store, steps = TokenStore.open(Path(spec.data, "pool", "store")), torch.load(Path(spec.data, "steps.pt"))
        ids = steps["grouped" if spec.grouped else "ids"].flatten(0, 1)
        self.micro = [micro[micro < store.num_samples].tolist() for micro in ids]
        self.tokens = [int(store.lengths[micro].sum()) for micro in self.micro]
        self.store = store

    def __len__(self) -> int:
        return len(self.micro)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {"samples": [self.sample(i) for i in self.micro[place]]}

    def sample(self, i: int) -> dict[str, list[int]]:
        low, high = self.store.offsets[i], self.store.offsets[i + 1]
        tokens, response = self.store.tokens[low:high].long(), self.store.response[low:high].clone()
        response[0] = False
        return {"input_ids": tokens.tolist(), "labels": torch.where(response, tokens, -100).tolist()}


def collate(form: str, attention: str) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Trainer's batch of one micro-batch, by the libraries' own collators: padded on the right, or one packed row."""
    if form == "packed":
        from transformers import DataCollatorWithFlattening

        flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=attention == "flash_attention_2")
        return lambda items: dict(flatten(items[0]["samples"]))
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    pad = DataCollatorForLanguageModeling(pad_token_id=0)
    return lambda items: dict(pad(items[0]["samples"]))


class Turns(TrainerCallback):
    """Trains as many steps as the driver asks for, then waits."""

    def __init__(self, spec: Spec, link: Link, micro: Micro, before: int) -> None:
        self.spec, self.link, self.micro, self.before = spec, link, micro, before
        self.left, self.started, self.count, self.before_turn = 0, 0.0, 0, 0

    def tokens(self, last_step: int) -> int:
        """Of this turn's steps: the micro-batches come in order, and begin anew after the last."""
        places = range(self.before_turn * self.spec.micro_batches, last_step * self.spec.micro_batches)
        return sum(self.micro.tokens[i % len(self.micro)] for i in places)

    def wait(self, control: Any) -> None:
        order = self.link.order()
        control.should_training_stop = order[0] == "stop"
        self.left = self.count = 0 if control.should_training_stop else int(order[1])
        self.started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        self.link.tell(ready=True, before=self.before)
        self.wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        self.left -= 1
        if self.left:
            return
        if CUDA:
            torch.cuda.synchronize()
        took = time.perf_counter() - self.started
        self.link.tell(seconds=took, steps=self.count, tokens=self.tokens(state.global_step), losses=[])
        self.before_turn = state.global_step
        self.wait(control)


def settings(spec: Spec, out: str) -> dict[str, Any]:
    """Of Trainer and SFTTrainer alike."""
    return {
        "output_dir": out,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": spec.micro_batches,
        "max_steps": 1 << 20,
        "learning_rate": spec.lr,
        "lr_scheduler_type": "constant",
        "bf16": spec.precision == "bf16",
        "use_cpu": not CUDA,
        "optim": "adamw_torch_fused",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_steps": spec.round_steps,
        "seed": 0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": CUDA,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "use_liger_kernel": spec.liger,
    }


def make_trainer(spec: Spec, micro: Micro, out: str) -> Trainer:
    flash = CUDA and spec.form == "packed" and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    folder = str(Path(spec.data, "model"))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    model.config.use_cache = False
    collator = collate(spec.form, attention)
    if spec.kind == "trainer":
        return Trainer(model, TrainingArguments(**settings(spec, out)), train_dataset=micro, data_collator=collator)

    from datasets import Dataset
    from transformers import AutoTokenizer

    config = SFTConfig(**settings(spec, out), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    rows = Dataset.from_list(list(micro))  # the only kind that it takes
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SFTTrainer(model, config, train_dataset=rows, data_collator=collator, processing_class=tokenizer)


def trainer(spec: Spec, link: Link) -> None:
    """Train in turns until the driver says stop."""
    warnings.simplefilter("ignore")
    before = peak_bytes()  # the libraries are imported: what follows is the model's and the trainer's
    with tempfile.TemporaryDirectory() as out:
        micro = Micro(spec)
        running = make_trainer(spec, micro, out)
        running.add_callback(Turns(spec, link, micro, before))
        running._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(running.train_dataset)
        running.train()
        losses = [line["loss"] for line in running.state.log_history if "loss" in line]
        link.tell(peak=peak_bytes(), first_loss=losses[0] if losses else None)
