"""The steps of a run that were skipped, and what to tell when there are too many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lead_engine.base.errors import UserError
from lead_engine.training.rounds import Round, RoundValues

MOST_NAMES = 20
MOST_STEPS = 10


class SkippedSteps:
    """Counted over a whole run, also over resumes; every rank keeps the same."""

    def __init__(self, limit: int, names: Sequence[str], out: Path, pool: Path) -> None:
        self.limit, self.names, self.out, self.pool = limit, names, out, pool
        self.count = 0
        self.first: list[dict[str, Any]] = []

    def add(self, finished: Round, values: RoundValues) -> None:
        """Take in a round's steps. UserError once more than `limit` were skipped."""
        used = [place for place, tokens in enumerate(finished.header.tokens) if tokens]
        for number, (place, stats) in enumerate(zip(used, values.steps, strict=True)):
            if not stats.skipped:
                continue
            self.count += 1
            if len(self.first) < MOST_STEPS:
                ids = values.plan.sample_ids[place]
                bad = values.stats.barred[place] & (ids < finished.dummy)  # [M, B]
                own = ids[bad]
                all_ids = ids[ids < finished.dummy]
                chosen = own if len(own) else all_ids
                self.first.append(
                    {
                        "step": finished.before.step + number,
                        "round": finished.before.round,
                        "loss": _number(stats.loss),
                        "grad_norm": _number(stats.grad_norm),
                        "own": len(own) > 0,
                        "together": bool((bad.sum(-1) > 1).any()),
                        "samples": [self.names[i] for i in torch.unique(chosen).tolist()][:MOST_NAMES],
                        "of": len(chosen),
                    }
                )
        if self.count > self.limit:
            raise UserError(self.report())

    def report(self) -> str:
        """Which steps, what was not finite in them, which samples, and what to do."""
        lines = [
            f"{self.count} steps were skipped because their loss or gradient was not finite, more than "
            f"--max-skipped-steps {self.limit} allows over the whole run:"
        ]
        left = MOST_NAMES
        for entry in sorted(self.first, key=lambda entry: not entry["own"]):  # those that name the culprits first
            what = "loss" if entry["own"] else "gradient"
            of = "whose own loss was not finite" if entry["own"] else "all of the step: each one's own loss was finite"
            if entry.get("together"):  # a matrix product may carry one row's NaN into another's
                of += "; several in one micro-batch: one of them may have spoilt the others' losses"
            shown = entry["samples"][:left]
            left -= len(shown)
            more = f" and {entry['of'] - len(shown)} more" if entry["of"] > len(shown) else ""
            lines.append(
                f"  step {entry['step']} (round {entry['round']}): the {what} (loss {entry['loss']}, gradient norm "
                f"{entry['grad_norm']}); samples {', '.join(shown) or '...'}{more} ({of})"
            )
        if self.count > len(self.first):
            lines.append(f"  and {self.count - len(self.first)} more, in {self.out / 'metrics.jsonl'} (skipped)")
        lines.append(
            f"Look at these ids in {self.pool / 'records.parquet'}. If many samples are named, training diverges or "
            "weights of the model are not finite: lower --optimizer.lr, or check --model. To go on all the same: "
            "--resume with a greater --max-skipped-steps."
        )
        return "\n".join(lines)

    def state(self) -> dict[str, Any]:
        """For checkpoints, as JSON."""
        return {"count": self.count, "first": self.first}

    def load(self, state: dict[str, Any]) -> None:
        self.count, self.first = state["count"], state["first"]


def _number(value: torch.Tensor) -> float | str:
    number = float(value)
    return round(number, 4) if math.isfinite(number) else str(number)
