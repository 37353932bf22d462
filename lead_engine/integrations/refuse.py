"""What cannot be right together with a selection that follows every sample's loss: refused before the first step, with the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lead_engine.base.errors import UserError


def refuse_arguments(args: Any) -> None:
    """UserError for a trainer's arguments that lose samples' identities, or whose loss or step is another. None: the trainer's defaults."""
    if args is None:
        return
    liger = getattr(args, "use_liger_kernel", False)
    fused = (getattr(args, "liger_kernel_config", None) or {}).get("fused_linear_cross_entropy", True)
    strategy = getattr(args, "train_sampling_strategy", "random")
    optim = getattr(args.optim, "value", str(args.optim))
    wrong = {
        "packing=True: merged samples' losses cannot be told apart; padding_free=True keeps them apart": getattr(
            args, "packing", False
        ),
        f"train_sampling_strategy='{strategy}': the order of samples is the selection's; leave it out": strategy
        != "random",
        "group_by_length=True: the order of samples is the selection's; leave it out": getattr(
            args, "group_by_length", False
        ),
        "use_liger_kernel=True: Liger's fused loss takes the place of the forward that gives per-sample losses; add "
        "liger_kernel_config={'fused_linear_cross_entropy': False}": liger and fused,
        "label_smoothing_factor: utility is the plain loss; leave it at 0": bool(
            getattr(args, "label_smoothing_factor", 0)
        ),
        "loss_type: utility is the plain loss; take 'nll'": getattr(args, "loss_type", "nll") != "nll",
        "fp16=True: gradients are scaled, and steps skipped, where nobody sees it; take bf16=True or neither": args.fp16,
        "dataloader_num_workers: a round is known once the one before it is over; leave it at 0": args.dataloader_num_workers
        > 0,
        "torch_compile=True: batches hold another number of learned tokens each, for which all would be compiled anew; "
        "leave it out": getattr(args, "torch_compile", False),
        "auto_find_batch_size=True: a round is planned for one batch size; leave it out": args.auto_find_batch_size,
        f"optim='{optim}': it steps while it goes backward, so no gradient of the whole step is left to measure; take another": "lomo"
        in optim
        or "layerwise" in optim,
        "accelerator_config: split_batches=True gives per_device_train_batch_size another meaning; leave it out": bool(
            getattr(getattr(args, "accelerator_config", None), "split_batches", False)
        ),
        "deepspeed: its optimizer keeps gradients to itself; take DDP, or `lead-engine train`, which shards": bool(
            args.deepspeed
        ),
        "fsdp: the LM head's weight is sharded where its loss is computed; take DDP, or `lead-engine train`, which shards": bool(
            args.fsdp
        ),
    }
    for reason, holds in wrong.items():
        if holds:
            raise UserError(f"args.{reason}")


OWN = ("transformers.trainer", "trl.trainer.sft_trainer")
"""Where the loss and the sampler that LEAD takes the place of are at home."""


def refuse_class(cls: type) -> None:
    """UserError for trainers whose loss or order of samples is their own: LEAD's would silently take its place."""
    for name in ("compute_loss", "get_train_dataloader", "_get_train_sampler"):
        home = getattr(cls, name).__module__
        if home not in OWN:
            raise UserError(
                f"selection.trainer({cls.__name__}): has a {name} of its own ({home}), which would be replaced; give Trainer, SFTTrainer, "
                "or a class that leaves loss and sampler as they are"
            )


def refuse_dataset(dataset: Any) -> None:
    """UserError for data sets without rows that can be asked for by number."""
    if isinstance(dataset, Mapping):
        names = ", ".join(map(str, dataset))
        raise UserError(f"train_dataset: holds several ({names}); give one of them, dataset['train']")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            "train_dataset: a stream has no rows to choose from; give a data set with a length and rows by number"
        )
    if not len(dataset):
        raise UserError("train_dataset: has no rows")


def refuse_trainer(trainer: Any) -> None:
    """UserError for what only the built trainer knows."""
    if trainer.model_init is not None:
        raise UserError("model_init: makes another model when training starts; give the model itself")
    if trainer.is_model_parallel:
        raise UserError("a model spread over several devices (device_map): give every process a whole one")
    if getattr(trainer, "_is_vision_dataset", False):
        raise UserError("train_dataset: has images; LEAD goes by text alone")
    if trainer.compute_loss_func is not None:
        raise UserError("compute_loss_func: the loss is computed here, a sample at a time; leave it out")
    if trainer.args.n_gpu > 1:
        raise UserError(
            "several GPUs in one process (nn.DataParallel): start the script with torchrun or accelerate launch"
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise UserError(
            "accelerate's configuration names DeepSpeed or FSDP; take DDP, or `lead-engine train`, which shards"
        )
    if max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) > 1:
        raise UserError("tensor, context and sequence parallelism split samples or the LM head; take DDP")
