"""What a prepared pool was made from: noted in prepare.json, and compared when the same folder is prepared again.

prepare.json is written once tokens, masks and tokenizer are there, and before any score: what is in the folder beside
it was made from what it says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lead_engine.base import fingerprint
from lead_engine.base.console import say, warn
from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json, write_text
from lead_engine.base.fingerprint import Parts
from lead_engine.config import PrepareConfig, to_dict
from lead_engine.model.find import find_model
from lead_engine.model.identity import model_parts
from lead_engine.model.load import load_tokenizer
from lead_engine.model.scratch import is_scratch
from lead_engine.pool.chat_template import fold_system
from lead_engine.pool.identity import MARKER, same_tokenizer, source_parts, tokenizer_parts
from lead_engine.pool.store import ANSWERS
from lead_engine.prepare.tokenise import tokenise

ELSEWHERE = ("out", "runtime", "pool", "model")
"""Options that are not compared: where things lie and run, and what is compared by its contents."""
WAY_OUT = "Name another folder for --out, or delete this one to prepare it anew"


def begin(config: PrepareConfig) -> bool:
    """Tokenise the pool, unless an earlier call has. Returns whether nothing is left to do at all.

    Raises UserError if OUT was prepared with other options, or from sources, a tokenizer or a model with other
    contents, and for what cannot be read.
    """
    out, marker = config.out, config.out / MARKER
    if marker.exists():
        compared = _check(config, read_json(marker))
        done = (out / "summary.json").exists()
        if done:
            same = ", from the same sources and model" if compared else ""
            say(f"{out}: already prepared with these options{same}")
        return done
    _check_free(out)
    sources = source_parts(config.pool, "--pool")  # before they are read: a change meanwhile shows the next time
    tokenise(config)
    for stale in ("stages", ANSWERS):  # of other tokens, if they are there
        shutil.rmtree(out / stale, ignore_errors=True)
    options = {name: value for name, value in to_dict(config).items() if name not in ("out", "runtime")}
    written = options | {fingerprint.KEY: {"sources": sources} | _model_parts(config)}
    write_text(marker, json.dumps(written, indent=1))
    return False


def _check_free(out: Path) -> None:
    """UserError where OUT holds something that tokenising would write over, or mix with."""
    if (out / "summary.json").exists() and (out / "store").exists():
        unknown = f"holds a prepared pool without {MARKER}, so what it was made from is not known"
        raise UserError(f"--out {out}: {unknown}. {WAY_OUT}")
    was_begun = any((out / name).exists() for name in ("store", "store.partial"))
    if out.exists() and any(out.iterdir()) and not was_begun:
        raise UserError(f"--out {out}: exists and is no prepared pool; name another folder")


def _model_parts(config: PrepareConfig) -> Parts:
    """`tokenizer`, and `model` where its weights decide the result.

    A scratch model is the one in OUT/model, if it is there yet.
    """
    folder = config.out / "model" if is_scratch(config.model) else find_model(config.model)
    tokenizer = load_tokenizer(folder)
    if config.fold_system:
        fold_system(tokenizer)
    parts = {"tokenizer": tokenizer_parts(tokenizer)}
    if config.scoring == "model" or config.tasks:
        parts["model"] = model_parts(folder)
    return parts


def _check(config: PrepareConfig, before: dict[str, Any]) -> bool:
    """UserError where anything differs. Returns whether contents were noted, and so were compared."""
    has_contents = fingerprint.KEY in before
    _check_options(config, before, ELSEWHERE if has_contents else ELSEWHERE[:2])
    if not has_contents:
        older = "prepared by an older version, which noted no contents"
        warn(f"{config.out}: {older}: whether sources or model changed cannot be told")
        return False
    then: Parts = before[fingerprint.KEY]
    now: Parts = {"sources": source_parts(config.pool, "--pool")} | _model_parts(config)
    if same_tokenizer(config.out, then["tokenizer"], now["tokenizer"]):
        now["tokenizer"] = then["tokenizer"]
    found = fingerprint.differences(then, now, "when it was prepared")
    fingerprint.refuse(f"--out {config.out}: was prepared from something else", found, WAY_OUT)
    if "model" not in then:
        say(f"{config.out}: weights of the model play no part in --scoring {config.scoring}, and are not compared")
    return True


def _check_options(config: PrepareConfig, before: dict[str, Any], left_out: Sequence[str]) -> None:
    """UserError for options that were others; one that an older version did not know had its default."""
    now, defaults = to_dict(config), to_dict(PrepareConfig(config.pool, config.model, config.out))
    found = []
    for name, value in now.items():
        was = before.get(name, defaults[name])
        if name not in left_out and was != value:
            found.append(f"{name} was {was}, now {value}")
    # Models are compared by their contents; a scratch model has none yet, and its name says what it is.
    if before["model"] != config.model and (is_scratch(before["model"]) or is_scratch(config.model)):
        found.append(f"model was {before['model']}, now {config.model}")
    fingerprint.refuse(f"--out {config.out}: was prepared with other options", found, WAY_OUT)
