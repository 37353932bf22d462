"""A training run's parts, put together: pool, model, selector, estimator, optimizer, scorer."""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lead_engine.config import TrainConfig
from lead_engine.files import read_json
from lead_engine.model.find import find_model
from lead_engine.model.load import build_model, load_config, load_tokenizer, weights_folder
from lead_engine.model.scratch import is_scratch, make_scratch
from lead_engine.model.vocabulary import check_vocabulary, rows_of
from lead_engine.pool.chat_template import fold_system
from lead_engine.pool.heldout import HeldOutData
from lead_engine.pool.state import PoolState
from lead_engine.pool.store import ANSWERS, TokenStore
from lead_engine.selection.loss_change import make_loss_change
from lead_engine.selection.methods import METHODS
from lead_engine.selection.selector import Layout, Selector
from lead_engine.training.combinations import check_combination
from lead_engine.training.distributed import Ranks, data_mesh
from lead_engine.training.heldout_data import open_heldout
from lead_engine.training.loop import Engine
from lead_engine.training.optimizer import check_available, make_optimizer
from lead_engine.training.scorer import PoolScorer


@dataclass
class Session:
    """A training run's parts, built and not yet started: what `lead-engine train` drives, and what others may drive by import."""

    config: TrainConfig
    engine: Engine
    state: PoolState
    tokenizer: PreTrainedTokenizerBase
    base: Path
    budget: int
    """Tokens to train."""
    heldout: HeldOutData | None = None
    """What it is evaluated on while it trains."""


def build(config: TrainConfig, ranks: Ranks, *, evaluates: bool = False) -> Session:
    """Open the pool, load the model, and put the engine together. UserError for everything that the user can mend.

    evaluates: open --eval-data, in the run folder.
    """
    check_combination(config, ranks.size, ranks.device)
    check_available(config.optimizer)  # before the weights are read
    store = TokenStore.open(config.pool / "store", config.runtime.placement, ranks.device)
    state = _pool_state(config, store)
    base = _base(config, ranks)
    tokenizer = _tokenizer(config, base)
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
    layout = Layout(config.selection.round_steps, config.batch.micro_batches, config.batch.num_slots, config.batch.capacity)
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
    optimizer = make_optimizer(model, config.optimizer)
    scorer = PoolScorer(model, store, lambda: _answers(config, base, ranks), config.batch, ranks.rank, ranks.size)
    engine = Engine(model, optimizer, selector, change, store, layout, config.optimizer, ranks.rank, ranks.size, scorer=scorer)
    budget = config.epochs * store.num_tokens if METHODS[config.method].whole_pool else round(config.budget * store.num_tokens)
    return Session(config, engine, state, tokenizer, base, budget, heldout)


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


def _base(config: TrainConfig, ranks: Ranks) -> Path:
    """The folder of the base model; a scratch model is the pool's own, or made here."""
    if not is_scratch(config.model):
        return find_model(config.model)
    folder = config.pool / "model"
    if not folder.exists():
        folder = config.out / "init"
        if ranks.first and not (folder / "config.json").exists():
            make_scratch(config.model, load_tokenizer(config.pool / "tokenizer"), folder, config.seed)
        ranks.barrier()
    return folder


def _tokenizer(config: TrainConfig, base: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer, which is saved with the model; its template folds system messages if the pool's did."""
    tokenizer, prepared = load_tokenizer(base), config.pool / "prepare.json"
    if prepared.exists() and read_json(prepared).get("fold_system"):
        fold_system(tokenizer)
    return tokenizer


def _check_vocabulary(
    config: TrainConfig, base: Path, store: TokenStore, tokens: int | None = None, source: str = ""
) -> None:
    rows, source = rows_of(load_config(weights_folder(base))), source or f"--pool {config.pool}"
    check_vocabulary(store.max_token_id, rows, tokens=tokens, model=f"--model {config.model}", source=source)
