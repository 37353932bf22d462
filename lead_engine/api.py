"""What `import lead_engine` offers: the commands as functions, and a training run that the caller drives."""

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
    """`lead-engine prepare`: make the prepared pool `config.out` from records.

    The folder holds tokens, difficulty, initial utility, clusters and tasks. An interrupted call is resumed, a finished
    one not repeated. Under torchrun all ranks call it. Raises UserError for records, models and options that cannot be
    used, and if an earlier call had other options, sources or another model (by their contents).
    """
    from lead_engine.prepare import run

    run(as_config(PrepareConfig, config, "prepare_pool(config)"))


def train(config: TrainConfig) -> None:
    """`lead-engine train`: tune a model on a prepared pool, into the run folder `config.out`.

    The folder's `model/` is in Hugging Face format. Under torchrun all ranks call it. Raises UserError for whatever the
    caller can correct, such as a run folder that exists already (`resume=True` resumes it).
    """
    from lead_engine.training.train import run

    run(as_config(TrainConfig, config, "train(config)"))


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """`lead-engine eval` without its output: held-out loss in nats per response token, and exact match if asked for.

    Returns {"loss": {"overall": float, "macro": float, "tasks": {name: {"loss", "samples", "tokens"}}},
    "exact_match": None or shares, "problems": counts by kind, "options": those that decide the result}, and writes it
    to `config.out` or, for a run folder, to RUN/eval. Raises UserError for models and files that cannot be read.
    """
    from lead_engine.evaluation.evaluate import evaluate as measure

    return measure(as_config(EvalConfig, config, "evaluate(config)"))


class RoundReport(NamedTuple):
    """What a round did. Sample ids number the pool's samples from 0 to N - 1."""

    round: int
    cluster: int | None
    """The difficulty cluster drawn; None if the round's samples come from all of them (the default)."""
    sample_ids: list[list[int]]
    """The samples that each optimizer step trained on."""
    losses: list[float]
    """Each step's mean loss over its response tokens, in nats, before the step; a step was skipped if not finite."""
    tokens: int
    """Trained on in this round: prompts, answers and template."""
    reward: float
    """The bandit's reward, in [-1, 1]."""


class Session:
    """A training run that the caller drives, without a run folder: only `save` writes files.

        with Session(config) as session:
            for report in session.rounds():
                ...                          # look, session.evaluate("heldout.jsonl"), stop early
            session.save(Path("MODEL"))

    Not used are `config.out`, `resume`, `checkpoint_every`, `eval_data` with its options, and the loggers. Under
    torchrun all ranks do the same. Inside the block, torch's process group is this session's.
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
            self._stack = stack.pop_all()  # only now, so that a build that fails leaves the process group at once
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
        """Plans the rounds; `selector.samples` holds every sample's utility and visits."""
        return self._built.trainer.selector

    @property
    def store(self) -> TokenStore:
        """The pool's tokens."""
        return self._built.trainer.store

    @property
    def state(self) -> PoolState:
        """The scores, clusters and tasks that `prepare_pool` computed."""
        return self._built.state

    @property
    def budget(self) -> int:
        """Tokens to train on."""
        return self._built.trainer.budget

    def rounds(self) -> Iterator[RoundReport]:
        """Train round by round, until the budget is spent or no sample is left. A second call continues the first.

        Reading a round's report waits until the device has finished the round's last step.
        """
        for finished in self._built.trainer.rounds(self._progress):
            self._progress = finished.after
            yield _report(finished)

    def evaluate(self, data: str | Path | Sequence[str | Path], *, skip_bad: bool = False) -> dict[str, Any]:
        """Held-out loss of the model as it is, in nats per response token. Training goes on as it would have without.

        data: files in any form that `prepare` reads. Every rank tokenises them at the first call; later calls with the
        same names use these tokens. Records are cut where the pool's were. skip_bad: leave out records that cannot be
        used. Returns {"overall": float, "macro": float, "tasks": {name: {"loss", "samples", "tokens"}}}, the same on
        all ranks. Raises UserError for records that cannot be used.
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
        """Write the model as it is, in Hugging Face format or as a peft adapter; all ranks call it.

        The folder appears when it is complete. Raises UserError for an argument that is no path.
        """
        target: Path = argument(Path, folder, "Session.save(folder)")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._built.save_model(target, self._ranks.rank)

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
        round=finished.before.round,
        cluster=None if cluster < 0 else cluster,
        sample_ids=[step_ids[step_ids < finished.dummy].tolist() for step_ids in ids],  # without empty slots
        losses=[float(step.loss) for step in values.steps],
        tokens=finished.after.tokens - finished.before.tokens,
        reward=float(values.stats.reward),
    )
