"""Losses of the pool under the model in training, for methods that measure them again.

Forward passes only, on all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from lead_engine.config import BatchConfig
from lead_engine.model.packed import PackedLM
from lead_engine.model.scoring import score_together
from lead_engine.pool.store import TokenStore
from lead_engine.training.heartbeat import enter_step_phase


class PoolScorer:
    """Mean NLL of any of the pool's samples under the model as it is, given their instructions or without them.

    Micro-batches are dealt to the ranks. `seconds` counts the time spent. Results are the same on every rank, and
    whatever their number but for rounding.
    """

    def __init__(
        self,
        model: PackedLM,
        store: TokenStore,
        answers: Callable[[], TokenStore],
        batch: BatchConfig,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.model, self.store, self.batch, self.rank, self.world = model, store, batch, rank, world
        self._open_answers = answers
        self._answers: TokenStore | None = None
        self.seconds = 0.0

    def given(self, ids: Tensor) -> Tensor:
        """Mean NLL of the answers given their instructions.

        ids: int64 [n] on the host. Returns fp32 [n] on the training device.
        """
        return self._score(self.store, ids, "scoring the pool again")

    def alone(self, ids: Tensor) -> Tensor:
        """Mean NLL of the answers without their instructions, likewise."""
        self._answers = self._answers or self._open_answers()
        return self._score(self._answers, ids, "scoring the answers alone")

    def _score(self, store: TokenStore, ids: Tensor, description: str) -> Tensor:
        started = time.perf_counter()
        found = score_together(
            self.model,
            store,
            ids,
            batch=self.batch,
            rank=self.rank,
            world=self.world,
            description=description,
            before_each=lambda: enter_step_phase(description),
        )
        self.seconds += time.perf_counter() - started
        return found
