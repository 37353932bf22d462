"""What an evaluation was made from (held-out files, model, tokenizer), and whether a result on disk still holds."""

from __future__ import annotations

from pathlib import Path

from lead_engine.base import fingerprint
from lead_engine.base.files import read_json
from lead_engine.base.fingerprint import Parts
from lead_engine.config import EvalConfig
from lead_engine.evaluation.outputs import RESULT, comparable_options
from lead_engine.model.find import find_model
from lead_engine.model.identity import model_parts
from lead_engine.model.load import load_tokenizer
from lead_engine.pool.identity import source_parts, tokenizer_parts


def evaluation_parts(config: EvalConfig, folder: Path) -> Parts:
    """The contents that decide the result: {"sources", "model", "tokenizer"}. folder: the model's.

    Reads every byte of the files.
    """
    return {
        "sources": source_parts(config.data, "--data"),
        "model": model_parts(folder),
        "tokenizer": tokenizer_parts(load_tokenizer(folder)),
    }


def why_again(config: EvalConfig) -> list[str] | None:
    """Why the result in `config.out` no longer holds: a list of phrases, empty if it holds; None if there is no result.

    A result of an older version, which noted no contents, does not hold.
    """
    assert config.out is not None
    path = config.out / RESULT
    if not path.exists():
        return None
    result = read_json(path)
    before, now = result.get("options"), comparable_options(config)
    if not isinstance(before, dict) or not isinstance(result.get(fingerprint.KEY), dict):
        return ["an older version made it, which noted no contents"]
    found = [
        f"{name} was {before.get(name)}, now {now[name]}"
        for name in now
        if name != "data" and before.get(name) != now[name]
    ]
    return found + fingerprint.differences(result[fingerprint.KEY], evaluation_parts(config, find_model(config.model)))
