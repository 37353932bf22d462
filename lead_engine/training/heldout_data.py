"""`--eval-data`: read and tokenised once, by the first rank, into RUN/heldout; a resumed run goes on with that."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lead_engine.base.console import say, warn
from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json
from lead_engine.base.fingerprint import differences
from lead_engine.config import TrainConfig
from lead_engine.pool.heldout import MARKER, HeldOutData, write_heldout
from lead_engine.pool.identity import source_parts
from lead_engine.pool.problems import UNREAD
from lead_engine.pool.sources import expand
from lead_engine.training.distributed import Ranks
from lead_engine.training.heartbeat import enter_phase

FOLDER = "heldout"
"""In the run folder."""


def open_heldout(config: TrainConfig, ranks: Ranks, tokenizer: PreTrainedTokenizerBase) -> HeldOutData | None:
    """The records of --eval-data, None where none are given; a collective over all ranks.

    Raises UserError, on all ranks alike, for records that cannot be used (see --skip-bad), and on --resume for data
    that has changed.
    """
    if not config.eval_data:
        return None
    enter_phase("reading --eval-data", limited=False)
    folder = config.out / FOLDER
    ranks.first_says(lambda: _make(config, folder, tokenizer))
    return HeldOutData.open(folder, config.runtime.placement, ranks.device)


@contextmanager
def open_temporary(
    config: TrainConfig, sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, ranks: Ranks, *, skip_bad: bool
) -> Iterator[HeldOutData]:
    """Held-out records that are not kept: every rank reads them into a folder of its own. Raises as `open_heldout`."""
    with tempfile.TemporaryDirectory(prefix="lead-heldout-") as folder:
        longest = _longest(config)
        write_heldout(Path(folder), sources, tokenizer, max_length=longest, skip_bad=skip_bad, flag="evaluate(data)")
        data = HeldOutData.open(Path(folder), config.runtime.placement, ranks.device)
        with data.store:
            yield data


def check_heldout(config: TrainConfig, ranks: Ranks) -> None:
    """UserError, on all ranks alike, where --eval-data of a run that has begun is not what it read at its start."""
    if config.eval_data:
        ranks.first_says(lambda: _is_there(config, config.out / FOLDER))


def _is_there(config: TrainConfig, folder: Path) -> bool:
    """Whether a run that has begun left its held-out records, which are then of the same data."""
    if not ((config.out / "config.yaml").exists() and (folder / MARKER).exists()):
        return False
    try:
        sources = expand(config.eval_data, "--eval-data")
    except UserError:
        say(f"--eval-data: not all of it is there any more; the run goes on with what it read at its start ({folder})")
    else:
        _check_same(read_json(folder / MARKER)["made_from"], _made_from(config, sources))
    return True


def _make(config: TrainConfig, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the folder, unless a run to be resumed has left it."""
    if _is_there(config, folder):
        return
    sources = expand(config.eval_data, "--eval-data")
    made_from = _made_from(config, sources)
    say(f"reading {', '.join(sources)}")
    try:
        marker = write_heldout(
            folder,
            sources,
            tokenizer,
            made_from=made_from,
            max_length=_longest(config),
            skip_bad=config.skip_bad,
            pool=config.pool,
        )
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from None
    for kind, count in marker["problems"].items():
        if kind != UNREAD:  # the reader has warned of those
            say(f"{count} held-out records: {kind}, named in {folder / 'problems.jsonl'}")
    if marker["in_pool"]:
        share = f"{marker['in_pool']} of {marker['samples']}"
        warn(f"--eval-data: {share} held-out records are in the pool, too, token for token")


def _made_from(config: TrainConfig, sources: Sequence[str]) -> dict[str, Any]:
    options = {"max_length": _longest(config), "skip_bad": config.skip_bad}
    return {**options, "sources": source_parts(sources, "--eval-data")}


def _longest(config: TrainConfig) -> int:
    """Held-out records are cut where the pool's were, and at what a micro-batch holds."""
    options = config.pool / "prepare.json"
    length = read_json(options).get("max_length") if options.exists() else None
    return min(length, config.batch.capacity) if isinstance(length, int) else config.batch.capacity


def _check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    found = differences({"sources": before["sources"]}, {"sources": now["sources"]}, "when it began")
    if found:
        raise UserError(
            f"--resume: --eval-data has changed since the run began ({'; '.join(found)}); its losses could not be "
            "compared with those before: bring the files back as they were, or train into another folder"
        )
    for name in now:
        if name != "sources" and before.get(name) != now[name]:
            raise UserError(
                f"--resume: the held-out records were read with {name} = {before.get(name)}, now it is {now[name]}"
            )
