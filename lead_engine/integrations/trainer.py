"""LEAD in a Hugging Face trainer: the loss, what happens around the optimizer step, and what a checkpoint keeps.

    data.py                      rows are read and checked when the trainer is built
    loop.py                      `PlannedBatches` plans a round when the one before it is over; epochs; where a run ends
    compute_loss                 the loss op on the last hidden state; one denominator for the whole step, on all ranks
    training_step                after the backward pass: by-products are collected
    on_optimizer_step            dL is estimated, statistics of all ranks are gathered, U and visits are updated
    save_model, train            the selection's state goes into every checkpoint and comes back from it

A sample's identity is never read from a batch: this side knows which rows it asked for, and checks that what the collator made has their
lengths and masks.
"""

from __future__ import annotations

import inspect
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lead_engine.base.errors import UserError
from lead_engine.config import to_dict
from lead_engine.integrations.data import ID, WithRows, is_arrow
from lead_engine.integrations.head import HeadCall, base_of, check, install
from lead_engine.integrations.loop import AroundTheStep, PlannedBatches, announce
from lead_engine.integrations.refuse import refuse_arguments, refuse_class, refuse_dataset, refuse_trainer
from lead_engine.integrations.rounds import LOG, Rounds, checkpoint_folder
from lead_engine.integrations.rows import one_sample
from lead_engine.integrations.score import score_rows
from lead_engine.integrations.selection import Selection
from lead_engine.pool.state import PoolState
from lead_engine.pool.tokenizer import generation_prompt_ids
from lead_engine.selection.loss_change import make_loss_change
from lead_engine.selection.methods import METHODS
from lead_engine.selection.plan import Layout
from lead_engine.selection.selector import Selector
from lead_engine.training.optimizer import inner_product

SCORES = "lead_scores"
"""Folder in the trainer's output folder: the scores of its own rows, where no pool was given."""


def with_lead(cls: type, selection: Selection) -> type:
    """`cls` with LEAD in it. UserError unless it is a Trainer."""
    if not (isinstance(cls, type) and issubclass(cls, Trainer)):
        name = getattr(cls, "__name__", cls)
        raise UserError(
            f"selection.trainer({name}): give a class made of transformers' Trainer, as TRL's SFTTrainer is"
        )
    refuse_class(cls)
    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        raise UserError(
            "lead_engine.integrations: needs transformers 5.19 or later (in older ones a loss cannot say how it is scaled)"
        )
    return type(f"Lead{cls.__name__}", (_WithLead, cls), {"lead_selection": selection, "__doc__": cls.__doc__})


class _WithLead(WithRows):
    """Comes before a trainer class; see `Selection.trainer`."""

    lead_rounds: Rounds
    """The run's selection, once `train` was called: `.selector.samples.utility`, `.visits`, `.round`, `.tokens`."""
    loss_is_scaled_for_ga = True
    _lead_running = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        parameters = inspect.signature(super().__init__).parameters
        given = inspect.signature(super().__init__).bind(*args, **kwargs)
        named = given.arguments
        if "train_dataset" not in parameters:  # a class of the user's that hands keywords on
            named = named.setdefault(next(name for name, p in parameters.items() if p.kind == p.VAR_KEYWORD), {})
        dataset = named.get("train_dataset")
        if dataset is None and self.lead_selection.store is not None:
            dataset = self.lead_selection.dataset()
        refuse_arguments(named.get("args"))
        if dataset is not None:
            refuse_dataset(dataset)
            if is_arrow(dataset):
                dataset = dataset.add_column(ID, np.arange(len(dataset)))
            named["train_dataset"], self._lead_given = dataset, len(dataset)
        super().__init__(*given.args, **given.kwargs)
        refuse_trainer(self)
        install(self.model)
        self.callback_handler.callbacks.insert(0, AroundTheStep(self))
        self.args = copy(self.args)  # what is set in it here is no business of the user's next trainer
        if self.train_dataset is not None:
            self._lead_read_rows()
            self._lead_set_steps()

    # --- a run ---

    def _lead_set_steps(self) -> None:
        budget, args = self.lead_selection.budget, self.args
        self._lead_own_steps = args.max_steps <= 0
        if self._lead_own_steps:
            if budget is None:
                raise UserError(
                    "lead(): how long? give lead(budget=...) or max_steps in the trainer's arguments; num_train_epochs "
                    "is not read (budget=1 trains as many tokens as one epoch)"
                )
            together = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            args.max_steps = max(1, round(budget * len(self._lead_lengths) / together))

    def get_train_dataloader(self) -> Any:
        """While training, what the rounds plan. At other times nothing is planned: all rows, as without LEAD."""
        return PlannedBatches(self) if self._lead_running else super().get_train_dataloader()

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; with resume_from_checkpoint the selection goes on from that checkpoint too."""
        if self.train_dataset is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        folder = checkpoint_folder(resume_from_checkpoint, self.args.output_dir)
        self._lead_begin(folder)
        self.args.ignore_data_skip = folder is not None  # the plan says where the data go on
        self._lead_running = True
        try:
            return super().train(None if folder is None else str(folder), *args, **kwargs)
        finally:
            self._lead_running = False

    def _lead_begin(self, checkpoint: Path | None) -> None:
        selection, args = self.lead_selection, self.args
        seed = args.seed if selection.seed is None else selection.seed
        layout = Layout(
            steps=selection.options.round_steps,
            micro_batches=args.gradient_accumulation_steps * args.world_size,
            slots=args.per_device_train_batch_size,
            capacity=args.per_device_train_batch_size * int(self._lead_lengths.max()),
        )
        options = (
            selection.options
            if METHODS[selection.method].uses_loss_change
            else replace(selection.options, loss_change="none")
        )
        state = selection.state() or self._lead_score(checkpoint, seed=seed)
        selector = Selector(
            state,
            self._lead_lengths,
            self._lead_counts,
            method=selection.method,
            config=options,
            layout=layout,
            seed=seed,
            device=args.device,
        )
        hidden_size = base_of(self.model).config.get_text_config().hidden_size
        change = make_loss_change(options, hidden_size, selector.method.num_arms, args.device, seed)
        tokens = int(self._lead_lengths.sum())
        budget = None if selection.budget is None else round(selection.budget * tokens)
        identity = {
            "samples": len(self._lead_lengths),
            "tokens": tokens,
            "method": selection.method,
            "options": to_dict(options),
            "budget": budget,
            "seed": seed,
            "layout": asdict(layout),
            "ranks": args.world_size,
            "the hash of all rows": self._lead_measured.digest,
            "the hash of their scores": state.digest(),
        }
        log = Path(args.output_dir) / LOG if self.is_world_process_zero() else None
        self.lead_rounds = Rounds(
            selector, change, budget=budget, identity=identity, rank=args.process_index, world=args.world_size, log=log
        )
        self.lead_rounds.begin() if checkpoint is None else self.lead_rounds.load(checkpoint)
        if checkpoint is None and not self.lead_rounds.ahead():
            short = budget is not None and budget < int(self._lead_lengths.min())
            why = f"the budget is {budget:,} tokens, the shortest row has more" if short else "no row can be chosen"
            raise UserError(f"lead(budget={selection.budget}): there is nothing to train: {why}")
        self._lead_checked, self._lead_pending, self._lead_losses, self._lead_metrics = False, None, [], []
        self._lead_count_tokens()
        announce(self, budget)

    def _lead_score(self, checkpoint: Path | None, *, seed: int) -> PoolState:
        """The scores of the trainer's own rows: measured, or those of the run's start, beside its checkpoints."""
        folder, args = Path(self.args.output_dir) / SCORES, self.args
        if not METHODS[self.lead_selection.method].needs_scores:
            return PoolState.unscored(len(self._lead_lengths))
        if checkpoint is not None:
            began = checkpoint.parent / SCORES
            if not PoolState.exists(began):
                raise UserError(
                    f"resume_from_checkpoint {checkpoint}: the rows' scores are not beside it ({began}), so the run "
                    "cannot go on as it began; put that folder back"
                )
            state = PoolState.load(began)
            if state.num_samples != len(self._lead_lengths):
                raise UserError(
                    f"resume_from_checkpoint {checkpoint}: the run began with {state.num_samples:,} rows, train_dataset "
                    f"has {len(self._lead_lengths):,}; give the rows that it began with"
                )
            if self.is_world_process_zero() and not PoolState.exists(folder):
                state.save(folder)  # beside the checkpoints to come, too
            return state
        tokenizer = self._lead_tokenizer
        config = base_of(self.model).config.get_text_config()
        if getattr(tokenizer, "chat_template", None):
            prompt = generation_prompt_ids(tokenizer)
        else:
            starts = [
                getattr(owner, name, None) for name in ("bos_token_id", "eos_token_id") for owner in (tokenizer, config)
            ]
            prompt = [next((token for token in starts if isinstance(token, int)), 0)]
        names = getattr(self.train_dataset, "column_names", None) or []
        with self.accelerator.autocast():
            state = score_rows(
                self.model,
                lambda i: one_sample(self._lead_rows[i], self._lead_collate),
                self._lead_lengths,
                prompt,
                self.train_dataset["dataset"][:] if "dataset" in names else None,
                batch=args.per_device_eval_batch_size,
                device=args.device,
                rank=args.process_index,
                world=args.world_size,
                seed=seed,
            )
        if self.is_world_process_zero():
            state.save(folder)
        return state

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
        where = inputs.pop("lead")
        inputs["use_cache"] = False  # with a cache, sdpa takes position_ids for the places of one long sample
        change, slots = self.lead_rounds.change, self.args.per_device_train_batch_size
        # DDP averages gradients over the ranks; the denominator counts all of them.
        weight = self.args.world_size / self.lead_rounds.rows
        call = HeadCall(
            where["rows"],
            where["targets"],
            where["row_slots"],
            slots,
            weight,
            change.signature,
            change.wants_hidden,
            with_metrics=hasattr(self, "_metrics"),
        )
        if not self._lead_checked:
            check(self.model, inputs, call, where["flattened"])
            self._lead_checked = True
        head = model(**inputs, lead=call)
        self._lead_pending = (head, call)
        loss = head.loss * torch.where(
            head.sample_nll.isfinite().all(), 1.0, torch.nan
        )  # so that all ranks' gradients tell of it
        return (loss, head) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, forward and backward, and its by-products."""
        loss = super().training_step(*args, **kwargs)
        if self._lead_pending is not None:
            (head, call), self._lead_pending = self._lead_pending, None
            hidden, gradient = call.kept if call.kept else (None, None)
            gradient = gradient if gradient is None else gradient / self.args.world_size
            shares = head.sample_tokens / self.lead_rounds.rows
            self.lead_rounds.change.collect(head, shares, hidden, gradient, call.row_slots)
            self._lead_losses.append(head.sample_nll.detach())
            if call.with_metrics:
                right = (head.predicted == call.targets).sum()
                found = (head.entropy.sum(), right, head.sample_tokens.sum())
                self._lead_metrics.append(torch.stack([value.double() for value in found]))
            if len(self._lead_losses) == self.lead_rounds.accumulation:  # of the whole step, and not yet clipped
                self._lead_norm = get_total_norm([p.grad for p in self._lead_trained() if p.grad is not None]).float()
        return loss

    def _lead_trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _lead_before_step(self) -> None:
        self._lead_check_finite()
        self._lead_rate = float(self.optimizer.param_groups[0]["lr"])
        measured = self.lead_rounds.change.wants_first_order(self.lead_rounds.steps_done)
        self._lead_before = inner_product(self._lead_trained()) if measured else None

    def _lead_check_finite(self) -> None:
        """UserError before an optimizer step on a gradient that is not finite, which would ruin every weight. Reads the device, as the
        trainer does at every loss.
        """
        if bool(self._lead_norm.isfinite()):
            return
        bad = []
        for place, losses in enumerate(self._lead_losses):
            ids = self.lead_rounds.ids(place)
            bad += [i for i, fine in zip(ids, losses.isfinite().tolist(), strict=False) if not fine]
        rows = (
            f"the loss of train_dataset's rows {bad}" if bad else "the gradient, on rows whose losses are finite here,"
        )
        raise UserError(
            f"step {self.lead_rounds.steps_done}: {rows} is not a finite number; look at the rows, lower learning_rate, or go on from the "
            "last checkpoint without them"
        )

    def _lead_after_step(self) -> None:
        first_order, norm, longest = None, self._lead_norm, self.args.max_grad_norm
        if self._lead_before is not None:
            factor = (longest / (norm + 1e-6)).clamp(max=1.0) if longest and longest > 0 else 1.0
            # Gradients were scaled by `factor`; every rank has all parameters, so nothing is summed over the ranks.
            first_order = ((inner_product(self._lead_trained()) - self._lead_before) / factor).float()
        losses, self._lead_losses = self._lead_losses, []
        self.lead_rounds.observe(losses, self._lead_rate, first_order, norm)
        self.lead_rounds.end_step()
        self._lead_count_tokens()
        if self._lead_metrics:
            self._lead_note_metrics()

    def _lead_note_metrics(self) -> None:
        """SFTTrainer's entropy and token accuracy, which its own loss notes: means over a micro-batch, on all ranks."""
        found, self._lead_metrics = torch.stack(self._lead_metrics), []
        for entropy, right, tokens in self.lead_rounds.sum_over_ranks(found).tolist():
            if tokens:
                self._metrics["train"]["entropy"].append(entropy / tokens)
                self._metrics["train"]["mean_token_accuracy"].append(right / tokens)

    def _lead_count_tokens(self) -> None:
        """SFTTrainer's num_tokens, which its own loss counts: all ranks' tokens so far, also before a resumption."""
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = self.lead_rounds.tokens
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    # --- files ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the trainer's; a checkpoint also gets the selection's state, before what marks it as whole."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR):
            self.lead_rounds.save(Path(output_dir))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer's, with the last round's number, reward and the tokens trained so far."""
        if "loss" in logs and hasattr(self, "lead_rounds"):
            logs = {**logs, **self.lead_rounds.last, "lead_tokens": self.lead_rounds.tokens}
        super().log(logs, *args, **kwargs)
