"""The start of a trainer's run: the rows' scores, the selector and its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lead_engine.base.errors import UserError
from lead_engine.config import to_dict
from lead_engine.integrations.data import TrainingRows
from lead_engine.integrations.head import base_of, text_config
from lead_engine.integrations.rounds import LOG, Rounds
from lead_engine.integrations.score import score_rows
from lead_engine.integrations.settings import Settings
from lead_engine.pool.state import PoolState
from lead_engine.pool.tokenizer import generation_prompt_ids
from lead_engine.selection.plan import Layout
from lead_engine.selection.selector import Selector

SCORES = "lead_scores"
"""Folder in the trainer's output folder: the scores of its own rows, where no pool was given."""


def start_rounds(
    settings: Settings, rows: TrainingRows, state: PoolState, args: Any, hidden_size: int, checkpoint: Path | None
) -> Rounds:
    """The rounds of a new run, or of one that goes on from `checkpoint`.

    state: the rows' scores. args: the trainer's. hidden_size: H, of the model. Raises UserError if there is nothing to
    train, or if the checkpoint is another run's.
    """
    seed = args.seed if settings.seed is None else settings.seed
    layout = Layout(
        steps=settings.round_steps,
        micro_batches=args.gradient_accumulation_steps * args.world_size,
        slots=args.per_device_train_batch_size,
        capacity=args.per_device_train_batch_size * int(rows.lengths.max()),  # any samples fit together
    )
    selector = Selector(
        state,
        rows.lengths,
        rows.counts,
        method=settings.method,
        options=settings.options,
        layout=layout,
        seed=seed,
        device=args.device,
    )
    tokens = int(rows.lengths.sum())
    budget = None if settings.budget is None else round(settings.budget * tokens)
    identity = {
        "samples": len(rows.lengths),
        "tokens": tokens,
        "method": settings.method,
        "options": to_dict(settings.options),
        "budget": budget,
        "seed": seed,
        "layout": asdict(layout),
        "ranks": args.world_size,
        "the hash of all rows": rows.measured.digest,
        "the hash of their scores": state.digest(),
    }
    rounds = Rounds(
        selector,
        selector.loss_change(hidden_size),
        budget=budget,
        identity=identity,
        rank=args.process_index,
        world=args.world_size,
        log=Path(args.output_dir) / LOG if args.process_index == 0 else None,
    )
    if checkpoint is None:
        rounds.begin()
        _check_something_to_train(rounds, settings, rows)
    else:
        rounds.load(checkpoint)
    return rounds


def _check_something_to_train(rounds: Rounds, settings: Settings, rows: TrainingRows) -> None:
    if rounds.ahead():
        return
    why = "no row can be chosen"
    if rounds.budget is not None and rounds.budget < int(rows.lengths.min()):
        why = f"the budget is {rounds.budget:,} tokens, the shortest row has more"
    raise UserError(f"lead(budget={settings.budget}): there is nothing to train: {why}")


def scores_of_the_start(checkpoint: Path, num_rows: int, output_dir: str, *, save: bool) -> PoolState:
    """The scores that a run began with, which lie beside its checkpoints. UserError if they are missing or do not fit.

    save: whether to copy them into `output_dir`, beside the checkpoints to come.
    """
    folder = checkpoint.parent / SCORES
    if not PoolState.exists(folder):
        raise UserError(
            f"resume_from_checkpoint {checkpoint}: the rows' scores are not beside it ({folder}), so the run cannot go "
            "on as it began; put that folder back"
        )
    state = PoolState.load(folder)
    if state.num_samples != num_rows:
        raise UserError(
            f"resume_from_checkpoint {checkpoint}: the run began with {state.num_samples:,} rows, train_dataset has "
            f"{num_rows:,}; give the rows that it began with"
        )
    target = Path(output_dir) / SCORES
    if save and not PoolState.exists(target):
        state.save(target)
    return state


def measure_scores(
    model: torch.nn.Module, rows: TrainingRows, tokenizer: Any, tasks: Sequence[str | None] | None, args: Any, seed: int
) -> PoolState:
    """Score the rows by the model as it is, on all ranks together; rank 0 saves the result in the output folder.

    tasks: each row's task, if known. args: the trainer's.
    """
    state = score_rows(
        model,
        rows.one,
        rows.lengths,
        prompt_without_instruction(model, tokenizer),
        tasks,
        batch=args.per_device_eval_batch_size,
        device=args.device,
        rank=args.process_index,
        world=args.world_size,
        seed=seed,
    )
    if args.process_index == 0:
        state.save(Path(args.output_dir) / SCORES)
    return state


def prompt_without_instruction(model: torch.nn.Module, tokenizer: Any) -> list[int]:
    """Token ids that ask for an answer to nothing: the chat template's, else one start or end token."""
    if getattr(tokenizer, "chat_template", None):
        return generation_prompt_ids(tokenizer)
    owners = (tokenizer, text_config(base_of(model)))
    for name in ("bos_token_id", "eos_token_id"):
        for owner in owners:
            token = getattr(owner, name, None)
            if isinstance(token, int):
                return [token]
    return [0]
