"""`lead-engine merge`: an adapter into its base."""

from __future__ import annotations

import shutil

from lead_engine.base import fingerprint
from lead_engine.base.console import say
from lead_engine.base.errors import UserError
from lead_engine.base.files import publish
from lead_engine.config import MergeConfig
from lead_engine.model import adapter, nf4
from lead_engine.model.adapter_config import find_base
from lead_engine.model.find import find_model
from lead_engine.model.identity import model_parts
from lead_engine.model.load import load_config, load_hf, load_tokenizer
from lead_engine.pool.end_of_turn import write_stop_tokens


def run(config: MergeConfig) -> None:
    """Write OUT as a plain Hugging Face model. Raises UserError if RUN holds no adapter or OUT exists.

    An adapter that was trained on a base in 4 bits is merged into that base, dequantised, and not into the checkpoint
    it came from: the adapter was fitted to the rounded weights, and OUT has the losses that training and `eval` showed.
    """
    folder = find_model(str(config.run), "RUN")
    if not (folder / adapter.CONFIG).exists():
        raise UserError(f"{folder}: holds no adapter ({adapter.CONFIG}); a fully fine-tuned model needs no merging")
    if config.out.exists():
        raise UserError(f"--out {config.out}: exists already; name a new folder")
    base, parts = find_base(folder), model_parts(folder)
    model = load_hf(folder).to(load_config(base).dtype)
    building = config.out.with_name(config.out.name + ".writing")
    shutil.rmtree(building, ignore_errors=True)
    model.save_pretrained(building)
    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(building)
    write_stop_tokens(building, tokenizer, base)
    fingerprint.write(building, {"merged from": parts})
    publish(building, config.out)
    rounded = (
        ", its weights rounded to NF4 as in training (not the checkpoint's own)" if nf4.was_trained_on(folder) else ""
    )
    say(f"merged {folder} into {base}{rounded}: {config.out}")
