"""`lead-engine train`: from a prepared pool and a base model to a run folder."""
from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from lead_engine.config import TrainConfig
from lead_engine.console import Bar, say, table
from lead_engine.console import progress as progress_bar
from lead_engine.errors import UserError
from lead_engine.files import write_text
from lead_engine.model.load import build_model, count_parameters, find_model, load_tokenizer
from lead_engine.model.packed import PackedLM
from lead_engine.model.precision import choose_precision
from lead_engine.model.save import save_model
from lead_engine.model.scratch import is_scratch, make_scratch
from lead_engine.pool.state import PoolState
from lead_engine.pool.store import ANSWERS, TokenStore
from lead_engine.selection.loss_change import make_loss_change
from lead_engine.selection.methods import METHODS
from lead_engine.selection.selector import Layout, Selector
from lead_engine.training.checkpoint import Checkpoints, Progress
from lead_engine.training.distributed import Ranks, process_group
from lead_engine.training.loop import Engine, Round
from lead_engine.training.optimizer import NOT_FINITE, make_optimizer
from lead_engine.training.records import round_line, step_lines
from lead_engine.training.run_folder import COMPLETE, RunFolder
from lead_engine.training.scorer import PoolScorer


def run(config: TrainConfig) -> None:
    """Train and write the run folder. Raises UserError for everything that the user can mend."""
    with process_group() as ranks:
        train(config, ranks)


def train(config: TrainConfig, ranks: Ranks) -> None:
    """The same inside a process group that exists already."""
    _check(config, ranks)
    folder = RunFolder(config, writes=ranks.first)
    if (config.out / COMPLETE).exists():  # then --resume was given, with the same options
        say(f"{config.out}: already complete")
        return
    try:
        _train(config, ranks, folder)
    except RuntimeError as error:
        if NOT_FINITE in str(error):
            raise UserError(f"{config.out}: {NOT_FINITE}") from None
        raise
    finally:
        folder.close()
    ranks.barrier()  # nobody goes on before rank 0's files are there


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


def build(config: TrainConfig, ranks: Ranks) -> Session:
    """Open the pool, load the model, and put the engine together. Raises UserError for everything that the user can mend."""
    store = TokenStore.open(config.pool / "store", config.runtime.placement, ranks.device)
    state = _pool_state(config, store)
    base = _base(config, ranks)
    model = build_model(
        base,
        device=ranks.device,
        mesh=ranks.mesh,
        runtime=config.runtime,
        max_length=int(store.lengths.max()),
        lora=config.lora,
        seed=config.seed,
    )
    _check_vocabulary(config, model, store)
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
    scorer = PoolScorer(model, store, lambda: _answers(config, ranks), config.batch, ranks.rank, ranks.size)
    engine = Engine(model, optimizer, selector, change, store, layout, config.optimizer, ranks.rank, ranks.size, scorer=scorer)
    budget = config.epochs * store.num_tokens if METHODS[config.method].whole_pool else round(config.budget * store.num_tokens)
    return Session(config, engine, state, load_tokenizer(base), base, budget)


def _train(config: TrainConfig, ranks: Ranks, folder: RunFolder) -> None:
    session = build(config, ranks)
    engine, budget = session.engine, session.budget
    checkpoints = Checkpoints(config.out / "checkpoints", ranks, config.keep_checkpoints)
    parts = {"selector": engine.selector, "loss_change": engine.change}
    start = checkpoints.load(engine.model, engine.optimizer, parts) if config.resume else Progress()
    _announce(session, ranks)
    ranks.barrier()
    folder.open(start.step, start.round)
    names = _sample_names(config.pool)
    done, waiting = start, None
    with progress_bar(budget, f"{config.method}, training tokens") as bar:
        bar.advance(start.tokens)
        for finished in engine.rounds(start, budget):
            # The round before this one has long left the device: reading it now waits for nothing that is not done.
            _record(waiting, folder, session, names, bar)
            done, waiting = finished.after, finished
            if config.checkpoint_every and done.round % config.checkpoint_every == 0:
                _record(waiting, folder, session, names, bar)  # so that the logs reach as far as the checkpoint
                waiting = None
                check_replicas(engine.selector, ranks, done.step)
                checkpoints.save(engine.model, engine.optimizer, parts, done)
        _record(waiting, folder, session, names, bar)
    checkpoints.finish()
    check_replicas(engine.selector, ranks, done.step)
    if budget - done.tokens > int(engine.store.lengths.max()):  # else what is left is too little for the next sample
        say(f"no eligible sample is left after {done.tokens:,} of {budget:,} tokens (--selection.max-visits {config.selection.max_visits})")
    save_model(engine.model, session.tokenizer, config.out / "model", base=session.base, rank=ranks.rank)
    if ranks.first:
        _finish(session, ranks, done)


def check_replicas(selector: Selector, ranks: Ranks, step: int) -> None:
    """RuntimeError on all ranks unless every rank's selector is that of rank 0, bit for bit. Waits for the device.

    Ranks that disagree would train different plans from then on, and nothing else would tell.
    """
    if ranks.size == 1:
        return
    own = selector.fingerprint().view(1)
    everyone = [torch.empty_like(own) for _ in range(ranks.size)]
    dist.all_gather(everyone, own)
    first, *others = torch.cat(everyone).tolist()
    different = [str(rank) for rank, other in enumerate(others, 1) if other != first]
    if different:
        raise RuntimeError(
            f"the selection's state of ranks {', '.join(different)} differs from rank 0's after step {step}, though it is a function of "
            "what all ranks see: a machine that computes wrongly, or a defect here; checkpoints up to now agree, go on with --resume"
        )


def _record(finished: Round | None, folder: RunFolder, session: Session, names: list[str], bar: Bar) -> None:
    """Write a finished round's metrics."""
    if finished is None:
        return
    values = finished.values.read()
    lines = step_lines(finished, values)
    for line in lines:
        folder.step(line)
    folder.round(round_line(finished, values, session.config.method, session.state, names, session.config.batch.capacity))
    bar.advance(finished.after.tokens - finished.before.tokens, loss=lines[-1]["loss"], round=finished.before.round)


def _check(config: TrainConfig, ranks: Ranks) -> None:
    if config.batch.micro_batches % ranks.size:
        raise UserError(f"--batch.micro-batches {config.batch.micro_batches}: must be a multiple of the {ranks.size} ranks")
    if not (config.pool / "store").is_dir():
        raise UserError(f"--pool {config.pool}: not a prepared pool (no store/ in it); make one with `lead-engine prepare`")


def _pool_state(config: TrainConfig, store: TokenStore) -> PoolState:
    """The pool's difficulty and utility, which some methods can do without."""
    if METHODS[config.method].needs_scores or PoolState.exists(config.pool):
        return PoolState.load(config.pool, store.num_samples)
    return PoolState.unscored(store.num_samples)


def _answers(config: TrainConfig, ranks: Ranks) -> TokenStore:
    """The store of answers without instructions. A method that needs it has had `prepare`'s scores, so it is there."""
    return TokenStore.open(config.pool / ANSWERS, config.runtime.placement, ranks.device)


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


def _check_vocabulary(config: TrainConfig, model: PackedLM, store: TokenStore) -> None:
    rows = model.config.get_text_config().vocab_size
    if store.max_token_id >= rows:
        raise UserError(
            f"--model {config.model}: {rows} tokens in its vocabulary, but --pool {config.pool} holds token {store.max_token_id}: "
            "prepare the pool with this model's tokenizer"
        )


def _announce(session: Session, ranks: Ranks) -> None:
    """What was chosen, before the first step."""
    config, model, store, state = session.config, session.engine.model, session.engine.store, session.state
    whole, trained = count_parameters(model)
    precision = str(choose_precision(config.runtime.precision, ranks.device)).removeprefix("torch.")
    lora = f" (LoRA rank {config.lora.rank})" if config.lora.rank else ""
    parts = f"{state.num_clusters} clusters, {len(state.task_names)} tasks"
    step = config.batch.capacity * config.batch.micro_batches
    table(
        f"{config.method} on {config.pool}",
        ["what", "chosen"],
        [
            ["model", f"{session.base}: {whole:,} parameters, {trained:,} trained{lora}"],
            ["pool", f"{store.num_samples:,} samples, {store.num_tokens:,} tokens, {parts}"],
            ["budget", f"{session.budget:,} tokens, about {-(-session.budget // step):,} steps of {step:,} token places"],
            ["ranks", f"{ranks.size} x {ranks.device.type}, {config.batch.micro_batches // ranks.size} micro-batches a rank and step"],
            ["compute", f"{precision} (fp32 master weights), attention: {model.attention}, tokens on: {store.placement}"],
            ["selection", _describe_selection(config)],
        ],
    )


def _describe_selection(config: TrainConfig) -> str:
    """The options that the method reads."""
    o = config.selection
    if config.method == "random-matched":
        return f"the picks of {o.match}, each replaced by one of like length and task"
    if config.method == "iterit":
        return f"{o.epochs} epochs; IFD of the best {o.candidates:g} x an epoch's samples is measured again; n-grams keep {o.decay:g}"
    if config.method not in ("lead", "rescore"):
        return METHODS[config.method].__doc__.splitlines()[0]
    change = {"inner": f"inner ({o.inner_form}, q = {o.sketch_dim})", "paper": f"paper ({o.inner_form})", "none": "none"}[o.loss_change]
    utility = f"loss change {change}, b = {o.smoothing:g}, unseen: {o.unseen}" if config.method == "lead" else "measured before every round"
    ranking = f"soft (power {o.soft_power:g})" if o.ranking == "soft" else o.ranking
    tasks = "with task quotas" if o.use_tasks else "no task quotas"
    coarse, fine = f"bandit {o.bandit} ({o.draw}, prior {o.prior})", f"ranking {ranking} by {o.rank_by}, {tasks}"
    return f"{coarse}; {fine}, at most {o.max_visits} visits; U: {utility}"


def _sample_names(pool: Path) -> list[str]:
    return pq.read_table(pool / "records.parquet", columns=["id"]).column("id").to_pylist()


def _finish(session: Session, ranks: Ranks, done: Progress) -> None:
    """Utility, visits and the summary; the summary comes last and marks the run complete."""
    config, state, selector, store = session.config, session.state, session.engine.selector, session.engine.store
    visits = selector.samples.visits[:-1].cpu().numpy()
    selection = done.selection_seconds + session.engine.watch.take()
    building = config.out / "utility.writing.npz"
    np.savez(
        building,
        initial=state.utility.numpy(),
        final=selector.samples.utility[:-1].cpu().numpy(),
        visits=visits,
        cluster=state.cluster.numpy(),
        task=state.task.numpy(),
        dropped=state.dropped.numpy(),
    )
    building.replace(config.out / "utility.npz")
    summary = {
        "method": config.method,
        "seed": config.seed,
        "budget": config.budget if config.method != "full" else float(config.epochs),
        "tokens_trained": done.tokens,
        "samples_trained": int(visits.sum()),
        "distinct_samples": int((visits > 0).sum()),
        "steps": done.step,
        "rounds": done.round,
        "seconds": done.seconds,
        "selection_seconds": selection,
        "selection_ms_per_round": 1e3 * selection / max(1, done.round),
        "selection_share": selection / max(done.seconds - done.scoring_seconds, 1e-9),
        "scoring_seconds": done.scoring_seconds,
        "response_tokens_trained": int((visits * store.response_rows.numpy()).sum()),
        "fingerprint": f"{int(selector.fingerprint()) & (1 << 64) - 1:016x}",
        "pool": str(config.pool),
        "pool_tokens": store.num_tokens,
        "pool_samples": store.num_samples,
        "task_names": state.task_names,
        "world_size": ranks.size,
        "torch": torch.__version__,
    }
    write_text(config.out / COMPLETE, json.dumps(summary, indent=1))
    say(f"{done.tokens:,} tokens in {done.step} steps, {done.seconds:.1f} s; model: {config.out / 'model'}")
    per_round, share = summary["selection_ms_per_round"], summary["selection_share"]
    scoring = f"; scoring the pool again: {done.scoring_seconds:.1f} s" if done.scoring_seconds else ""
    say(f"selection: {per_round:.2f} ms a round, {share:.2%} of the time of training{scoring}")
