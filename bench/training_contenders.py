"""The contenders of bench/training.py: a process each, which builds its trainer once and trains steps on request.

A contender's whole loop is timed as its users have it: data loading, forward, backward, clipping, AdamW, scheduler,
logging of the loss. All read the same steps: steps.pt holds the ids of the samples of every step's micro-batches.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Spec:
    """What one contender is to run."""

    name: str
    kind: str
    """lead | random (the engine), trainer, sft (TRL's SFTTrainer)."""
    form: str
    """packed | padded."""
    grouped: bool
    """Padded batches of like length, as Trainer's length grouping makes them of the same samples."""
    liger: bool
    data: str
    """Folder of `make_data`."""
    capacity: int
    micro_batches: int
    round_steps: int
    precision: str
    lr: float
    compiled: bool = False
    """The engine with --runtime.compile."""


class Link:
    """Orders come on standard input and answers go to standard output; what libraries print goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def tell(self, **answer: Any) -> None:
        print(json.dumps(answer), file=self._out, flush=True)

    def order(self) -> list[str]:
        return sys.stdin.readline().split() or ["stop"]


def peak_bytes() -> int:
    """Most memory so far: of tensors on the GPU, else of the process."""
    return torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    spec, link = Spec(**json.loads(sys.argv[1])), Link()
    torch.set_num_threads(1)
    (engine if spec.kind in ("lead", "random") else trainer)(spec, link)


def seconds(train: Callable[[], None]) -> float:
    started = time.perf_counter()
    train()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started


# --- the engine ---


def engine(spec: Spec, link: Link) -> None:
    from lead_engine.config import BatchConfig, OptimizerConfig, RuntimeConfig, SelectionConfig, TrainConfig
    from lead_engine.training.build import build
    from lead_engine.training.distributed import process_group
    from lead_engine.training.flops import ModelFlops, Peak
    from lead_engine.training.records import Meter, round_line, step_lines
    from lead_engine.training.rounds import Progress

    before = peak_bytes()
    config = TrainConfig(
        pool=Path(spec.data, "pool"),
        model=str(Path(spec.data, "model")),
        out=Path("unused"),
        method=spec.kind,
        batch=BatchConfig(spec.capacity, spec.micro_batches),
        selection=SelectionConfig(
            round_steps=spec.round_steps, **({"max_visits": 1000} if spec.kind == "lead" else {})
        ),
        optimizer=OptimizerConfig(lr=spec.lr, schedule="constant", warmup=0.0),
        runtime=RuntimeConfig(precision=spec.precision, compile=spec.compiled),
    )
    with process_group() as ranks:
        session = build(config, ranks)
        running, state = session.trainer, session.state
        meter = Meter.of(running.store, ModelFlops.of(running.model), Peak(None, ""), 1)
        names = [str(i) for i in range(running.store.num_samples)]
        trained: list[int] = []
        train_what_all_train(running, torch.load(Path(spec.data, "steps.pt")), spec, trained)
        running.budget = 1 << 60
        rounds = running.rounds(Progress())
        waiting, losses = [], []

        def rounds_of(count: int) -> Callable[[], None]:
            return lambda: [one_round() for _ in range(count)]

        def one_round() -> None:
            finished = next(rounds)
            if waiting:  # logged a round later, as the engine does
                last = waiting.pop()
                losses[:] = [line["loss"] for line in step_lines(last, last.values.read(), meter)]
                round_line(last, last.values.read(), spec.kind, state, names, spec.capacity)
            waiting.append(finished)

        link.tell(ready=True, before=before)
        while (order := link.order())[0] != "stop":
            if order[0] == "run":
                count = max(1, int(order[1]) // spec.round_steps)
                trained.clear()
                took = seconds(rounds_of(count))
                link.tell(seconds=took, steps=count * spec.round_steps, tokens=sum(trained), losses=losses)
            else:
                link.tell(synchronisations=profiled_rounds(running, one_round, Path(order[1])))
        link.tell(peak=peak_bytes())


def train_what_all_train(running, steps, spec: Spec, counted: list[int]) -> None:
    """The selector still plans every round by its method; what is trained are the steps that all contenders train.

    Every round's tokens are added to `counted`.
    """
    plan_its_own, samples = running.selector.plan, running.selector.samples
    ids = steps["ids"].to(samples.device)  # [steps, micro-batches, slots]
    sizes = [steps[name].to(samples.device) for name in ("tokens", "rows")]

    def plan(number: int, max_tokens: int):
        own = plan_its_own(number, max_tokens)
        low = number * spec.round_steps % len(ids)
        trained, tokens, rows = (x[low : low + spec.round_steps] for x in (ids, *sizes))
        counted.append(int(steps["tokens"][low : low + spec.round_steps].sum()))
        return own._replace(
            sample_ids=trained,
            tokens=tokens,
            rows=rows,
            utility=samples.utility[trained],
            visits=samples.visits[trained],
        )

    running.selector.plan = plan


def profiled_rounds(running, one_round: Callable[[], None], trace: Path) -> list[str]:
    """What makes the host wait inside two rounds, by torch's profiler; the trace goes to a file."""
    from round_profile import mark_rounds, synchronisations
    from torch.profiler import ProfilerActivity, profile

    mark_rounds(running)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]) as profiler:
        one_round()
        one_round()
    profiler.export_chrome_trace(str(trace))
    return synchronisations(json.loads(trace.read_text())["traceEvents"])


# --- Hugging Face ---


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


def trainer(spec: Spec, link: Link) -> None:
    import importlib.util
    import warnings

    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    warnings.simplefilter("ignore")
    before = peak_bytes()
    flash = CUDA and spec.form == "packed" and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    folder = str(Path(spec.data, "model"))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    model.config.use_cache = False

    class Turns(TrainerCallback):
        """Trains as many steps as the driver asks for, then waits."""

        left, started, count, before_turn = 0, 0.0, 0, 0

        def tokens(self, last_step: int) -> int:
            """Of this turn's steps: the micro-batches come in order, and begin anew after the last."""
            places = range(self.before_turn * spec.micro_batches, last_step * spec.micro_batches)
            return sum(micro.tokens[i % len(micro)] for i in places)

        def wait(self, control: Any) -> None:
            order = link.order()
            control.should_training_stop = order[0] == "stop"
            self.left = self.count = 0 if control.should_training_stop else int(order[1])
            self.started = time.perf_counter()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
            link.tell(ready=True, before=before)
            self.wait(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
            self.left -= 1
            if self.left:
                return
            if CUDA:
                torch.cuda.synchronize()
            took = time.perf_counter() - self.started
            link.tell(seconds=took, steps=self.count, tokens=self.tokens(state.global_step), losses=[])
            self.before_turn = state.global_step
            self.wait(control)

    with tempfile.TemporaryDirectory() as out:
        micro = Micro(spec)
        common: dict[str, Any] = {
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
        collator = collate(spec.form, attention)
        if spec.kind == "sft":
            from datasets import Dataset
            from transformers import AutoTokenizer

            settings = SFTConfig(**common, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
            tokenizer = AutoTokenizer.from_pretrained(folder)
            rows = Dataset.from_list(list(micro))  # the only kind that it takes
            running = SFTTrainer(
                model, settings, train_dataset=rows, data_collator=collator, processing_class=tokenizer
            )
        else:
            running = Trainer(model, TrainingArguments(**common), train_dataset=micro, data_collator=collator)
        running.add_callback(Turns())
        running._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(running.train_dataset)
        running.train()
        losses = [line["loss"] for line in running.state.log_history if "loss" in line]
        link.tell(peak=peak_bytes(), first_loss=losses[0] if losses else None)


def to_json(spec: Spec) -> str:
    return json.dumps(asdict(spec))


if __name__ == "__main__":
    main()
