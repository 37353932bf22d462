"""A plain supervised fine-tuning step of this engine against Hugging Face's Trainer.

    python bench/sft_against_trainer.py --pool PREPARED --model MODEL

Both train the same model (fp32 master weights) on the same packed micro-batches of the same samples, AdamW, one micro-batch a step, in the
same precision, in turns within one process. Trainer gets what its users would give it for padding-free batches: input_ids, labels, and
position_ids that restart at every sample, with `sdpa`, which masks by position_ids. Times are whole steps of either loop, ours with its
gathering and selection, Trainer's with its data loader; the losses of the first steps are printed, to show that the work is the same.
"""
from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from machine import arguments, write
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lead_engine.config import BatchConfig, OptimizerConfig, RuntimeConfig, SelectionConfig, TrainConfig
from lead_engine.model.load import find_model
from lead_engine.model.precision import choose_precision
from lead_engine.training.checkpoint import Progress
from lead_engine.training.distributed import Ranks, process_group
from lead_engine.training.session import build


class Packed(torch.utils.data.Dataset):
    """The engine's own micro-batches as Trainer's examples: one row of packed tokens."""

    def __init__(self, rows: list[dict[str, torch.Tensor]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return self.rows[place]


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, *_args, **_kwargs) -> None:
        self.marks.append(time.perf_counter())


def ours(flags, ranks: Ranks):
    """(seconds per step, tokens per step, first losses, the same micro-batches for Trainer)."""
    config = TrainConfig(
        pool=flags.pool,
        model=flags.model,
        out=Path("unused"),
        method="random",
        batch=BatchConfig(capacity=flags.capacity),
        selection=SelectionConfig(round_steps=flags.steps),
        optimizer=OptimizerConfig(lr=flags.lr, schedule="constant", warmup=0.0),
        runtime=RuntimeConfig(precision=flags.precision),
    )
    engine = build(config, ranks).engine
    batches: list[dict[str, torch.Tensor]] = []
    gather = engine.store.batch

    def keep(ids, *, capacity, num_rows):
        packed = gather(ids, capacity=capacity, num_rows=num_rows)
        used = int(packed.cu_seqlens[-2])
        labels = torch.full((capacity + 1,), -100)
        labels[packed.rows + 1] = packed.targets  # Trainer's models shift labels themselves
        batches.append({"input_ids": packed.input_ids[:used], "position_ids": packed.position_ids[:used], "labels": labels[:used]})
        return packed

    engine.store.batch = keep
    done = next(engine.rounds(Progress(), 1 << 60))
    steps = done.values.read().steps
    seconds = (done.after.seconds - done.before.seconds) / len(steps)
    return seconds, [t for t in done.header.tokens if t], [float(step.loss) for step in steps[:3]], batches


def trainers(flags, batches: list[dict[str, torch.Tensor]], dtype: torch.dtype):
    model = AutoModelForCausalLM.from_pretrained(find_model(flags.model), attn_implementation="sdpa", dtype=torch.float32)
    model.config.use_cache = False
    times = StepTimes()
    with tempfile.TemporaryDirectory() as out:
        settings = TrainingArguments(
            out,
            per_device_train_batch_size=1,
            max_steps=len(batches),
            learning_rate=flags.lr,
            lr_scheduler_type="constant",
            bf16=dtype == torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            optim="adamw_torch_fused",
            adam_beta2=0.95,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=0,
        )
        trainer = Trainer(model, settings, train_dataset=Packed(batches), callbacks=[times])
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line][:3]
    return [b - a for a, b in zip(times.marks, times.marks[1:], strict=False)], losses


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    ratios, lines = [], []
    with process_group() as ranks:
        dtype = choose_precision(flags.precision, ranks.device)
        for turn in range(flags.repeats + 1):
            mine, tokens, losses, batches = ours(flags, ranks)
            theirs, their_losses = trainers(flags, batches, dtype)
            if turn == 0:  # warms both up
                print("losses of the first steps, ours:", losses, "Trainer:", their_losses)
                continue
            total, each = sum(tokens), statistics.mean(theirs)
            lines.append({"ours_tokens_per_second": total / (mine * len(tokens)), "trainer_tokens_per_second": total / len(tokens) / each})
            ratios.append(each / mine)
            print(lines[-1], ratios[-1], flush=True)
    first = {"ours": losses, "trainer": their_losses}
    result = {"ratio_median": statistics.median(ratios), "ratios": ratios, "runs": lines, "first_losses": first}
    setting = {"model": flags.model, "capacity": flags.capacity, "precision": str(dtype)}
    write("sft_against_trainer", {**setting, "result": result}, flags.out)


if __name__ == "__main__":
    main()
