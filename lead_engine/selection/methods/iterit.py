"""`iterit`: difficulty measured again at every epoch, and answers that say something new (IterIT, arXiv 2412.17365)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from lead_engine.config.bounds import Bounds
from lead_engine.config.methods import MethodOptions
from lead_engine.config.reads import Need, Table
from lead_engine.pool.state import PoolState
from lead_engine.pool.store import TokenStore
from lead_engine.selection.greedy_tfidf import choose, token_tfidf
from lead_engine.selection.methods.base import Draw, Method, Order, Scorer
from lead_engine.selection.samples import Samples

NEVER = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class IteritOptions(MethodOptions):
    """IterIT's options (arXiv 2412.17365)."""

    flags: ClassVar[str] = "--iterit."
    read_with: ClassVar[Table] = {"candidates": {"epochs": Need("above 1", lambda value: value > 1)}}

    epochs: Annotated[int, Bounds(ge=1)] = 3
    """How often it scores and chooses anew; each time for an equal share of the budget."""
    candidates: Annotated[float, Bounds(ge=1)] = 3.0
    """After the first epoch only the best are scored, this many times the samples that an epoch trains."""
    decay: Annotated[float, Bounds(ge=0, lt=1)] = 0.1
    """What is left of an n-gram's weight once a chosen answer has used it."""


class Iterit(Method):
    """Epoch e of `--iterit.epochs` begins when e / epochs of the budget is trained, at the next round. Its candidates
    are, at first, the whole pool, IFD as `prepare` measured it; later, the `--iterit.candidates` x (samples that the
    last epoch trained) with the highest IFD below 1 by what was last known, measured again. Those that have an IFD
    below 1 are put in greedy order of IFD x TF-IDF (greedy_tfidf.py) and trained in that order; if the list ends before
    the epoch does, it begins again. No candidate: the run ends.

    The n-grams are of the answers' token ids: the store has no text. The beginning of a greedy order does not depend on
    how much of it is wanted, so the list is made as long as the next rounds need, and longer when they have used it.
    """

    Options = IteritOptions
    options: IteritOptions

    def __init__(
        self, samples: Samples, state: PoolState, options: IteritOptions, order_length: int, seed: int
    ) -> None:
        super().__init__(samples, state, options, order_length, seed)
        n, device = samples.num_samples, samples.device
        self.epoch = torch.full((), -1, dtype=torch.int64, device=device)
        self.ifd = state.ifd.to(device)
        self.candidates = torch.zeros(n, dtype=torch.bool, device=device)
        self.sequence = torch.full((n,), n, dtype=torch.int64, device=device)
        self.visits_before = samples.visits.clone()
        self.tfidf: sp.csr_matrix | None = None  # of the candidates; made again after a resume, if it is needed

    @classmethod
    def describe(cls, options: IteritOptions) -> str:
        measured = f"IFD of the best {options.candidates:g} x an epoch's samples is measured again"
        return f"{options.epochs} epochs; {measured}; n-grams keep {options.decay:g}"

    def refresh(self, round: int, spent: float, scorer: Scorer) -> None:
        """Begin an epoch if it is time to; keep at least a round's samples on the list."""
        epoch = min(int(spent * self.options.epochs), self.options.epochs - 1)
        if epoch > int(self.epoch):
            self._begin(epoch, scorer)
        if int((self._seen() == 0).sum()) < self.order_length:
            self._lengthen(scorer.store)

    def order(self, round: int, drawn: Draw) -> Order:
        n, seen = self.samples.num_samples, self._seen()
        due = (seen == seen.amin()) & (seen < NEVER)  # those of the current pass over the list, nearly always the first
        place = torch.where(due, torch.arange(n, device=seen.device), n)
        ids = F.pad(self.sequence, (0, 1), value=n)[place.sort().values[: self.order_length]]
        return self.plain(F.pad(ids, (0, self.order_length - ids.shape[0]), value=n))

    def state_dict(self) -> dict[str, Tensor]:
        names = ("epoch", "ifd", "candidates", "sequence", "visits_before")
        return {f"iterit_{name}": getattr(self, name) for name in names}

    def loaded(self) -> None:
        self.tfidf = None

    def _seen(self) -> Tensor:
        """How often each sample of the list was trained in this epoch: int32 [N]; NEVER behind its end or if barred."""
        seen = self.samples.visits[self.sequence] - self.visits_before[self.sequence]
        gone = (self.sequence == self.samples.num_samples) | self.samples.barred[self.sequence]
        return torch.where(gone, NEVER, seen)

    def _begin(self, epoch: int, scorer: Scorer) -> None:
        self.candidates.fill_(epoch == 0)
        if epoch > 0:
            trained = int((self.samples.visits > self.visits_before)[:-1].sum())
            below_1 = torch.where(self.ifd < 1, self.ifd, -1.0)  # NaN is not below 1
            best = below_1.cpu().sort(descending=True, stable=True)
            ids = best.indices[best.values >= 0][: math.ceil(self.options.candidates * max(trained, 1))]
            if len(ids):
                self.ifd[ids.to(self.ifd.device)] = torch.exp(scorer.given(ids) - scorer.alone(ids))
            self.candidates[ids.to(self.ifd.device)] = True
        self.candidates &= (self.ifd < 1) & ~self.samples.barred[:-1]
        self.sequence.fill_(self.samples.num_samples)
        self.visits_before.copy_(self.samples.visits)
        self.epoch.fill_(epoch)
        self.tfidf = None

    def _lengthen(self, store: TokenStore) -> None:
        """Make the list twice as long, at least four rounds; up to all candidates."""
        ids = self.candidates.cpu().nonzero().squeeze(1)
        listed = int((self.sequence < self.samples.num_samples).sum())
        wanted = min(len(ids), max(2 * listed, 4 * self.order_length))
        if wanted == listed:
            return
        if self.tfidf is None:
            self.tfidf = token_tfidf(*answer_tokens(store, ids))
        quality = self.ifd.cpu()[ids].double().numpy()
        rows = choose(self.tfidf, quality, np.ones(len(ids)), wanted, self.options.decay)
        self.sequence[:wanted] = ids[torch.from_numpy(rows)].to(self.sequence.device)


def answer_tokens(store: TokenStore, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The response tokens of samples ids int64 [n], on the host: tokens int32 [total], offsets int64 [n + 1]."""
    lengths = store.lengths[ids]
    first = F.pad(lengths.cumsum(0), (1, 0))
    starts = store.offsets.cpu()[ids] - first[:-1]
    place = (torch.arange(int(first[-1])) + starts.repeat_interleave(lengths)).to(store.tokens.device)
    response = store.response[place].cpu()
    response[first[:-1]] = False  # nothing predicts a sample's first token
    counts = F.pad(response.long().cumsum(0), (1, 0))[first]
    return store.tokens[place].cpu()[response].numpy(), counts.numpy()
