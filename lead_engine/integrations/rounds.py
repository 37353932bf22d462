"""Rounds under somebody else's loop: what is planned, which step is next, what its losses taught, and how that is kept in a checkpoint.

The trainer's loop asks for a step's micro-batches, trains them, and reports; this side plans a round when the one before it is over and
not earlier. Every rank holds the same state and reaches the same plan.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from lead_engine.base.errors import UserError
from lead_engine.base.files import write_bytes, write_text
from lead_engine.selection.loss_change import LossChange
from lead_engine.selection.observe import observe_step
from lead_engine.selection.plan import Plan
from lead_engine.selection.replicas import check_replicas, sum_over_ranks
from lead_engine.selection.selector import Selector

FILE = "lead_selection.safetensors"
"""In every checkpoint folder: the selection's state."""
LOG = "selection.jsonl"
"""In the trainer's output folder: a line a round."""
UNBOUNDED = 1 << 60


class Rounds:
    """The selection's side of a run. `ahead()` plans; `step`, `ids` and `rows` say what is next; `observe` and `end_step` close a step.

    budget: tokens to train, or None. identity: what a checkpoint must agree in, as JSON types. log: file for a line a round, or None.
    """

    def __init__(
        self,
        selector: Selector,
        change: LossChange,
        *,
        budget: int | None,
        identity: dict[str, Any],
        rank: int = 0,
        world: int = 1,
        log: Path | None = None,
    ) -> None:
        self.selector, self.change, self.budget, self.identity = selector, change, budget, identity
        self.rank, self.world, self.log = rank, world, log
        self.accumulation = selector.layout.micro_batches // world
        self.round, self.step, self.steps_done, self.tokens = 0, 0, 0, 0
        self.plan: Plan | None = None
        self.last: dict[str, float] = {}
        """Of the last round, for the trainer's log."""

    def ahead(self) -> bool:
        """Plan the round, unless it is planned; False if nothing is left to train: the budget is spent, or nobody is eligible."""
        if self.plan is None:
            self._adopt(self.selector.plan(self.round, UNBOUNDED if self.budget is None else self.budget - self.tokens))
        return self.step < self._steps

    def ids(self, place: int) -> list[int]:
        """Samples of this rank's micro-batch `place` of the step that is next."""
        return [
            i
            for i in self._ids[self.step][self.rank * self.accumulation + place]
            if i < self.selector.samples.num_samples
        ]

    @property
    def rows(self) -> int:
        """Tokens to learn in the whole step that is next, on all ranks: the one denominator."""
        return sum(self._rows[self.step])

    @property
    def cluster(self) -> Tensor:
        assert self.plan is not None
        return self.plan.cluster

    def observe(self, losses: Sequence[Tensor], lr: float, first_order: Tensor | None, norm: Tensor) -> None:
        """The step that is next was trained: losses fp32 [B] of this rank's micro-batches, in order; the rest as LossChange.estimate."""
        assert self.plan is not None
        change = self.change.estimate(self.cluster, lr, self.sum_over_ranks, first_order, norm)
        observe_step(self.selector, self.plan.sample_ids[self.step], losses, change, world=self.world)

    def end_step(self) -> None:
        """Close the step; after a round's last, let the method learn from it."""
        self.tokens += sum(self._tokens[self.step])
        self.step += 1
        self.steps_done += 1
        if self.step == self._steps:
            self.finish_round()

    def finish_round(self) -> None:
        """Close the round, also before its last step; nothing where none is open."""
        if self.plan is None or self.step == 0:
            return
        plan = self.plan
        stats = self.selector.learn(plan)
        self.change.finish_round(plan.cluster)
        cluster = int(plan.cluster)
        self.last = {"lead_round": self.round, "lead_reward": float(stats.reward)}
        if self.log is not None:
            trained = [
                [i for micro in step for i in micro if i < self.selector.samples.num_samples]
                for step in self._ids[: self.step]
            ]
            line = {
                "round": self.round,
                "step": self.steps_done - self.step,
                "method": self.identity.get("method"),
                "cluster": None if cluster < 0 else cluster,
                "probabilities": plan.probabilities.tolist(),
                "reward": float(stats.reward),
                "tokens": sum(sum(step) for step in self._tokens[: self.step]),
                "samples": int(stats.samples),
                "utility_before": float(stats.utility_before),
                "utility_after": float(stats.utility_after),
                "ids": trained,
            }
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.plan, self.step, self.round = None, 0, self.round + 1

    # --- checkpoints ---

    def save(self, folder: Path) -> None:
        """Write the selection's state into a checkpoint folder; a collective over all ranks, the file by rank 0. Between any two steps."""
        check_replicas(self.selector, self.world, self.steps_done)
        if self.rank:
            return
        tensors = {f"selector.{name}": value for name, value in self.selector.state_dict().items()}
        tensors |= {f"change.{name}": value for name, value in self.change.state_dict().items()}
        if self.plan is not None:
            tensors |= {f"plan.{name}": value for name, value in self.plan._asdict().items()}
        counters = {name: getattr(self, name) for name in ("round", "step", "steps_done", "tokens", "last")}
        folder.mkdir(parents=True, exist_ok=True)
        data = save(
            {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
            {"lead": json.dumps({"counters": counters, "identity": self.identity})},
        )
        write_bytes(folder / FILE, data)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint folder. UserError if it has no selection's state, or that of another run."""
        path = folder / FILE
        try:
            with safetensors.safe_open(path, "pt") as file:
                header = json.loads(file.metadata()["lead"])
            tensors = load_file(path)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}); resume from an older checkpoint") from None
        for name, now in self.identity.items():
            before = header["identity"].get(name)
            if before != now:
                raise UserError(
                    f"resume_from_checkpoint {folder}: the run began with {name} = {before}, now it is {now}; use the same"
                )
        parts: dict[str, dict[str, Tensor]] = {"selector": {}, "change": {}, "plan": {}}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = value
        self.selector.load_state_dict(parts["selector"])
        self.change.load_state_dict(parts["change"])
        for name, value in header["counters"].items():
            setattr(self, name, value)
        self.plan = None
        if parts["plan"]:
            self._adopt(Plan(**{name: value.to(self.selector.samples.device) for name, value in parts["plan"].items()}))
        self._cut_log()

    def begin(self) -> None:
        """Start anew: an older run's log is no part of it."""
        self._cut_log()

    def _cut_log(self) -> None:
        """Drop the log's lines from this round on (of a run that was killed, or an older one)."""
        if self.log is None:
            return
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["round"] < self.round]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.log, "".join(line + "\n" for line in kept))

    # --- ranks ---

    def _adopt(self, plan: Plan) -> None:
        """Read a plan to the host, where the user's rows are: the round's one wait for the device."""
        self.plan = plan
        self._ids, self._tokens, self._rows = plan.sample_ids.tolist(), plan.tokens.tolist(), plan.rows.tolist()
        self._steps = sum(any(step) for step in self._tokens)  # empty steps are the last ones

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """A collective; sums into `value` itself."""
        return sum_over_ranks(value, self.world)


def checkpoint_folder(given: Any, output_dir: str | Path) -> Path | None:
    """The folder that train(resume_from_checkpoint=given) means; None for a run that starts anew.

    UserError unless it is a checkpoint of a run with LEAD.
    """
    if given is None or given is False:
        return None
    if given is True:
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if last is None:
            where = f"no checkpoint-* folder in {output_dir}"
            raise UserError(f"resume_from_checkpoint=True: {where}; leave it out to start anew")
        given = last
    if not isinstance(given, (str, Path)):
        way_out = f"give a checkpoint's folder, or True for the last one in {output_dir}"
        raise UserError(f"resume_from_checkpoint={given!r}: {way_out}")
    folder = Path(given)
    if not (folder / "trainer_state.json").is_file():
        what = "no trainer_state.json in it, so it is no checkpoint" if folder.is_dir() else "no such folder"
        way_out = "give an OUTPUT_DIR/checkpoint-N, or True for the last one"
        raise UserError(f"resume_from_checkpoint {folder}: {what}; {way_out}")
    if not (folder / FILE).is_file():
        raise UserError(
            f"resume_from_checkpoint {folder}: no {FILE} in it, so it was not written by a run with lead(), and "
            f"nothing says what that run had selected. Load the model from {folder} and train without "
            "resume_from_checkpoint, or go on by the trainer without lead()"
        )
    return folder
