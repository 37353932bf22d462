"""summary.json of a prepared pool, and the same as tables."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from lead_engine.base.console import say, table
from lead_engine.base.files import read_lines, write_text
from lead_engine.pool.state import PoolState
from lead_engine.pool.store import TokenStore


def write_summary(out: Path, store: TokenStore, state: PoolState, centers: list[float]) -> None:
    """Print the summary and write OUT/summary.json, which marks the folder as prepared.

    centers [K]: mean difficulty of each cluster.
    """
    lengths = store.lengths.cpu()
    problems = Counter(line["kind"] for line in read_lines(out / "problems.jsonl"))
    clusters = [_cluster(k, state, lengths, centers[k]) for k in range(state.num_clusters)]
    tasks = [_task(i, state, lengths) for i in range(len(state.task_names))]
    response_tokens, dropped = int(store.response_rows.sum()), int(state.dropped.sum())
    summary = {
        "samples": store.num_samples,
        "tokens": store.num_tokens,
        "response_tokens": response_tokens,
        "dropped_misaligned": dropped,
        "problems": {kind: problems[kind] for kind in sorted(problems)},
        "clusters": clusters,
        "tasks": tasks,
    }
    say(f"{store.num_samples:,} samples, {store.num_tokens:,} tokens ({response_tokens:,} of answers)")
    say(f"misaligned (the instruction does not lower the answer's loss): {dropped:,}; in no cluster below")
    say("misaligned samples are trained all the same, unless the method leaves them out (--lead.drop-misaligned, ifd)")
    for kind in sorted(problems):
        say(f"{kind}: {problems[kind]:,}, named in {out / 'problems.jsonl'}")
    table("Difficulty clusters, easiest first", list(clusters[0]), [list(row.values()) for row in clusters])
    table("Tasks", list(tasks[0]), [list(row.values()) for row in tasks])
    write_text(out / "summary.json", json.dumps(summary, indent=1))
    say(f"prepared: {out}")


def _cluster(k: int, state: PoolState, lengths: Tensor, center: float) -> dict[str, Any]:
    members = ~state.dropped & (state.cluster == k)
    return {
        "cluster": k,
        "samples": int(members.sum()),
        "tokens": int(lengths[members].sum()),
        "mean_difficulty": center,
        "mean_utility": float(state.utility[members].mean()),
    }


def _task(i: int, state: PoolState, lengths: Tensor) -> dict[str, Any]:
    members = state.task == i
    return {
        "task": state.task_names[i],
        "samples": int(members.sum()),
        "tokens": int(lengths[members].sum()),
        "dropped": int((state.dropped & members).sum()),
        "mean_difficulty": float(state.difficulty[members].mean()),
    }
