"""The files that an evaluation writes: their names, and reading them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lead_engine.base.errors import UserError
from lead_engine.base.files import read_json
from lead_engine.config import EvalConfig, to_dict

RESULT = "eval.json"
"""Losses and shares; written last."""
SAMPLES = "samples.parquet"
"""A row per held-out sample: id, dataset, nll, tokens."""
ANSWERS = "answers.jsonl"
"""A line per generated answer."""


class Samples(NamedTuple):
    """Per-sample results in the order of the held-out files."""

    ids: list[str]
    tasks: list[str]
    nll: NDArray[np.float64]
    """[n] mean loss over the sample's response tokens."""
    tokens: NDArray[np.int64]
    """[n] response tokens."""


def comparable_options(config: EvalConfig) -> dict[str, Any]:
    """The options that decide the result. Results with the same ones may be compared."""
    options = to_dict(config)
    names = ("data", "generate", "max_new_tokens", "max_length", "skip_bad", "fold_system")
    return {name: options[name] for name in names}


def read_result(folder: Path) -> dict[str, Any]:
    """The contents of FOLDER/eval.json. Raises UserError if it is missing or not an evaluation's result."""
    path = folder / RESULT
    result = read_json(path)
    try:
        loss = result["loss"]
        float(loss["overall"])
        float(loss["macro"])
        dict(loss["tasks"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a result of `lead-engine eval`; delete it and evaluate again") from None
    return result


def read_samples(folder: Path) -> Samples:
    """The contents of FOLDER/samples.parquet. Raises UserError if it is missing or damaged."""
    path = folder / SAMPLES
    try:
        table = pq.read_table(path, columns=["id", "dataset", "nll", "tokens"])
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); evaluate again") from None
    return Samples(
        ids=table.column("id").to_pylist(),
        tasks=table.column("dataset").to_pylist(),
        nll=table.column("nll").to_numpy(),
        tokens=table.column("tokens").to_numpy(),
    )
