"""A training run's parts, put together: pool, model, selector, estimator, optimizer, scorer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lead_engine.base.fingerprint import Parts
from lead_engine.config import TrainConfig
from lead_engine.model.load import build_model, load_config, weights_folder
from lead_engine.model.parallelize import gathered_bytes, keep_gathered
from lead_engine.model.vocabulary import check_vocabulary, rows_of
from lead_engine.pool.heldout import HeldOutData
from lead_engine.pool.state import PoolState
from lead_engine.pool.store import ANSWERS, TokenStore
from lead_engine.selection.loss_change import make_loss_change
from lead_engine.selection.methods import METHODS
from lead_engine.selection.plan import Layout
from lead_engine.selection.selector import Selector
from lead_engine.training.combinations import check_combination
from lead_engine.training.distributed import Ranks, data_mesh
from lead_engine.training.heldout_data import open_heldout
from lead_engine.training.loop import Engine
from lead_engine.training.memory import estimate, fits_gathered, total_bytes
from lead_engine.training.optimizer import check_available, make_optimizer
from lead_engine.training.origin import base_folder, base_tokenizer, run_parts
from lead_engine.training.scorer import PoolScorer


@dataclass
class Session:
    """A training run's parts, built and not yet started: what `lead-engine train` drives, and what others may drive by import."""

    config: TrainConfig
    engine: Engine
    state: PoolState
    tokenizer: PreTrainedTokenizerBase
    base: Path
    parts: Parts
    """What the run is made from; see `origin.run_parts`."""
    budget: int
    """Tokens to train."""
    heldout: HeldOutData | None = None
    """What it is evaluated on while it trains."""


class Inputs(NamedTuple):
    """What a run starts from, found and compared, before anything large is loaded."""

    base: Path
    tokenizer: PreTrainedTokenizerBase
    parts: Parts
    """Its fingerprint; see `origin.run_parts`."""


def find_inputs(config: TrainConfig, ranks: Ranks) -> Inputs:
    """The base's folder and tokenizer, and what the run is made from. UserError where pool and model do not fit."""
    base = base_folder(config, ranks)
    tokenizer = base_tokenizer(config, base)
    return Inputs(base, tokenizer, ranks.first_says(lambda: run_parts(config, base, tokenizer)))


def build(config: TrainConfig, ranks: Ranks, inputs: Inputs | None = None, *, evaluates: bool = False) -> Session:
    """Open the pool, load the model, and put the engine together. UserError for everything that the user can mend.

    evaluates: open --eval-data, in the run folder.
    """
    check_combination(config, ranks.size, ranks.device)
    check_available(config.optimizer)  # before the weights are read
    store = TokenStore.open(config.pool / "store", config.runtime.placement, ranks.device)
    state = _pool_state(config, store)
    given = inputs or find_inputs(config, ranks)
    base, tokenizer = given.base, given.tokenizer
    _check_vocabulary(config, base, store, len(tokenizer))
    heldout = open_heldout(config, ranks, tokenizer) if evaluates else None
    longest = int(store.lengths.max())
    if heldout is not None:
        _check_vocabulary(config, base, heldout.store, len(tokenizer), source="--eval-data")
    model = build_model(
        base,
        device=ranks.device,
        mesh=data_mesh(ranks, config.runtime.replicate),
        runtime=config.runtime,
        max_length=max(longest, int(heldout.store.lengths.max())) if heldout else longest,
        lora=config.lora,
        seed=config.seed,
    )
    model.max_length = longest  # of what is trained: evaluations widen it for themselves
    layout = Layout(
        config.selection.round_steps, config.batch.micro_batches, config.batch.num_slots, config.batch.capacity
    )
    uses_change = METHODS[config.method].uses_loss_change  # else no estimate is made
    options = config.selection if uses_change else replace(config.selection, loss_change="none")
    selector = Selector(
        state,
        store.lengths,
        store.response_rows,
        method=config.method,
        config=options,
        layout=layout,
        seed=config.seed,
        device=ranks.device,
    )
    change = make_loss_change(options, model.hidden_size, selector.method.num_arms, ranks.device, config.seed)
    model.head.keep_gradient = change.wants_hidden
    needed, gathered = estimate(model, config.optimizer.kind), gathered_bytes(model)
    # Units are gathered together: what rank 0 decides holds for all.
    if not config.runtime.offload and ranks.first_says(
        lambda: fits_gathered(needed, gathered, total_bytes(ranks.device))
    ):
        keep_gathered(model)
    optimizer = make_optimizer(model, config.optimizer)
    scorer = PoolScorer(model, store, lambda: _answers(config, base, ranks), config.batch, ranks.rank, ranks.size)
    engine = Engine(
        model,
        optimizer,
        selector,
        change,
        store,
        layout,
        config.optimizer,
        ranks.rank,
        ranks.size,
        scorer=scorer,
        seed=config.seed,
    )
    budget = (
        config.epochs * store.num_tokens
        if METHODS[config.method].whole_pool
        else round(config.budget * store.num_tokens)
    )
    return Session(config, engine, state, tokenizer, base, given.parts, budget, heldout)


def _pool_state(config: TrainConfig, store: TokenStore) -> PoolState:
    """The pool's difficulty and utility, which some methods can do without."""
    if METHODS[config.method].needs_scores or PoolState.exists(config.pool):
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
