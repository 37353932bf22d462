"""The benchmark's two opponents choose what `choose` does: else their times would mean nothing."""

from __future__ import annotations

import greedy_tfidf as bench
import numpy as np
import pytest

from lead_engine.selection.greedy_tfidf import answer_tfidf, choose


@pytest.mark.parametrize("opponent", [bench.resum, bench.as_published])
def test_opponents_choose_the_same(opponent) -> None:
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    tfidf = answer_tfidf([" ".join(random.choice(words, random.integers(1, 15))) for _ in range(80)])
    quality = random.uniform(0.3, 1, 80)
    assert opponent(tfidf, quality, 30) == choose(tfidf, quality, np.ones(80), 30, bench.DECAY).tolist()


def test_a_disagreement_stops_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="different rows"):
        bench.up_to_a_minute("x", lambda k: [0, 2, 1][:k], [0, 1, 2])
