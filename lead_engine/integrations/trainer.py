"""LEAD in a Hugging Face trainer: what a trainer's own methods do otherwise.

    start.py   the rows' scores, the selector and its rounds, when `train` is called
    data.py    the rows, read and checked when the trainer is built
    loop.py    plans a round when the one before it is over; counts epochs; ends the run
    head.py    the loss op on the last hidden state, behind the model's forward
    step.py    by-products of the backward passes; after the optimizer's step, new utilities and visits
    rounds.py  the selection's state, which goes into every checkpoint and comes back from it

A sample's identity is never read from a batch: this side knows which rows it asked for, and checks that what the
collator made has their lengths and masks.
"""

from __future__ import annotations

import inspect
from copy import copy
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lead_engine.base.errors import UserError
from lead_engine.config import find_method
from lead_engine.integrations.data import ROW_NUMBER, TrainingRows, is_arrow, row_numbers, rows_of_samples
from lead_engine.integrations.head import HeadCall, base_of, check, install, text_config
from lead_engine.integrations.loop import PlannedBatches, RoundsCallback, announce
from lead_engine.integrations.refuse import refuse_arguments, refuse_class, refuse_dataset, refuse_trainer
from lead_engine.integrations.rounds import Rounds, checkpoint_folder
from lead_engine.integrations.settings import Settings
from lead_engine.integrations.start import measure_scores, scores_of_the_start, start_rounds
from lead_engine.integrations.step import StepObserver
from lead_engine.pool.state import PoolState
from lead_kernels import HeadLoss


def with_lead(cls: type, settings: Settings) -> type:
    """`cls` with LEAD in it. Raises UserError unless it is a Trainer whose loss and order of samples are Trainer's."""
    if not (isinstance(cls, type) and issubclass(cls, Trainer)):
        name = getattr(cls, "__name__", cls)
        raise UserError(
            f"selection.trainer({name}): give a class made of transformers' Trainer, as TRL's SFTTrainer is"
        )
    refuse_class(cls)
    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        raise UserError(
            "lead_engine.integrations: needs transformers 5.19 or later (older versions have no way to tell a trainer "
            "that the loss is already divided by the step's tokens)"
        )
    return type(f"Lead{cls.__name__}", (_WithLead, cls), {"lead_settings": settings, "__doc__": cls.__doc__})


class _WithLead(Trainer):
    """Comes before a trainer class; see `Selection.trainer`."""

    lead_settings: Settings
    lead_rows: TrainingRows
    """The rows to choose from, once the trainer is built with a train_dataset."""
    lead_rounds: Rounds
    """The run's selection, once `train` was called: `.selector.samples.utility`, `.visits`, `.round`, `.tokens`."""
    loss_is_scaled_for_ga = True
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    _lead_step: StepObserver
    _lead_pending: tuple[HeadLoss, HeadCall] | None = None
    """Between a micro-batch's forward and backward pass."""
    _lead_running = False
    _lead_checked = False
    _lead_steps_from_budget = False
    _lead_num_given: int
    """Rows of the user's data set, before the trainer prepares it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(super().__init__)
        given = signature.bind(*args, **kwargs)
        arguments = given.arguments
        if "train_dataset" not in signature.parameters:  # a class of the user's that hands its keywords on
            keywords = next(name for name, p in signature.parameters.items() if p.kind == p.VAR_KEYWORD)
            arguments = arguments.setdefault(keywords, {})
        dataset = arguments.get("train_dataset")
        if dataset is None and self.lead_settings.store is not None:
            dataset = self.lead_settings.dataset()
        refuse_arguments(arguments.get("args"))
        if dataset is not None:
            refuse_dataset(dataset)
            if is_arrow(dataset):
                dataset = dataset.add_column(ROW_NUMBER, np.arange(len(dataset)))
            arguments["train_dataset"] = dataset
            self._lead_num_given = len(dataset)
        super().__init__(*given.args, **given.kwargs)
        refuse_trainer(self)
        install(self.model)
        self.args = copy(self.args)  # max_steps is set in it, which must not reach the user's next trainer
        if self.train_dataset is not None:
            self.lead_rows = self._lead_read_rows()
            self.lead_rows.check(self.model, self._lead_tokenizer, self.lead_settings)
            self._lead_set_steps()

    # --- before a run ---

    def _lead_read_rows(self) -> TrainingRows:
        """The rows as the trainer will train them: without the columns that its model does not read."""
        dataset: Any = self.train_dataset
        if not is_arrow(dataset):
            collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
            return TrainingRows(dataset, collate)
        numbers = row_numbers(dataset)
        self.train_dataset = dataset.remove_columns(ROW_NUMBER)
        rows = self._remove_unused_columns(self.train_dataset, description="training")
        if self.lead_settings.store is None:
            return TrainingRows(rows, self.data_collator)
        return TrainingRows(rows, self.data_collator, rows_of_samples(numbers, self._lead_num_given))

    @property
    def _lead_tokenizer(self) -> Any:
        """The trainer's or, if it was given none, its collator's; None if there is neither."""
        given = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        given = getattr(given, "tokenizer", given)  # a processor holds a tokenizer
        return given if callable(given) and hasattr(given, "all_special_ids") else None

    def _lead_set_steps(self) -> None:
        """Set max_steps, which the schedule needs before the first step, from the budget unless the user set it."""
        budget, args = self.lead_settings.budget, self.args
        self._lead_steps_from_budget = args.max_steps <= 0
        if not self._lead_steps_from_budget:
            return
        if budget is None:
            raise UserError(
                "lead(): the length of the run is missing; give lead(budget=...) or max_steps in the trainer's "
                "arguments; num_train_epochs is not read (budget=1 trains as many tokens as one epoch)"
            )
        rows_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        args.max_steps = max(1, round(budget * len(self.lead_rows.lengths) / rows_a_step))

    # --- a run ---

    def get_train_dataloader(self) -> Any:
        """While training, the batches that the rounds plan; at other times all rows, as without LEAD."""
        if self._lead_running:
            return PlannedBatches(self, self.lead_rounds, self.lead_rows)
        return super().get_train_dataloader()

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own; with resume_from_checkpoint the selection goes on from that checkpoint too."""
        if self.train_dataset is None:
            return super().train(cast(Any, resume_from_checkpoint), *args, **kwargs)  # raises the trainer's own error
        folder = checkpoint_folder(resume_from_checkpoint, self._lead_output_dir)
        self._lead_begin(folder)
        self.args.ignore_data_skip = folder is not None  # the plan says where the data go on
        callback = RoundsCallback(
            self.lead_rounds, len(self.lead_rows), self._lead_before_update, self._lead_after_update
        )
        self.callback_handler.callbacks.insert(0, callback)
        self._lead_running = True
        try:
            return super().train(None if folder is None else str(folder), *args, **kwargs)
        finally:
            self._lead_running = False
            self.callback_handler.callbacks.remove(callback)

    def _lead_begin(self, checkpoint: Path | None) -> None:
        settings, args = self.lead_settings, self.args
        hidden_size = text_config(base_of(self.model)).hidden_size
        state = self._lead_scores(checkpoint)
        self.lead_rounds = start_rounds(settings, self.lead_rows, state, args, hidden_size, checkpoint)
        self._lead_step = StepObserver(
            self.lead_rounds,
            self.model,
            num_slots=args.per_device_train_batch_size,
            world=args.world_size,
            with_metrics=hasattr(self, "_metrics"),  # SFTTrainer reports entropy and token accuracy
        )
        self._lead_checked, self._lead_pending = False, None
        self._lead_count_tokens()
        announce(
            args,
            len(self.lead_rows),
            settings.budget,
            self.lead_rounds.budget,
            steps_from_budget=self._lead_steps_from_budget,
        )

    def _lead_scores(self, checkpoint: Path | None) -> PoolState:
        """The scores of the rows: the pool's, those that an interrupted run began with, or measured now."""
        settings, args, num_rows = self.lead_settings, self.args, len(self.lead_rows.lengths)
        prepared = settings.state()
        if prepared is not None:
            return prepared
        if not find_method(settings.method).needs_scores:
            return PoolState.unscored(num_rows)
        if checkpoint is not None:
            save = self.is_world_process_zero()
            return scores_of_the_start(checkpoint, num_rows, self._lead_output_dir, save=save)
        dataset: Any = self.train_dataset
        has_tasks = "dataset" in (getattr(dataset, "column_names", None) or [])
        tasks = dataset["dataset"][:] if has_tasks else None
        seed = args.seed if settings.seed is None else settings.seed
        with self.accelerator.autocast():
            return measure_scores(self.model, self.lead_rows, self._lead_tokenizer, tasks, args, seed)

    @property
    def _lead_output_dir(self) -> str:
        return str(self.args.output_dir)

    # --- a step ---

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training, the loss op's; in evaluation, the trainer's own."""
        if "lead" not in inputs:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        inputs = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        located = inputs.pop("lead")
        inputs["use_cache"] = False  # with a cache, sdpa reads position_ids as positions in one long sample
        call = self._lead_step.call(located)
        if not self._lead_checked:
            check(self.model, inputs, call, located["flattened"])
            self._lead_checked = True
        head: HeadLoss = model(**inputs, lead=call)
        self._lead_pending = (head, call)
        # NaN reaches the gradients of all ranks, so all of them stop, whichever rank has the sample.
        loss = head.loss * torch.where(head.sample_nll.isfinite().all(), 1.0, torch.nan)
        return (loss, head) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, forward and backward; then its by-products are collected."""
        loss = super().training_step(*args, **kwargs)
        if self._lead_pending is not None:
            head, call = self._lead_pending
            self._lead_pending = None
            self._lead_step.collect(head, call)
        return loss

    def _lead_before_update(self) -> None:
        self._lead_step.before_update(float(self.optimizer.param_groups[0]["lr"]))

    def _lead_after_update(self) -> None:
        self._lead_step.after_update(self.args.max_grad_norm)
        self._lead_count_tokens()
        for entropy, accuracy in self._lead_step.token_metrics():
            metrics = self._lead_sft_metrics()
            metrics["entropy"].append(entropy)
            metrics["mean_token_accuracy"].append(accuracy)

    def _lead_sft_metrics(self) -> dict[str, list[float]]:
        """SFTTrainer's own collection for its next line of the log, which its own loss would fill."""
        metrics: dict[str, list[float]] = getattr(self, "_metrics")["train"]  # noqa: B009  only SFTTrainer has it
        return metrics

    def _lead_count_tokens(self) -> None:
        """Set SFTTrainer's num_tokens: the tokens of all ranks so far, those before a resumption too."""
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = self.lead_rounds.tokens
            self._lead_sft_metrics()["num_tokens"] = [self.lead_rounds.tokens]

    # --- files ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the trainer's own; into a checkpoint goes the selection's state, before what marks it as whole."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR):
            self.lead_rounds.save(Path(output_dir))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer's own, with the last round's number and reward and the tokens trained so far."""
        if "loss" in logs and hasattr(self, "lead_rounds"):
            logs = {**logs, **self.lead_rounds.last, "lead_tokens": self.lead_rounds.tokens}
        super().log(logs, *args, **kwargs)
