"""What methods of selection share, and recipes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from lead_engine.config.bounds import Bounds
from lead_engine.config.checks import require
from lead_engine.config.options import Options

LossChange = Literal["inner", "paper", "none"]
Bandit = Literal["exp3", "exp3s", "uniform", "none"]
Recipe = Literal["default", "paper"]


@dataclass(frozen=True)
class SelectionConfig(Options):
    """LEAD's options (arXiv 2505.07437), which `rescore` shares; other methods read `round_steps` and the options named after them."""

    flags: ClassVar[str] = "--selection."

    loss_change: LossChange = "inner"
    """How a step's effect on its own samples is estimated: gradient inner product at the last hidden state, the paper's, or not at all."""
    inner_form: Literal["sketch", "exact"] = "sketch"
    """The inner product through random projections (q x q numbers a sample), or exact (keeps [T, H] twice)."""
    sketch_dim: Annotated[int, Bounds(ge=1, le=2**12)] = 64
    """q, the width of the random projections."""
    calibrate_every: Annotated[int, Bounds(ge=1)] = 8
    """Optimizer steps between two measurements of the step's true first-order loss change."""
    smoothing: Annotated[float, Bounds(ge=0, lt=1)] = 0.1
    """b of U <- (1 - b) (loss + change) + b U."""
    bandit: Bandit = "exp3"
    """Who draws the round's cluster; `none` treats the pool as one cluster."""
    gamma: Annotated[float, Bounds(gt=0, le=1)] = 0.1
    """Exploration share of EXP3."""
    exp3s_alpha: Annotated[float, Bounds(ge=0, lt=1)] = 0.01
    """Share of weight that EXP3.S spreads over all clusters each round."""
    draw: Literal["cluster", "mixture"] = "mixture"
    """What a round trains: the one cluster that the bandit draws, or all of them in the proportions of its probabilities."""
    prior: Literal["uniform", "size"] = "size"
    """What the bandit starts from and explores: every cluster alike, or in proportion to its samples."""
    ranking: Literal["hard", "soft", "random"] = "soft"
    """Inside a cluster and task: the best first, a draw with probability ~ rank value ** soft_power, or any."""
    soft_power: Annotated[float, Bounds(gt=0, le=100)] = 2.0
    """Power of the rank value in `--selection.ranking soft`."""
    rank_by: Literal["utility", "density", "answers"] = "density"
    """The rank value: U; U x answer tokens / tokens, what a sample teaches for every token of budget it costs; or that share alone."""
    unseen: Literal["initial", "drift", "estimate"] = "initial"
    """U of samples not trained yet: what `prepare` measured; moved by how far cluster and task have come since; or an estimate alone."""
    optimism: Annotated[float, Bounds(ge=0)] = 1.0
    """With `--selection.unseen estimate`: standard deviations by which a cluster and task nobody has tried stands above its estimate."""
    drop_misaligned: bool = False
    """Never train samples whose answer the instruction does not make likelier."""
    use_tasks: bool = True
    """Give every task a quota, in proportion to its eligible samples to the power of `task_power`."""
    task_power: Annotated[float, Bounds(ge=0, le=1)] = 0.5
    """1: tasks in proportion to their samples; 0: all tasks alike; between: small ones more often than their share."""
    max_visits: Annotated[int, Bounds(ge=1)] = 4
    """How often one sample may be trained."""
    round_steps: Annotated[int, Bounds(ge=1, le=2**16)] = 4
    """S, optimizer steps trained on one bandit decision."""
    epochs: Annotated[int, Bounds(ge=1)] = 3
    """Of `iterit`: how often it scores and chooses anew; each time for an equal share of the budget."""
    candidates: Annotated[float, Bounds(ge=1)] = 3.0
    """Of `iterit`: after the first epoch only the best are scored, this many times the samples that an epoch trains."""
    decay: Annotated[float, Bounds(ge=0, lt=1)] = 0.1
    """Of `iterit`: what is left of an n-gram's weight once a chosen answer has used it."""
    match: Path | None = None
    """Of `random-matched`: folder of the finished run whose picks it imitates in length and task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.draw == "cluster" or self.loss_change != "paper",
            "--selection.loss-change",
            self.loss_change,
            "inner or none with --selection.draw mixture (the paper's change is that of one cluster)",
        )


RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "selection": {
            "loss_change": "paper",
            "smoothing": 0.1,
            "bandit": "exp3",
            "gamma": 0.1,
            "draw": "cluster",
            "prior": "uniform",
            "ranking": "hard",
            "rank_by": "utility",
            "unseen": "initial",
            "drop_misaligned": True,
            "use_tasks": True,
            "task_power": 1.0,
            "max_visits": 4,
        }
    },
}
"""Named sets of options, under what a file and flags say: `paper` is the setting of arXiv 2505.07437, `default` the best measured here."""


def recipe_value(recipe: str, option: str, default: Any) -> Any:
    """The value of an option, with dots, that nobody gives under the recipe."""
    group, _, name = option.rpartition(".")
    return RECIPES[recipe].get(group, {}).get(name, default)
