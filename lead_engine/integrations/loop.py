"""What a trainer's loop sees of the rounds: a loader with a length, epochs of N rows, the moments around a step.

One epoch is as many steps as the trainer without LEAD makes over the data set: N rows trained, whichever they are. So
`epoch`, what is logged, saved and evaluated once an epoch, and the progress bar mean what they mean without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from lead_engine.base.console import say

if TYPE_CHECKING:
    from lead_engine.integrations.trainer import _WithLead


def steps_in_epoch(args: Any, rows: int) -> int:
    """Optimizer steps that the trainer without LEAD makes over `rows` rows; never 0."""
    together = args.per_device_train_batch_size * args.world_size
    batches = rows // together if args.dataloader_drop_last else -(-rows // together)
    return max(1, -(-batches // args.gradient_accumulation_steps))


def announce(trainer: _WithLead, tokens: int | None) -> None:
    """Say how long a run is, and which of max_steps and the budget (in tokens) decides."""
    steps, rows = trainer.args.max_steps, len(trainer._lead_rows)
    long = f"lead: {steps:,} steps, {steps / steps_in_epoch(trainer.args, rows):.4g} epochs of {rows:,} rows"
    if tokens is None:
        say(f"{long}, by max_steps")
        return
    long, unread = (
        (long, "; num_train_epochs is not read") if trainer._lead_own_steps else (f"{long}, by max_steps", "")
    )
    budget = f"{tokens:,} tokens, by lead(budget={trainer.lead_selection.budget:g})"
    say(f"{long}, or {budget}, whichever comes first{unread}")


class PlannedBatches:
    """This rank's micro-batches, step by step, as long as the run goes on; its length is an epoch's.

    Nothing is fetched ahead of a step: what a round holds is known when the one before it is over.
    """

    def __init__(self, trainer: _WithLead) -> None:
        self._trainer = trainer
        self.dataset, self.batch_size = trainer._lead_rows, trainer.args.per_device_train_batch_size

    def __len__(self) -> int:
        args = self._trainer.args
        return steps_in_epoch(args, len(self.dataset)) * args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rounds, given = self._trainer.lead_rounds, None
        while rounds.steps_done < self._trainer.state.max_steps and rounds.ahead():  # a resumed run may have been over
            if given == rounds.steps_done:
                raise RuntimeError("the trainer asked for a step's batches before the step in hand was trained")
            given = rounds.steps_done
            for place in range(rounds.accumulation):
                yield self._trainer._lead_batch(rounds.ids(place))


class AroundTheStep(TrainerCallback):
    """Comes before all other callbacks, so that they see the right epoch and a run that ends where its budget does."""

    def __init__(self, trainer: _WithLead) -> None:
        self._trainer = trainer
        self._before = 0
        """Steps of the epoch in hand that an interrupted run had trained, which the trainer's loop does not count."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._before = state.global_step % steps_in_epoch(args, len(self._trainer._lead_rows))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer._lead_before_step()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer._lead_after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._before:
            epoch = steps_in_epoch(args, len(self._trainer._lead_rows))
            state.epoch += self._before / epoch
            control.should_epoch_stop |= state.global_step % epoch == 0
        rounds = self._trainer.lead_rounds
        if state.global_step < state.max_steps and not rounds.ahead():
            last = copy(state)
            last.max_steps = state.global_step
            DefaultFlowCallback().on_step_end(args, last, control)  # stops, and saves and evaluates as at any run's end
            tokens = f"{rounds.tokens:,}" + ("" if rounds.budget is None else f" of {rounds.budget:,}")
            say(f"nothing is left to train after step {state.global_step} of {state.max_steps}, {tokens} tokens")

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self._before = 0

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._trainer.lead_rounds.finish_round()
