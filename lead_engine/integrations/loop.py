"""What a trainer's loop sees of the rounds: a loader with a length, epochs of N rows, callbacks around each step.

One epoch is as many steps as the trainer without LEAD makes over the data set: N rows trained, whichever they are. So
`epoch`, the progress bar, and what is logged, saved and evaluated once an epoch mean what they mean without LEAD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from lead_engine.base.console import say
from lead_engine.integrations.data import TrainingRows
from lead_engine.integrations.rounds import Rounds


def steps_in_epoch(args: Any, rows: int) -> int:
    """Optimizer steps that the trainer without LEAD makes over `rows` rows; at least 1. args: its TrainingArguments."""
    rows_a_batch = args.per_device_train_batch_size * args.world_size
    batches = rows // rows_a_batch if args.dataloader_drop_last else _ceil(rows, rows_a_batch)
    return max(1, _ceil(batches, args.gradient_accumulation_steps))


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def announce(args: Any, rows: int, budget: float | None, tokens: int | None, *, steps_from_budget: bool) -> None:
    """Say how long the run is, and whether max_steps or the budget decides.

    args: TrainingArguments with the run's max_steps. budget: the user's share; tokens: the same in tokens.
    steps_from_budget: whether max_steps follows from the budget instead of being the user's.
    """
    epochs = args.max_steps / steps_in_epoch(args, rows)
    line = f"lead: {args.max_steps:,} steps, {epochs:.4g} epochs of {rows:,} rows"
    if not steps_from_budget:
        line += ", by max_steps"
    if tokens is not None:
        line += f", or {tokens:,} tokens, by lead(budget={budget:g}), whichever comes first"
    if steps_from_budget:
        line += "; num_train_epochs is not read"
    say(line)


class PlannedBatches:
    """This rank's micro-batches, step by step, until nothing is left to train. Its length is that of an epoch.

    Nothing is fetched ahead of the step, because what a round holds is known only when the one before it is over.
    """

    def __init__(self, trainer: Trainer, rounds: Rounds, rows: TrainingRows) -> None:
        self._trainer, self._rounds, self._rows = trainer, rounds, rows
        # The trainer reads both from its loader.
        self.dataset = rows.rows
        self.batch_size = trainer.args.per_device_train_batch_size

    def __len__(self) -> int:
        args = self._trainer.args
        return steps_in_epoch(args, len(self._rows)) * args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rounds, last_step = self._rounds, None
        # A resumed run may have been over when its checkpoint was written.
        while rounds.steps_done < self._trainer.state.max_steps and rounds.ahead():
            if last_step == rounds.steps_done:
                raise RuntimeError("the trainer asked for a step's batches before it trained the step in hand")
            last_step = rounds.steps_done
            for micro_batch in range(rounds.accumulation):
                yield self._rows.batch(rounds.ids(micro_batch))


class RoundsCallback(TrainerCallback):
    """Reports each step to the selection, keeps the count of epochs, and ends the run when nothing is left to train.

    Stands before all other callbacks, so that they see the right epoch and the right end. before_update, after_update:
    called around every optimizer step.
    """

    def __init__(
        self, rounds: Rounds, num_rows: int, before_update: Callable[[], None], after_update: Callable[[], None]
    ) -> None:
        self._rounds, self._num_rows = rounds, num_rows
        self._before_update, self._after_update = before_update, after_update
        self._resumed_at = 0
        """Steps of the epoch in hand that an interrupted run had trained; the trainer's loop does not count them."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._resumed_at = state.global_step % steps_in_epoch(args, self._num_rows)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._before_update()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._after_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._resumed_at:
            epoch = steps_in_epoch(args, self._num_rows)
            state.epoch += self._resumed_at / epoch
            control.should_epoch_stop |= state.global_step % epoch == 0
        rounds = self._rounds
        if state.global_step < state.max_steps and not rounds.ahead():
            # The trainer stops, saves and evaluates as at any run's end if it takes this step for the last one.
            last = copy(state)
            last.max_steps = state.global_step
            DefaultFlowCallback().on_step_end(args, last, control)
            of_budget = "" if rounds.budget is None else f" of {rounds.budget:,}"
            say(
                f"nothing is left to train after step {state.global_step} of {state.max_steps}, "
                f"{rounds.tokens:,}{of_budget} tokens"
            )

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self._resumed_at = 0

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._rounds.finish_round()
