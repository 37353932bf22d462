"""A run's first screen: what was chosen, before the first step."""
from __future__ import annotations

from lead_engine.config import TrainConfig
from lead_engine.console import table
from lead_engine.model.load import count_parameters
from lead_engine.model.precision import choose_precision
from lead_engine.selection.methods import METHODS
from lead_engine.training.distributed import Ranks
from lead_engine.training.session import Session


def announce(session: Session, ranks: Ranks) -> None:
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
