"""Token places left empty by rules of packing, and how far `lead_kernels.pack_plan` strays from the order of priority.

    python bench/packing.py [--pool PREPARED] [--out FILE]

A step has M micro-batches (bins; ranks times accumulation) of `capacity` places and at most capacity / 32 samples.
Places are computed whether they are filled or not: waste is the share of empty ones, over all steps but the last.
Lengths come in random order: those of a prepared pool, and log-normal ones. Nothing is timed; the same inputs give the
same file.

Rules. All take samples in order but for what they pass over, which stays first in what remains; none depends on later
steps.
- next fit: a bin ends at the first sample that does not fit.
- best fit: all bins of a step are open; a sample goes where it leaves the least; the step ends at the first that fits
  nowhere.
- best fit, 64 ahead: the step goes on until 64 samples have fitted nowhere.
- best fit decreasing: the longest prefix of what remains that fits into the step when its samples are placed by falling
  length.
- pack_plan: see there. Bins one after another, the same for every M.
"""

from __future__ import annotations

import argparse
import bisect
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from lead_kernels import pack_plan
from lead_kernels.pack_plan import LOOK_AHEAD, packing_waste

CAPACITIES, STEP_BINS, ROUND_BINS = (2048, 4096, 16384), (1, 2, 8, 64), (4, 32)
SAMPLES = 50_000
Bins = list[list[int]]


def next_fit(lengths: list[int], capacity: int, slots: int, bins: int) -> Bins:
    out: Bins = [[]]
    free = capacity
    for i, length in enumerate(lengths):
        if length > free or len(out[-1]) == slots:
            out.append([])
            free = capacity
        out[-1].append(i)
        free -= length
    return out


class OpenBins:
    """A step's bins; `place` puts a sample where it leaves the least, False where it fits nowhere."""

    def __init__(self, count: int, capacity: int, slots: int) -> None:
        self.filled: Bins = [[] for _ in range(count)]
        self.slots = slots
        self.free = [(capacity, b) for b in range(count)]  # ascending

    def place(self, sample: int, length: int) -> bool:
        at = bisect.bisect_left(self.free, (length, -1))
        if at == len(self.free):
            return False
        left, b = self.free.pop(at)
        self.filled[b].append(sample)
        if len(self.filled[b]) < self.slots:
            bisect.insort(self.free, (left - length, b))
        return True


def best_fit(lengths: list[int], capacity: int, slots: int, bins: int, ahead: int = 1) -> Bins:
    out: Bins = []
    passed_over: list[int] = []
    start = 0
    while passed_over or start < len(lengths):
        step, missed, old = OpenBins(bins, capacity, slots), [], iter(passed_over)
        while len(missed) < ahead:
            sample = next(old, None)
            if sample is None:
                if start == len(lengths):
                    break
                sample, start = start, start + 1
            if not step.place(sample, lengths[sample]):
                missed.append(sample)
        passed_over = [*missed, *old]
        out += step.filled
    return out


def best_fit_ahead(lengths: list[int], capacity: int, slots: int, bins: int) -> Bins:
    return best_fit(lengths, capacity, slots, bins, ahead=64)


def best_fit_decreasing(lengths: list[int], capacity: int, slots: int, bins: int) -> Bins:
    total, out, start = np.concatenate([[0], np.cumsum(lengths)]), [], 0
    while start < len(lengths):
        end = int(np.searchsorted(total, total[start] + bins * capacity, side="right")) - 1
        end = min(end, start + bins * slots)
        while True:
            step = OpenBins(bins, capacity, slots)
            if all(step.place(i, lengths[i]) for i in sorted(range(start, end), key=lambda i: -lengths[i])):
                break
            end -= 1
        out += step.filled
        start = end
    return out


def ours(lengths: list[int], capacity: int, slots: int, bins: int) -> Bins:
    size, order = torch.tensor(lengths), torch.arange(len(lengths))
    out: Bins = []
    while len(order):  # in rounds of 64 bins, each of which sees no more than it could fill, as in training
        plan = pack_plan(order[: 64 * slots], size, num_bins=64, capacity=capacity, slots=slots)
        out += [[i for i in row if i < len(lengths)] for row in plan.sample_ids.tolist()]
        left = torch.ones(len(lengths) + 1, dtype=torch.bool)
        left[plan.sample_ids] = False
        order = order[left[order]]
    return [samples for samples in out if samples]


RULES: dict[str, Callable[[list[int], int, int, int], Bins]] = {
    "next fit": next_fit,
    "best fit": best_fit,
    "best fit, 64 ahead": best_fit_ahead,
    "best fit decreasing": best_fit_decreasing,
    "pack_plan": ours,
}


def waste(packed: Bins, lengths: list[int], capacity: int, slots: int, bins: int) -> float | None:
    """None without a whole step before the last. Raises if the rule loses a sample, repeats one or overfills a bin."""
    tokens = [sum(lengths[i] for i in samples) for samples in packed]
    if sorted(i for samples in packed for i in samples) != list(range(len(lengths))):
        raise RuntimeError("a sample was lost or is there twice")
    if max(tokens) > capacity or max(map(len, packed)) > slots:
        raise RuntimeError("a bin is overfull")
    whole = (len(packed) - 1) // bins * bins
    return round(float(packing_waste(torch.tensor(tokens[:whole]).view(-1, bins), capacity)), 5) if whole else None


def strays(lengths: list[int], capacity: int, slots: int, bins: int) -> dict[str, float]:
    """(share of tokens that a strict order would have left for a later round, how far ahead the furthest of them lies).

    Of rounds of `bins` bins, each over an order of its own.
    """
    size, k = torch.tensor(lengths), bins * slots
    tokens = out_of_turn = furthest = 0
    for start in range(0, len(lengths) - k + 1, k):
        ids = pack_plan(torch.arange(start, start + k), size, num_bins=bins, capacity=capacity, slots=slots).sample_ids
        places = ids[ids < len(lengths)] - start
        late = places >= len(places)  # in order, the round would be the first len(places)
        tokens += int(size[places + start].sum())
        out_of_turn += int(size[places[late] + start].sum())
        furthest = max(furthest, int(places.max()) - len(places) + 1)
    return {"share_of_tokens": round(out_of_turn / max(tokens, 1), 5), "most_places_ahead": furthest}


def lognormal(median: float, longest: int, seed: int) -> list[int]:
    """Standard deviation 1 in the logarithm, as of instruction samples; 8 to `longest` tokens."""
    draws = np.exp(np.random.default_rng(seed).normal(0, 1, SAMPLES)) * median
    return np.clip(np.rint(draws), 8, longest).astype(int).tolist()


def pools(prepared: Path | None) -> Iterable[tuple[str, list[int]]]:
    if prepared is not None:
        lengths = np.diff(np.load(prepared / "store" / "offsets.npy"))
        yield "prepared pool", np.random.default_rng(0).permutation(lengths).tolist()
    yield "log-normal, up to 512", lognormal(85, 512, 1)
    yield "log-normal, up to 2048", lognormal(245, 2048, 2)


def measure(
    lengths: list[int], capacities: Sequence[int] = CAPACITIES, step_bins: Sequence[int] = STEP_BINS
) -> list[dict]:
    """Rows {capacity, rule, waste: {bins of a step: share}}."""
    rows = []
    for capacity in capacities:
        slots = capacity // 32
        for name, rule in RULES.items():
            shares = {
                bins: waste(rule(lengths, capacity, slots, bins), lengths, capacity, slots, bins) for bins in step_bins
            }
            rows.append({"capacity": capacity, "rule": name, "waste": shares})
    return rows


def show(rows: list[dict]) -> None:
    print(f"{'capacity':>9} {'rule':<20}" + "".join(f"{f'M = {bins}':>9}" for bins in rows[0]["waste"]))
    for row in rows:
        cells = "".join(f"{'-' if share is None else f'{100 * share:.2f} %':>9}" for share in row["waste"].values())
        print(f"{row['capacity']:>9} {row['rule']:<20}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=Path, help="a prepared pool, whose lengths are measured too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "packing.json")
    chosen = parser.parse_args()
    result: dict = {"bench": "packing", "look_ahead": LOOK_AHEAD, "pools": []}
    for name, lengths in pools(chosen.pool):
        print(f"\n{name}: {len(lengths):,} samples, {np.mean(lengths):.0f} tokens on average, at most {max(lengths)}")
        rows = measure(lengths)
        show(rows)
        order = [
            {"capacity": c, "bins_of_a_round": b, **strays(lengths, c, c // 32, b)}
            for c in CAPACITIES
            for b in ROUND_BINS
        ]
        worst = max(order, key=lambda row: row["share_of_tokens"])
        share, layout = 100 * worst["share_of_tokens"], f"{worst['bins_of_a_round']} bins of {worst['capacity']}"
        print(f"taken out of turn by pack_plan: at most {share:.2f} % of a round's tokens ({layout})")
        described = {"samples": len(lengths), "mean": round(float(np.mean(lengths)), 2), "longest": max(lengths)}
        result["pools"].append({"name": name, **described, "waste": rows, "out_of_turn": order})
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
