"""Builds a trainer from a configuration: pool, model, selector, loss change, optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lead_engine.base.fingerprint import Parts
from lead_engine.config import TrainConfig, find_method
from lead_engine.model.load import build_model, load_config, weights_folder
from lead_engine.model.packed import PackedLM
from lead_engine.model.parallelize import gathered_bytes, keep_gathered
from lead_engine.model.save import save_model
from lead_engine.model.vocabulary import check_vocabulary, rows_of
from lead_engine.pool.heldout import HeldOutData
from lead_engine.pool.state import PoolState
from lead_engine.pool.store import ANSWERS, TokenStore
from lead_engine.selection.loss_change import LossChange
from lead_engine.selection.plan import Layout
from lead_engine.selection.selector import Selector
from lead_engine.training.combinations import check_combination
from lead_engine.training.distributed import Ranks, data_mesh
from lead_engine.training.heldout_data import open_heldout
from lead_engine.training.memory import estimate, fits_gathered, total_bytes
from lead_engine.training.optimizer import check_available, make_optimizer
from lead_engine.training.origin import base_folder, base_tokenizer, run_parts
from lead_engine.training.scorer import PoolScorer
from lead_engine.training.trainer import Trainer


@dataclass
class TrainingSetup:
    """A trainer that has not started, and what it was built from.

    `lead-engine train` and the Python API's Session drive it.
    """

    config: TrainConfig
    trainer: Trainer
    state: PoolState
    tokenizer: PreTrainedTokenizerBase
    base: Path
    """The base model's folder."""
    made_from: Parts
    """The run's fingerprint; see `origin.run_parts`."""
    heldout: HeldOutData | None = None
    """What it is evaluated on while it trains."""

    def save_model(self, folder: Path, rank: int) -> None:
        """Write the model as it is, see `model.save.save_model`; a collective over all ranks."""
        parts = self.made_from["model"]
        save_model(self.trainer.model, self.tokenizer, folder, base=self.base, rank=rank, parts=parts)


class Inputs(NamedTuple):
    """What a run starts from, found and compared before anything large is loaded."""

    base: Path
    """The base model's folder."""
    tokenizer: PreTrainedTokenizerBase
    made_from: Parts
    """The run's fingerprint; see `origin.run_parts`."""


def find_inputs(config: TrainConfig, ranks: Ranks) -> Inputs:
    """The base's folder and tokenizer, and what the run is made from. UserError where pool and model do not fit."""
    base = base_folder(config, ranks)
    tokenizer = base_tokenizer(config, base)
    return Inputs(base, tokenizer, ranks.first_says(lambda: run_parts(config, base, tokenizer)))


def build(config: TrainConfig, ranks: Ranks, inputs: Inputs | None = None, *, evaluates: bool = False) -> TrainingSetup:
    """Open the pool, load the model, and put the trainer together. UserError for everything that the user can mend.

    evaluates: open --eval-data, in the run folder.
    """
    check_combination(config, ranks.size, ranks.device)
    check_available(config.optimizer)  # before the weights are read
    store = TokenStore.open(config.pool / "store", config.runtime.placement, ranks.device)
    state = _pool_state(config, store)
    base, tokenizer, made_from = inputs or find_inputs(config, ranks)
    _check_vocabulary(config, base, store, len(tokenizer))
    heldout = open_heldout(config, ranks, tokenizer) if evaluates else None
    if heldout is not None:
        _check_vocabulary(config, base, heldout.store, len(tokenizer), source="--eval-data")
    model = _model(config, ranks, base, store, heldout)
    selector, loss_change = _selection(config, ranks, state, store, model.hidden_size)
    model.head.keep_gradient = loss_change.wants_hidden
    _keep_weights_gathered(config, ranks, model)
    scorer = PoolScorer(model, store, lambda: _answers(config, base, ranks), config.batch, ranks.rank, ranks.size)
    trainer = Trainer(
        model,
        make_optimizer(model, config.optimizer),
        selector,
        loss_change,
        store,
        scorer,
        config.optimizer,
        _budget(config, store),
        ranks.rank,
        ranks.size,
        seed=config.seed,
    )
    return TrainingSetup(config, trainer, state, tokenizer, base, made_from, heldout)


def _model(config: TrainConfig, ranks: Ranks, base: Path, store: TokenStore, heldout: HeldOutData | None) -> PackedLM:
    longest = longest_trained = int(store.lengths.max())
    if heldout is not None:
        longest = max(longest, int(heldout.store.lengths.max()))
    model = build_model(
        base,
        device=ranks.device,
        mesh=data_mesh(ranks, config.runtime.replicate),
        runtime=config.runtime,
        max_length=longest,
        lora=config.lora,
        seed=config.seed,
    )
    model.max_length = longest_trained  # evaluations widen it for themselves
    return model


def _selection(
    config: TrainConfig, ranks: Ranks, state: PoolState, store: TokenStore, hidden_size: int
) -> tuple[Selector, LossChange]:
    """What the method selects with, and the estimator of what a step does to its samples."""
    batch = config.batch
    selector = Selector(
        state,
        store.lengths,
        store.response_rows,
        method=config.method,
        options=config.options,
        layout=Layout(config.selection.round_steps, batch.micro_batches, batch.num_slots, batch.capacity),
        seed=config.seed,
        device=ranks.device,
    )
    return selector, selector.loss_change(hidden_size)


def _keep_weights_gathered(config: TrainConfig, ranks: Ranks, model: PackedLM) -> None:
    """Let sharded weights stay gathered through a step, where memory allows."""
    if ranks.mesh is None or config.runtime.offload:  # a model that is not sharded has nothing to gather
        return
    needed, gathered = estimate(model, config.optimizer.kind), gathered_bytes(model)
    # Units are gathered together: what rank 0 decides holds for all.
    if ranks.first_says(lambda: fits_gathered(needed, gathered, total_bytes(ranks.device))):
        keep_gathered(model)


def _budget(config: TrainConfig, store: TokenStore) -> int:
    """Tokens to train."""
    return int(find_method(config.method).budget(config.options, config.budget, store.num_tokens))


def _pool_state(config: TrainConfig, store: TokenStore) -> PoolState:
    """The pool's difficulty and utility, which some methods can do without."""
    if find_method(config.method).needs_scores or PoolState.exists(config.pool):
        return PoolState.load(config.pool, store.num_samples)
    return PoolState.unscored(store.num_samples)


def _answers(config: TrainConfig, base: Path, ranks: Ranks) -> TokenStore:
    """The store of answers without instructions. A method that needs it has had `prepare`'s scores, so it is there."""
    store = TokenStore.open(config.pool / ANSWERS, config.runtime.placement, ranks.device)
    _check_vocabulary(config, base, store)
    return store


def _check_vocabulary(
    config: TrainConfig, base: Path, store: TokenStore, tokens: int | None = None, source: str = ""
) -> None:
    rows, source = rows_of(load_config(weights_folder(base))), source or f"--pool {config.pool}"
    check_vocabulary(store.max_token_id, rows, tokens=tokens, model=f"--model {config.model}", source=source)
