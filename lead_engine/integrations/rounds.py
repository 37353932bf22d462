"""Rounds under a trainer's loop: plan, next step, what its losses taught, and the state that a checkpoint keeps.

The trainer's loop asks for a step's micro-batches, trains them and reports. This side plans a round when the one before
it is over, not earlier. Every rank holds the same state and computes the same plan.
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
from lead_engine.config.old_names import under_new_names
from lead_engine.selection.loss_change import LossChange
from lead_engine.selection.observe import observe_step
from lead_engine.selection.plan import Plan, RoundStats
from lead_engine.selection.replicas import check_replicas, sum_over_ranks
from lead_engine.selection.selector import Selector

FILE = "lead_selection.safetensors"
"""The selection's state, in every checkpoint folder."""
LOG = "selection.jsonl"
"""In the trainer's output folder, a line a round."""
UNBOUNDED = 1 << 60
"""The budget in tokens of a run without one."""


class Rounds:
    """The selection's side of a run.

    `ahead` plans; `ids` and `response_tokens` describe the next step; `observe` and `end_step` close it.

    budget: tokens to train, or None. identity: the facts in which a checkpoint must agree with the run, as JSON types.
    log: the file for a line a round, or None.
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
        """Number and reward of the last round, for the trainer's log."""
        # The plan on the host, [S][M][B] sample ids and [S][M] counts, and how many of its steps hold tokens.
        self._ids: list[list[list[int]]] = []
        self._tokens: list[list[int]] = []
        self._response_tokens: list[list[int]] = []
        self._steps = 0

    def ahead(self) -> bool:
        """Plan the round unless it is planned. False if nothing is left: the budget is spent or no sample eligible."""
        if self.plan is None:
            budget = UNBOUNDED if self.budget is None else self.budget - self.tokens
            self._adopt(self.selector.plan(self.round, budget))
        return self.step < self._steps

    def ids(self, micro_batch: int) -> list[int]:
        """The samples of this rank's micro-batch in the next step."""
        return self._without_dummies(self._ids[self.step][self.rank * self.accumulation + micro_batch])

    def _without_dummies(self, ids: list[int]) -> list[int]:
        """Empty slots hold the sample id N."""
        return [i for i in ids if i < self.selector.samples.num_samples]

    @property
    def response_tokens(self) -> int:
        """Tokens to learn in the whole next step, on all ranks: the denominator of its loss."""
        return sum(self._response_tokens[self.step])

    def observe(self, losses: Sequence[Tensor], lr: float, first_order: Tensor | None, norm: Tensor) -> None:
        """Update utilities and visits: the next step has been trained.

        losses: fp32 [B] of each of this rank's micro-batches, in order. The rest is as in `LossChange.estimate`.
        """
        assert self.plan is not None
        change = self.change.estimate(self.plan.cluster, lr, self.sum_over_ranks, first_order, norm)
        observe_step(self.selector, self.plan.sample_ids[self.step], losses, change, world=self.world)

    def end_step(self) -> None:
        """Close the step; after a round's last step, close the round."""
        self.tokens += sum(self._tokens[self.step])
        self.step += 1
        self.steps_done += 1
        if self.step == self._steps:
            self.finish_round()

    def finish_round(self) -> None:
        """Let the method learn from the round's steps so far; without any, do nothing."""
        if self.plan is None or self.step == 0:
            return
        plan = self.plan
        stats = self.selector.learn(plan)
        self.change.finish_round(plan.cluster)
        self.last = {"lead_round": self.round, "lead_reward": float(stats.reward)}
        if self.log is not None:
            self._log_round(self.log, plan, stats)
        self.plan, self.step, self.round = None, 0, self.round + 1

    def _log_round(self, log: Path, plan: Plan, stats: RoundStats) -> None:
        cluster = int(plan.cluster)
        steps = self._ids[: self.step]
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
            "ids": [self._without_dummies([i for micro_batch in step for i in micro_batch]) for step in steps],
        }
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # --- checkpoints ---

    def save(self, folder: Path) -> None:
        """Write the selection's state into a checkpoint folder, between any two steps.

        All ranks must call it, because their states are compared first; rank 0 writes the file.
        """
        check_replicas(self.selector, self.world, self.steps_done)
        if self.rank:
            return
        tensors = {f"selector.{name}": value for name, value in self.selector.state_dict().items()}
        tensors |= {f"change.{name}": value for name, value in self.change.state_dict().items()}
        if self.plan is not None:
            tensors |= {f"plan.{name}": value for name, value in self.plan._asdict().items()}
        counters = {name: getattr(self, name) for name in ("round", "step", "steps_done", "tokens", "last")}
        header = {"lead": json.dumps({"counters": counters, "identity": self.identity})}
        # Clones, because safetensors refuses tensors that share memory.
        copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / FILE, save(copies, header))

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint folder. Raises UserError if its file is damaged or another run's."""
        path = folder / FILE
        try:
            with safetensors.safe_open(path, "pt") as file:
                header = json.loads(file.metadata()["lead"])
            tensors = load_file(path)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}); resume from an older checkpoint") from None
        identity = _under_new_names(header["identity"])
        for name, now in self.identity.items():
            before = identity.get(name)
            if before != now:
                raise UserError(
                    f"resume_from_checkpoint {folder}: the run began with {name} = {before}, now it is {now}; use the "
                    "same"
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
        if parts["plan"]:  # the checkpoint was written in the middle of a round
            device = self.selector.samples.device
            self._adopt(Plan(**{name: value.to(device) for name, value in parts["plan"].items()}))
        self._cut_log()

    def begin(self) -> None:
        """Start a new run: the log of an older one in the same folder goes."""
        self._cut_log()

    def _cut_log(self) -> None:
        """Drop the log's lines from this round on: a killed run has written more than its checkpoint knows."""
        if self.log is None:
            return
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["round"] < self.round]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.log, "".join(line + "\n" for line in kept))

    # --- ranks ---

    def _adopt(self, plan: Plan) -> None:
        """Read a plan to the host, where the user's rows are. Waits for the device, once a round."""
        self.plan = plan
        self._ids = plan.sample_ids.tolist()
        self._tokens = plan.tokens.tolist()
        self._response_tokens = plan.rows.tolist()
        self._steps = sum(any(step) for step in self._tokens)  # a plan's empty steps are its last ones

    def sum_over_ranks(self, value: Tensor) -> None:
        """Sum `value` in place; all ranks must call it."""
        sum_over_ranks(value, self.world)


def _under_new_names(identity: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's identity; the options of an older version as today's would have written them."""
    method, options = identity.get("method", ""), identity.get("options", {})
    if "round_steps" not in options:
        return identity
    values = under_new_names({"method": method, "selection": options})
    del values["selection"]["round_steps"]  # the layout has it
    return {**identity, "options": {**values.get(method, {}), **values["selection"]}}


def checkpoint_folder(given: Any, output_dir: str | Path) -> Path | None:
    """The folder that train(resume_from_checkpoint=given) means; None for a new run.

    Raises UserError unless it is a checkpoint of a run with LEAD.
    """
    if given is None or given is False:
        return None
    if given is True:
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None  # type: ignore[no-untyped-call]
        if last is None:
            where = f"no checkpoint-* folder in {output_dir}"
            raise UserError(f"resume_from_checkpoint=True: {where}; leave it out to start anew")
        given = last
    if not isinstance(given, (str, Path)):
        way_out = f"give a checkpoint's folder, or True for the last one in {output_dir}"
        raise UserError(f"resume_from_checkpoint={given!r}: {way_out}")
    folder = Path(given)
    if not (folder / "trainer_state.json").is_file():
        what = "no such folder"
        if folder.is_dir():
            what = "no trainer_state.json in it, so it is no checkpoint"
        way_out = "give an OUTPUT_DIR/checkpoint-N, or True for the last one"
        raise UserError(f"resume_from_checkpoint {folder}: {what}; {way_out}")
    if not (folder / FILE).is_file():
        raise UserError(
            f"resume_from_checkpoint {folder}: no {FILE} in it, so it was not written by a run with lead(), and what "
            f"that run had selected is unknown. Load the model from {folder} and train without resume_from_checkpoint, "
            "or go on with the trainer without lead()"
        )
    return folder
