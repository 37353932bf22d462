"""Trainers, arguments and data sets that LEAD cannot work with raise an error that says what to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lead_engine.base.errors import UserError

Check = tuple[str, Callable[[Any], bool]]
"""What is wrong and the way out, and whether it is so; an error names the argument first."""


def _on(name: str) -> Callable[[Any], bool]:
    """Whether a trainer's arguments have the option and set it. Some options exist in SFTConfig alone."""
    return lambda args: bool(getattr(args, name, False))


def _liger_computes_the_loss(args: Any) -> bool:
    config = getattr(args, "liger_kernel_config", None) or {}
    return _on("use_liger_kernel")(args) and bool(config.get("fused_linear_cross_entropy", True))


def _steps_in_backward(args: Any) -> bool:
    optimizer = _optimizer(args)
    return "lomo" in optimizer or "layerwise" in optimizer


def _optimizer(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _sampling(args: Any) -> str:
    return str(getattr(args, "train_sampling_strategy", "random"))


WRONG_ARGUMENTS: tuple[Check, ...] = (
    (
        "packing=True: the losses of merged samples cannot be told apart; padding_free=True keeps them apart",
        _on("packing"),
    ),
    (
        "train_sampling_strategy='{sampling}': the selection decides the order of samples; leave it out",
        lambda args: _sampling(args) != "random",
    ),
    (
        "group_by_length=True: the selection decides the order of samples; leave it out",
        _on("group_by_length"),
    ),
    (
        "use_liger_kernel=True: Liger's fused loss replaces the forward that returns per-sample losses; add "
        "liger_kernel_config={{'fused_linear_cross_entropy': False}}",
        _liger_computes_the_loss,
    ),
    (
        "label_smoothing_factor: utility is the plain loss; leave it at 0",
        _on("label_smoothing_factor"),
    ),
    (
        "loss_type: utility is the plain loss; use 'nll'",
        lambda args: getattr(args, "loss_type", "nll") != "nll",
    ),
    (
        "fp16=True: the trainer scales gradients and skips steps without telling; use bf16=True or neither",
        _on("fp16"),
    ),
    (
        "dataloader_num_workers: a round is known only when the one before it is over; leave it at 0",
        lambda args: args.dataloader_num_workers > 0,
    ),
    (
        "torch_compile=True: every batch has another number of learned tokens, and the model would be compiled for "
        "each; leave it out",
        _on("torch_compile"),
    ),
    (
        "auto_find_batch_size=True: a round is planned for one batch size; leave it out",
        _on("auto_find_batch_size"),
    ),
    (
        "optim='{optimizer}': it steps while it goes backward, so the gradient of the whole step never exists; use "
        "another optimizer",
        _steps_in_backward,
    ),
    (
        "accelerator_config: split_batches=True changes the meaning of per_device_train_batch_size; leave it out",
        lambda args: _on("split_batches")(getattr(args, "accelerator_config", None)),
    ),
    (
        "deepspeed: its optimizer does not show the gradients; use DDP, or `lead-engine train`, which shards",
        _on("deepspeed"),
    ),
    (
        "fsdp: it shards the LM head's weight, which the loss needs whole; use DDP, or `lead-engine train`, which "
        "shards",
        _on("fsdp"),
    ),
)
"""In the order in which they are checked; an error begins with "args."."""


def refuse_arguments(args: Any) -> None:
    """Raise UserError for a trainer's arguments that merge or reorder samples, or change the loss or the step.

    args: TrainingArguments or a subclass; None for the trainer's defaults, which are fine.
    """
    if args is None:
        return
    for message, is_wrong in WRONG_ARGUMENTS:
        if is_wrong(args):
            raise UserError("args." + message.format(sampling=_sampling(args), optimizer=_optimizer(args)))


OWNERS = ("transformers.trainer", "trl.trainer.sft_trainer")
"""The modules whose loss and sampler LEAD may replace."""


def refuse_class(cls: type) -> None:
    """Raise UserError for a trainer class with a loss or an order of samples of its own, which LEAD would replace."""
    for name in ("compute_loss", "get_train_dataloader", "_get_train_sampler"):
        module = getattr(cls, name).__module__
        if module not in OWNERS:
            raise UserError(
                f"selection.trainer({cls.__name__}): has a {name} of its own ({module}), which LEAD would replace; "
                "give Trainer, SFTTrainer, or a class that leaves loss and sampler as they are"
            )


def refuse_dataset(dataset: Any) -> None:
    """Raise UserError for data sets without a length and rows by number."""
    if isinstance(dataset, Mapping):
        names = ", ".join(map(str, dataset))
        raise UserError(f"train_dataset: holds several ({names}); give one of them, dataset['train']")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            "train_dataset: a stream has no rows to choose from; give a data set with a length and rows by number"
        )
    if not len(dataset):
        raise UserError("train_dataset: has no rows")


WRONG_TRAINERS: tuple[Check, ...] = (
    (
        "model_init: makes another model when training starts; give the model itself",
        lambda trainer: trainer.model_init is not None,
    ),
    (
        "a model spread over several devices (device_map): give every process a whole one",
        lambda trainer: bool(trainer.is_model_parallel),
    ),
    (
        "train_dataset: has images; LEAD selects by text alone",
        lambda trainer: bool(getattr(trainer, "_is_vision_dataset", False)),
    ),
    (
        "compute_loss_func: LEAD computes the loss, sample by sample; leave it out",
        lambda trainer: trainer.compute_loss_func is not None,
    ),
    (
        "several GPUs in one process (nn.DataParallel): start the script with torchrun or accelerate launch",
        lambda trainer: trainer.args.n_gpu > 1,
    ),
    (
        "accelerate's configuration names DeepSpeed or FSDP; use DDP, or `lead-engine train`, which shards",
        lambda trainer: bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled),
    ),
    (
        "tensor, context and sequence parallelism split samples or the LM head; use DDP",
        lambda trainer: max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) > 1,
    ),
)
"""In the order in which they are checked."""


def refuse_trainer(trainer: Any) -> None:
    """Raise UserError for what only the built trainer knows: its model, its devices, its way of parallelism."""
    for message, is_wrong in WRONG_TRAINERS:
        if is_wrong(trainer):
            raise UserError(message)
