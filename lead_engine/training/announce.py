"""A run's first screen: what was chosen and why, before the first step."""

from __future__ import annotations

import os

import torch

from lead_engine.base.console import table
from lead_engine.config import TrainConfig, find_method
from lead_engine.model import nf4
from lead_engine.model.adapter import describe, lora_of
from lead_engine.model.find import hub_name
from lead_engine.model.load import count_parameters
from lead_engine.model.packed import PackedLM
from lead_engine.model.parallelize import gathered_bytes
from lead_engine.model.precision import choose_precision
from lead_engine.training.build import TrainingSetup
from lead_engine.training.distributed import Ranks
from lead_engine.training.heldout import BEST
from lead_engine.training.memory import estimate, size
from lead_engine.training.records import Meter

ATTENTION = {
    "flash": "flash-attn's varlen kernel",
    "varlen": "torch's varlen kernel; flash-attn is not installed",
    "segment": "one sample at a time, on a CPU the fastest",
    "mask": "SDPA under a block-diagonal mask",
}


def announce(setup: TrainingSetup, ranks: Ranks, meter: Meter) -> None:
    """Print the table, from rank 0; no collective."""
    config = setup.config
    table(
        f"{config.method} on {config.pool}",
        ["what", "chosen"],
        [[what, text] for what, text in _rows(setup, ranks, meter) if text],
    )


def _rows(setup: TrainingSetup, ranks: Ranks, meter: Meter) -> list[tuple[str, str]]:
    config, model, store, state = setup.config, setup.trainer.model, setup.trainer.store, setup.state
    step, budget = config.batch.capacity * config.batch.micro_batches, setup.trainer.budget
    name, (whole, trained) = hub_name(setup.base) or setup.base, count_parameters(model)
    return [
        ("model", f"{name}: {model.config.model_type}, {whole:,} parameters, {trained:,} trained{_adapters(model)}"),
        (
            "pool",
            f"{store.num_samples:,} samples, {store.num_tokens:,} tokens, {state.num_clusters} clusters, "
            f"{len(state.task_names)} tasks",
        ),
        ("budget", f"{budget:,} tokens, about {-(-budget // step):,} steps of {step:,} token places"),
        ("ranks", _ranks(config, ranks)),
        ("precision", _precision(config, ranks.device)),
        (
            "attention",
            f"{model.attention}: {_why(config.runtime.attention, ATTENTION[model.attention], '--runtime.attention')}",
        ),
        (
            "tokens on",
            f"{store.placement}: {_why(config.runtime.placement, _placement(store.placement), '--runtime.placement')}",
        ),
        ("memory savers", _savers(config)),
        ("optimizer", _optimizer(config)),
        ("memory", str(estimate(model, config.optimizer.kind))),
        ("weights", _weights(model)),
        ("selection", find_method(config.method).describe(config.options)),
        ("checkpoints", _checkpoints(config)),
        ("held-out", _heldout(setup)),
        ("logs", _logs(config)),
        ("MFU", _peak(meter)),
    ]


def _why(requested: str, reason: str, flag: str) -> str:
    """The reason, where it was chosen; the flag, where it was asked for."""
    return reason if requested == "auto" else f"asked for by {flag}"


def _adapters(model: PackedLM) -> str:
    if model.peft_config is None:
        return ""
    head = ", head included" if lora_of(model.head.projection) is not None else ""
    base = ", base in 4 bits (NF4, double quantised)" if any(nf4.layers(model)) else ""
    return f" ({describe(model.peft_config)}{head}{base})"


def _ranks(config: TrainConfig, ranks: Ranks) -> str:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    nodes = f" on {ranks.size // here} nodes" if ranks.size > here else ""
    replicas, share = config.runtime.replicate, config.batch.micro_batches // ranks.size
    if ranks.size == 1:
        sharding = "not sharded"
    elif replicas > 1:
        sharding = f"HSDP: {replicas} replicas, each sharded over {ranks.size // replicas}"
    else:
        sharding = "FSDP2: sharded over all"
    threads = torch.get_num_threads()
    cpu = f"CPU ({threads} thread{'s' if threads > 1 else ''})"
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else cpu
    return f"{ranks.size} x {device}{nodes}; {sharding}; {share} micro-batch{'es' if share > 1 else ''} a rank and step"


def _precision(config: TrainConfig, device: torch.device) -> str:
    dtype = choose_precision(config.runtime.precision, device)
    reason = (
        "multiplied natively here" if dtype == torch.bfloat16 else f"no bf16 instructions on this {device.type.upper()}"
    )
    why = _why(config.runtime.precision, reason, "--runtime.precision")
    return f"{str(dtype).removeprefix('torch.')}: {why}; master weights and gradient reduction fp32"


def _placement(placement: str) -> str:
    verb = "fits" if placement == "device" else "does not fit"
    return f"the pool {verb} in a quarter of the free memory"


def _weights(model: PackedLM) -> str:
    if not model.keeps_gathered:
        return "gathered anew for every block's forward and backward pass"
    dtype = str(model.compute_dtype).removeprefix("torch.")
    gathered = f"gathered in {dtype} once a step, {size(gathered_bytes(model))} a rank until its end"
    return f"{gathered}: half of the memory stays free"


def _savers(config: TrainConfig) -> str:
    runtime = config.runtime
    used = [f"checkpointing {runtime.checkpointing}"] if runtime.checkpointing != "none" else []
    used += ["parameters and optimizer in host memory (offload)"] if runtime.offload else []
    used += ["blocks compiled"] if runtime.compile else []
    return "; ".join(used) or "none: no recomputation, no offload, blocks not compiled"


def _optimizer(config: TrainConfig) -> str:
    o = config.optimizer
    kind = "AdamW (fused, fp32 moments)" if o.kind == "adamw" else "AdamW (8-bit moments)"
    rate = f"lr {o.lr:g} {o.schedule}, warm-up {o.warmup:g}"
    return f"{kind}, {rate}, weight decay {o.weight_decay:g}, clipping at {o.max_grad_norm:g}"


def _checkpoints(config: TrainConfig) -> str:
    if not config.checkpoint_every:
        only = "only when SIGTERM or Ctrl-C stops it, for --resume"
        return f"{only}; a run that is killed begins anew (--checkpoint-every 0)"
    kept = f"the last {config.keep_checkpoints} kept" if config.keep_checkpoints > 1 else "the last kept"
    when = f"every {config.checkpoint_every} rounds and when SIGTERM or Ctrl-C stops it"
    return f"{when}, {kept}; the same command with --resume goes on"


def _heldout(setup: TrainingSetup) -> str:
    data, config = setup.heldout, setup.config
    if data is None:
        return ""
    when = "before training and at its end"
    if config.eval_every:
        when = f"{when}, and every {config.eval_every} steps (at a round's end); the best model in {config.out / BEST}"
    stops = f"; stops after {config.patience} in a row without a lower loss" if config.patience else ""
    samples, tokens, tasks = data.store.num_samples, data.store.num_tokens, len(set(data.tasks))
    return f"{samples:,} samples, {tokens:,} tokens, {tasks} task{'s' if tasks > 1 else ''}: loss {when}{stops}"


def _logs(config: TrainConfig) -> str:
    extra = [f"W&B project {config.wandb}"] if config.wandb else []
    extra += [f"MLflow experiment {config.mlflow}"] if config.mlflow else []
    return ", ".join([f"{config.out}: metrics.jsonl, selection.jsonl, tensorboard", *extra])


def _peak(meter: Meter) -> str:
    if meter.peak.tflops is None:
        return f"not reported: no peak ({meter.peak.reason})"
    peak = f"{meter.devices} x {meter.peak.tflops:g} TFLOP/s ({meter.peak.reason})"
    flops = meter.flops
    counted = f"{flops.per_token:.3g} FLOPs a token in the blocks, {flops.per_row:.3g} a response token in the head"
    return f"of {peak}; {counted}"
