"""The tokens that end an answer, for generation and for the models that are saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lead_engine.base.console import warn
from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json, write_text
from lead_engine.pool.marks import Misfit
from lead_engine.pool.records import Message, Record
from lead_engine.pool.rendering import Renderer

GENERATION = "generation_config.json"


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The control tokens that the chat template writes behind an answer.

    None where it ends answers with plain text, which may stand in an answer, and where there is no template.
    """
    if not tokenizer.chat_template:
        return []
    renderer = Renderer(tokenizer)
    try:
        rendered = renderer.record(Record("", "", (Message("user", "a"), Message("assistant", "b")), "", 0))
    except Misfit:
        return []
    [(_, end)] = rendered.answers
    behind = rendered.text[rendered.contents[-1][1] : end]
    return [renderer.control[found] for found in renderer.control_pattern.findall(behind)]


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's eos, and what the chat template writes behind an answer.

    The two differ in base models that were given a chat template: eos ends a document there, not a turn.
    """
    return sorted({tokenizer.eos_token_id, *end_of_turn(tokenizer)} - {None})


def ending_notes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a user should know about the end of an answer, a sentence each."""
    ends, eos = end_of_turn(tokenizer), tokenizer.eos_token_id
    if not ends:
        return ["the chat template ends answers with no control token: generation will not know where to stop"]
    if eos in ends:
        return []
    ending = "".join(tokenizer.convert_ids_to_tokens(ends))
    return [
        f"answers end with {ending}, not with the tokenizer's eos {tokenizer.eos_token}: generation_config.json of "
        "saved models will name both"
    ]


def write_stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, base: Path) -> list[int]:
    """Let a saved model's generation_config.json stop at the end of turn that was trained, and where its base stops.

    The file is made from the base's where the folder has none, and left as it is where nothing is missing. Returns the
    token ids that were added.
    """
    try:
        config, known = _known_ends(folder, base)
    except UserError as error:
        warn(f"{error}; generation_config.json is left as it is, and may not name what ends an answer")
        return []
    if known is None:
        known = tokenizer.eos_token_id
    if known is None:
        known = []
    elif not isinstance(known, list):
        known = [known]
    added = [end for end in end_of_turn(tokenizer) if end not in known]
    if added:
        config["eos_token_id"] = known + added
        write_text(folder / GENERATION, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return added


def _known_ends(folder: Path, base: Path) -> tuple[dict[str, Any], Any]:
    """The generation config to start from, and the eos_token_id (one, several or None) that it or the base names."""
    config: dict[str, Any] = {}
    for path in (folder / GENERATION, base / GENERATION):
        if path.exists():
            config = read_json(path)
            break
    known = config.get("eos_token_id")
    if known is None and (base / "config.json").exists():
        known = read_json(base / "config.json").get("eos_token_id")
    return config, known
