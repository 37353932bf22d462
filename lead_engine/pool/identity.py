"""What a pool was made from and what it holds, by contents: sources, tokenizer with its template, tokens and scores."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lead_engine.base import fingerprint
from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json
from lead_engine.base.fingerprint import Parts, digest_file
from lead_engine.pool.sources import STDIN, content_path, expand, hub_name
from lead_engine.pool.store_files import store_digest

MARKER = "prepare.json"
"""File of a prepared pool with its options and the fingerprint of what it was made from."""


def source_parts(sources: Sequence[str], flag: str) -> list[Parts]:
    """{"name", "bytes", "digest"} of each file that the sources stand for, in order.

    The digest of a hub data set is its own fingerprint. flag: what the user named the sources with. UserError for
    sources that cannot be read.
    """
    return [_source(source, flag) for source in expand(sources, flag)]


def _source(source: str, flag: str) -> Parts:
    if source != STDIN and not os.path.exists(source):
        return {"name": source, "bytes": None, "digest": _hub_fingerprint(source)}
    path = Path(content_path(source))
    try:
        return file_parts(path) | ({"name": "standard input"} if source == STDIN else {})
    except OSError as error:
        raise UserError(f"{flag} {source}: cannot be read ({error.strerror})") from None


def file_parts(path: Path) -> Parts:
    """{"name", "bytes", "digest"} of any file. OSError where it cannot be read."""
    return {"name": path.name, "bytes": path.stat().st_size, "digest": digest_file(path)}


def _hub_fingerprint(source: str) -> str | None:
    """What `datasets` says of the set's revision, configuration and split.

    None where it cannot be had: reading the set will say why.
    """
    name = hub_name(source)
    if name is None:
        return None
    try:
        import datasets

        found = datasets.load_dataset(name.name, name.config, split=name.split)
        return str(found._fingerprint)
    except Exception:  # the hub's client raises many unrelated types
        return None


def tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> Parts:
    """Digests of all that decides which tokens a conversation becomes.

    Padding and truncation, which are set anew at every call, do not count.
    """
    template = tokenizer.chat_template
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    used = {"bos_token", "eos_token"} | {name for name in named if template and name in str(template)}
    parts = {
        "tokens": len(tokenizer),
        "special tokens": fingerprint.digest({name: token for name, token in named.items() if name in used}),
        "chat template": fingerprint.digest(template),
    }
    if not tokenizer.is_fast:
        return parts | {"vocabulary": fingerprint.digest(tokenizer.get_vocab())}
    core: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = core.pop("model")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.pop("merges", [])]
    added = sorted(core.get("added_tokens") or [], key=lambda token: token["id"])
    return parts | {
        "vocabulary": fingerprint.digest(
            [model.pop("vocab", None), [[token["id"], token["content"]] for token in added]]
        ),
        "merges": fingerprint.digest(merges),
        "added tokens": fingerprint.digest(added),
        "model": fingerprint.digest(model),
        "normalizer": fingerprint.digest(core.get("normalizer")),
        "pre-tokenizer": fingerprint.digest(core.get("pre_tokenizer")),
        "post-processor": fingerprint.digest(core.get("post_processor")),
    }


def pool_parts(pool: Path) -> Parts:
    """What a prepared pool holds: {"samples", "contents" (tokens and masks), "scores" (None without any)}."""
    samples, contents = store_digest(pool / "store")
    files = [pool / name for name in ("state.json", "state.safetensors")]
    scores = None
    if all(file.is_file() for file in files):
        scores = fingerprint.digest([digest_file(file) for file in files])
    return {"samples": samples, "contents": contents, "scores": scores}


def made_from(pool: Path) -> Parts:
    """What a pool says that it was made from: `sources`, `tokenizer`, `model`; empty for one of an older version."""
    marker = pool / MARKER
    if not marker.exists():
        return {}
    parts: Parts = read_json(marker).get(fingerprint.KEY, {})
    return parts


def own_model(pool: Path, model: str) -> bool:
    """Whether POOL/model is the scratch model of that name; a pool of an older version does not say its name."""
    marker = pool / MARKER
    if not (pool / "model").is_dir():
        return False
    return not marker.exists() or read_json(marker).get("model") == model


def same_tokenizer(pool: Path, noted: Parts | None, now: Parts) -> bool:
    """Whether a tokenizer is a pool's: by what was noted, or by POOL/tokenizer read anew.

    Another version of `tokenizers` may write the same tokenizer differently from what was noted.
    """
    return noted == now or not tokenizer_differences(pool, now)


def tokenizer_differences(pool: Path, now: Parts) -> list[str]:
    """In what POOL/tokenizer differs from another tokenizer; nothing where the pool has none."""
    if not (pool / "tokenizer").is_dir():
        return []
    kept = tokenizer_parts(AutoTokenizer.from_pretrained(pool / "tokenizer"))
    return fingerprint.differences({"tokenizer": kept}, {"tokenizer": now}, "in the pool", "in the model")
