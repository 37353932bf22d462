"""How a round of HKUSTDial/LEAD chooses its samples: what bench/plan.py compares with; see there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from plan_measure import seconds_of
from torch import Tensor

from lead_engine.pool.state import PoolState

PUBLISHED = "hkust-lead"
SAMPLE_RATE = 0.015
"""Of HKUSTDial/LEAD (scripts/run_lead.sh): the share of a cluster's task that a round trains."""


class Published:
    """One round of HKUSTDial/LEAD's choice, re-implemented on the `datasets` library from what its source does."""

    def __init__(self, pool: tuple[PoolState, Tensor, Tensor]) -> None:
        import datasets

        datasets.disable_progress_bars()
        state = pool[0]
        rows = torch.arange(state.num_samples)
        columns = {"dataset_id": rows, "idf_cluster": state.cluster, "task": state.task, "cross_entropy": state.utility}
        self.data = datasets.Dataset.from_dict({name: column.numpy() for name, column in columns.items()})
        self.data.set_format(type="pt")
        self.loss = state.utility.numpy().copy()
        self.place = {number: number for number in range(state.num_samples)}
        self.used = dict.fromkeys(range(state.num_samples), 0)
        self.clusters, self.tasks = state.num_clusters, len(state.task_names)

    def __call__(self, number: int) -> int:
        """Samples that round `number` chooses: how many."""
        cluster = number % self.clusters
        exhausted = [sample for sample, count in self.used.items() if count >= 4]
        chosen: list[int] = []
        for task in range(self.tasks):
            left = self.data.filter(
                lambda one, task=task: (
                    one["idf_cluster"] == cluster and one["task"] == task and one["dataset_id"].item() not in exhausted
                )
            )
            loss = np.array([float(self.loss[self.place[one["dataset_id"].item()]]) for one in left])
            best = np.argsort(loss)[::-1][: int(len(left) * SAMPLE_RATE)]
            chosen += [left[int(at)]["dataset_id"].item() for at in best]
        for sample in chosen:
            self.used[sample] += 1
            self.loss[self.place[sample]] *= 0.9  # as if it was trained
        return len(chosen)


def measure_published(
    pool: tuple[PoolState, Tensor, Tensor], previous: dict[str, Any] | None, seconds: float
) -> dict[str, Any]:
    """One round, or none where it would take longer than `seconds` by what the size before took."""
    samples = pool[0].num_samples
    result: dict[str, Any] = {"selection": PUBLISHED, "samples": samples}
    if previous is not None:
        expected = (previous["round_ms"] or previous["extrapolated_ms"]) * samples / previous["samples"]
        if expected > 1e3 * seconds:
            return result | {
                "round_ms": None,
                "extrapolated_ms": round(expected),
                "why": f"one round would take over {seconds:g} s",
            }
    one_round, chosen = Published(pool), []
    spent = seconds_of(lambda: chosen.append(one_round(0)), torch.device("cpu"))
    return result | {"round_ms": round(1e3 * spent, 1), "planned": chosen[0]}
