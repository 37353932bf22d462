"""The functions and the session that `import lead_engine` offers: the command line's parts, to be called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lead_engine.base.errors import UserError
from lead_engine.config import EvalConfig, PrepareConfig, TrainConfig
from lead_engine.config.options import argument, as_config

if TYPE_CHECKING:
    from lead_engine.model.packed import PackedLM
    from lead_engine.pool.heldout import HeldOutData
    from lead_engine.pool.state import PoolState
    from lead_engine.pool.store import TokenStore
    from lead_engine.selection.selector import Selector
    from lead_engine.training.build import TrainingSetup
    from lead_engine.training.rounds import Round


def prepare_pool(config: PrepareConfig) -> None:
    """`lead-engine prepare`: records to the folder `config.out` of tokens, difficulty, initial utility, clusters and tasks.

    Goes on where an earlier call was ended; does nothing where it was finished. Under torchrun all ranks call it.
    UserError for records, models and options that cannot be used, and where an earlier call had other options, sources
    or model (by their contents).
    """
    from lead_engine.prepare import run

    run(as_config(PrepareConfig, config, "prepare_pool(config)"))


def train(config: TrainConfig) -> None:
    """`lead-engine train`: a prepared pool and a model to the run folder `config.out`, whose `model/` is in Hugging Face format.

    Under torchrun all ranks call it. UserError for whatever the caller can mend, among it a run folder that exists (`resume=True` goes
    on with it).
    """
    from lead_engine.training.train import run

    run(as_config(TrainConfig, config, "train(config)"))


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """`lead-engine eval`, without its printing: held-out loss in nats per response token, and exact match if asked for.

    Returns {"loss": {"overall": float, "macro": float, "tasks": {name: {"loss", "samples", "tokens"}}}, "exact_match": None or shares,
    "problems": counts by kind, "options": those that decide the result}; writes it to `config.out`, or to RUN/eval for a run folder.
    """
    from lead_engine.evaluation.evaluate import evaluate as measure

    return measure(as_config(EvalConfig, config, "evaluate(config)"))


class RoundReport(NamedTuple):
    """What a round did. Sample ids are places in the pool: 0 to N - 1."""

    round: int
    cluster: int | None
    """The difficulty cluster drawn; None where a round is drawn from all of them (the default)."""
    sample_ids: list[list[int]]
    """Those trained, of every optimizer step."""
    losses: list[float]
    """Mean loss of every step over its response tokens, in nats, before the step. Where it is not finite, the step was skipped."""
    tokens: int
    """Trained in this round: prompts, answers and template."""
    reward: float
    """What the bandit learned from it, in [-1, 1]."""


class Session:
    """A training run that the caller drives, without a run folder: nothing is written but what `save` writes.

        with Session(config) as session:
            for report in session.rounds():
                ...                          # look, session.evaluate("heldout.jsonl"), stop early
            session.save(Path("MODEL"))

    `config.out`, `resume`, `checkpoint_every`, `eval_data` with what goes with it, and the loggers are not used. Under
    torchrun all ranks do the same. While the block lasts, torch's process group is this session's.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = as_config(TrainConfig, config, "Session(config)")
        self._setup: TrainingSetup | None = None

    def __enter__(self) -> Session:
        from lead_engine.training.build import build
        from lead_engine.training.distributed import process_group
        from lead_engine.training.rounds import Progress

        with ExitStack() as stack:
            self._ranks = stack.enter_context(process_group(self.config.runtime.timeout))
            self._setup = build(self.config, self._ranks)
            self._progress = Progress()
            self._heldout: dict[tuple[tuple[str, ...], bool], HeldOutData] = {}
            self._stack = stack.pop_all()  # only now: a build that fails leaves the group at once
        return self

    def __exit__(self, *error: Any) -> None:
        self._setup = None
        self._stack.__exit__(*error)

    @property
    def model(self) -> PackedLM:
        """The model in training: an nn.Module, sharded under torchrun."""
        return self._built.trainer.model

    @property
    def selector(self) -> Selector:
        """Plans rounds; `selector.samples` has every sample's utility and visits."""
        return self._built.trainer.selector

    @property
    def store(self) -> TokenStore:
        """The pool's tokens."""
        return self._built.trainer.store

    @property
    def state(self) -> PoolState:
        """What `prepare_pool` found out about the pool."""
        return self._built.state

    @property
    def budget(self) -> int:
        """Tokens to train."""
        return self._built.trainer.budget

    def rounds(self) -> Iterator[RoundReport]:
        """Train, a round at a time, until the budget is spent or no sample is left; called again, go on where it was left.

        A report is read from the device, which waits for its round's last step.
        """
        for finished in self._built.trainer.rounds(self._progress):
            self._progress = finished.after
            yield _report(finished)

    def evaluate(self, data: str | Path | Sequence[str | Path], *, skip_bad: bool = False) -> dict[str, Any]:
        """Held-out loss of the model as it is, in nats per response token. What is trained afterwards does not change.

        data: files in any form that `prepare` reads. They are tokenised at the first call, by every rank; later calls
        with the same names use these tokens. Records are cut where the pool's were. Returns {"overall": float,
        "macro": float, "tasks": {name: {"loss", "samples", "tokens"}}}, alike on all ranks. UserError for records that
        cannot be used; `skip_bad` leaves those out.
        """
        from lead_engine.training.heldout import loss_of
        from lead_engine.training.heldout_data import open_temporary

        setup, ranks = self._built, self._ranks
        names = tuple(map(str, [data] if isinstance(data, (str, Path)) else data))
        if (names, skip_bad) not in self._heldout:
            opened = open_temporary(self.config, names, setup.tokenizer, ranks, skip_bad=skip_bad)
            self._heldout[names, skip_bad] = self._stack.enter_context(opened)
        return loss_of(self._heldout[names, skip_bad], setup, ranks)

    def save(self, folder: str | Path) -> None:
        """Write the model as it is: Hugging Face format, or a peft adapter. On all ranks; the folder appears whole."""
        folder = argument(Path, folder, "Session.save(folder)")
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._built.save_model(folder, self._ranks.rank)

    @property
    def _built(self) -> TrainingSetup:
        if self._setup is None:
            raise UserError("Session: not open; use it in a `with Session(config) as session:` block")
        return self._setup


def _report(finished: Round) -> RoundReport:
    values = finished.values.read()
    ids = [values.plan.sample_ids[step].flatten() for step in finished.header.steps]
    cluster = int(values.plan.cluster)
    return RoundReport(
        finished.before.round,
        None if cluster < 0 else cluster,
        [step_ids[step_ids < finished.dummy].tolist() for step_ids in ids],
        [float(step.loss) for step in values.steps],
        finished.after.tokens - finished.before.tokens,
        float(values.stats.reward),
    )
