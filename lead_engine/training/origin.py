"""What a run is made from: the pool's contents, the base model's, and that the two have one tokenizer.

It stands in RUN/fingerprint.json and in every checkpoint's marker, and is compared when the run is resumed and when
`compare` finds it.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lead_engine.base import fingerprint
from lead_engine.base.console import say, warn
from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json
from lead_engine.base.fingerprint import Parts
from lead_engine.config import TrainConfig
from lead_engine.model.find import find_model
from lead_engine.model.identity import model_parts
from lead_engine.model.load import load_tokenizer
from lead_engine.model.scratch import is_scratch, make_scratch
from lead_engine.pool import identity as pools
from lead_engine.pool.chat_template import fold_system
from lead_engine.training.distributed import Ranks

BY_CONTENTS = ("pool", "model", "random-matched.match", "eval_data")
"""Options of a run that its fingerprint stands for: what they name may have moved."""


def base_folder(config: TrainConfig, ranks: Ranks | None = None) -> Path:
    """The folder of the base model. A scratch model is the pool's own, if that is of this name, or made in RUN/init.

    It is made anew unless a run has begun with it. ranks: None where nothing is to be made.
    """
    if not is_scratch(config.model):
        return find_model(config.model)
    if pools.own_model(config.pool, config.model):
        return config.pool / "model"
    folder = config.out / "init"
    if ranks is not None:
        if ranks.first and not ((config.out / "config.yaml").exists() and (folder / "config.json").exists()):
            make_scratch(config.model, load_tokenizer(config.pool / "tokenizer"), folder, config.seed)
        ranks.barrier()
    return folder


def base_tokenizer(config: TrainConfig, base: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer, which is saved with the model; its template folds system messages if the pool's did."""
    tokenizer, prepared = load_tokenizer(base), config.pool / pools.MARKER
    if prepared.exists() and read_json(prepared).get("fold_system"):
        fold_system(tokenizer)
    return tokenizer


def run_parts(config: TrainConfig, base: Path, tokenizer: PreTrainedTokenizerBase) -> Parts:
    """{"pool", "model", "tokenizer"}, and "match" (the run that is imitated).

    Reads every byte of the base: on one rank.

    Raises UserError where the pool has another tokenizer than the model, or the run that is imitated another pool.
    """
    parts = {
        "pool": pools.pool_parts(config.pool),
        "model": model_parts(base),
        "tokenizer": pools.tokenizer_parts(tokenizer),
    }
    _check_tokenizer(config, parts["tokenizer"])
    _tell_other_judge(config, parts["model"])
    return parts | match_parts(config, parts["pool"])


def match_parts(config: TrainConfig, pool: Parts) -> Parts:
    """{"match"} of a run that imitates another, else nothing.

    UserError where that was trained on another pool than `pool`.
    """
    match = config.match
    if match is None:
        return {}
    noted, log = fingerprint.read(match), match / "selection.jsonl"
    if noted is not None and noted["pool"]["contents"] != pool["contents"]:
        raise UserError(
            f"--random-matched.match {match}: was trained on another pool, or on this one before it was prepared anew"
        )
    return {"match": {"rounds": fingerprint.digest_file(log) if log.exists() else None}}


def check_same(before: Parts | None, now: Parts, pool: Path, what: str, way_out: str) -> None:
    """Raise UserError where a run was made from other things than are there now.

    The message is "WHAT: made from something else: ..." and says which. before: None for an older version's run.
    """
    if before is None:
        warn(
            f"{what}: by an older version, which noted no contents: whether pool or model changed since cannot be told"
        )
        return
    found = fingerprint.differences({k: v for k, v in before.items() if k != "made from"}, now, "when it was begun")
    if before.get("pool") != now["pool"]:
        found += fingerprint.differences(before.get("made from", {}), pools.made_from(pool), "when it was begun")
    fingerprint.refuse(f"{what}: made from something else", found, way_out)


def written(parts: Parts, pool: Path) -> Parts:
    """What is written of a run: its parts, and what its pool was made from, so that a later message can say more."""
    return {**parts, "made from": pools.made_from(pool)}


def _check_tokenizer(config: TrainConfig, now: Parts) -> None:
    noted = pools.made_from(config.pool).get("tokenizer")
    if pools.same_tokenizer(config.pool, noted, now):
        if noted is None and not (config.pool / "tokenizer").is_dir():
            warn(
                f"--pool {config.pool}: does not say which tokenizer it was prepared with; "
                "it is taken to be the model's"
            )
        return
    found = pools.tokenizer_differences(config.pool, now)
    way_out = (
        f"Prepare the pool with this model, or train a model with the pool's tokenizer{_prepared_with(config.pool)}"
    )
    if not any(phrase.startswith(("vocabulary", "merges")) for phrase in found):
        files = config.pool / "tokenizer"
        way_out += f"; if the model is to learn the pool's template, copy the files of {files} into its folder"
    fingerprint.refuse(
        f"--model {config.model}: its tokenizer is not the one that --pool {config.pool} was prepared with",
        found,
        way_out,
    )


def _prepared_with(pool: Path) -> str:
    marker = pool / pools.MARKER
    return f" (it was prepared with {read_json(marker)['model']})" if marker.exists() else ""


def _tell_other_judge(config: TrainConfig, now: Parts) -> None:
    before = pools.made_from(config.pool).get("model")
    if before is None or before == now:
        return
    judge = str(read_json(config.pool / pools.MARKER)["model"])
    if Path(judge).resolve() == Path(config.model).resolve():
        found = "; ".join(fingerprint.differences({"model": before}, {"model": now}))
        warn(
            f"--model {config.model}: has changed since it scored --pool {config.pool} ({found}); those scores are used"
        )
    else:
        say(
            f"--pool {config.pool}: scored by another model{_prepared_with(config.pool)}; --model {config.model} "
            "starts from those scores"
        )
