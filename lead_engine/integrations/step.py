"""What an optimizer step tells the selection: collected after every backward pass, handed over at the step's end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lead_engine.base.errors import UserError
from lead_engine.integrations.head import HeadCall
from lead_engine.integrations.rounds import Rounds
from lead_engine.training.optimizer import inner_product
from lead_kernels import HeadLoss


class StepObserver:
    """Follows the micro-batches of the step in hand on this rank, and its update of the parameters.

    model: whose parameters are trained. num_slots: samples in a micro-batch. world: ranks. with_metrics: whether
    entropy and token accuracy are asked for.
    """

    def __init__(self, rounds: Rounds, model: nn.Module, *, num_slots: int, world: int, with_metrics: bool) -> None:
        self.rounds, self.world = rounds, world
        self._model, self._num_slots, self._with_metrics = model, num_slots, with_metrics
        self._losses: list[Tensor] = []
        self._metrics: list[Tensor] = []
        self._norm = torch.zeros(())
        self._lr = 0.0
        self._before: Tensor | None = None

    def call(self, located: dict[str, Any]) -> HeadCall:
        """The loss op's arguments for a batch of `TrainingRows.batch`; located: what stands under its key "lead"."""
        change = self.rounds.change
        return HeadCall(
            located["positions"],
            located["targets"],
            located["slots"],
            self._num_slots,
            # DDP averages gradients over the ranks, but the denominator counts the tokens of all of them.
            token_weight=self.world / self.rounds.response_tokens,
            signature=change.signature,
            keep_gradient=change.wants_hidden,
            with_metrics=self._with_metrics,
        )

    def collect(self, head: HeadLoss, call: HeadCall) -> None:
        """Take a micro-batch's losses and by-products, after its backward pass."""
        hidden = gradient = None
        if call.kept:
            hidden, gradient = call.kept
            gradient = gradient / self.world  # without the factor that `token_weight` has for DDP
        shares = head.sample_tokens / self.rounds.response_tokens
        self.rounds.change.collect(head, shares, hidden, gradient, call.slots)
        self._losses.append(head.sample_nll.detach())
        if head.predicted is not None and head.entropy is not None:
            correct = torch.sum(head.predicted == call.targets)
            sums = (head.entropy.sum(), correct, head.sample_tokens.sum())
            self._metrics.append(torch.stack([value.double() for value in sums]))
        if len(self._losses) == self.rounds.accumulation:
            # Now the gradient is that of the whole step, and the trainer has not clipped it yet.
            self._norm = get_total_norm([p.grad for p in self._trained() if p.grad is not None]).float()

    def before_update(self, lr: float) -> None:
        """Just before the optimizer's step, the gradient already clipped. Raises UserError if it is not finite."""
        self._check_finite()
        self._lr = lr
        measured = self.rounds.change.wants_first_order(self.rounds.steps_done)
        self._before = inner_product(self._trained()) if measured else None

    def after_update(self, max_grad_norm: float | None) -> None:
        """Just after the optimizer's step: let the selection learn from it."""
        first_order = None
        if self._before is not None:
            factor: Tensor | float = 1.0
            if max_grad_norm is not None and max_grad_norm > 0:
                factor = (max_grad_norm / (self._norm + 1e-6)).clamp(max=1.0)
            # Clipping has scaled the gradients by `factor`. Every rank has all parameters, so nothing is summed.
            first_order = ((inner_product(self._trained()) - self._before) / factor).float()
        losses, self._losses = self._losses, []
        self.rounds.observe(losses, self._lr, first_order, self._norm)
        self.rounds.end_step()

    def token_metrics(self) -> list[tuple[float, float]]:
        """Mean entropy (nats) and accuracy of the tokens in each of the step's micro-batches, over all ranks."""
        if not self._metrics:
            return []
        sums, self._metrics = torch.stack(self._metrics), []
        self.rounds.sum_over_ranks(sums)
        return [(entropy / tokens, correct / tokens) for entropy, correct, tokens in sums.tolist() if tokens]

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self._model.parameters() if p.requires_grad]

    def _check_finite(self) -> None:
        """Stop before the optimizer applies a gradient that is not finite, which would ruin every weight.

        Waits for the device, as the trainer does at every loss.
        """
        if bool(self._norm.isfinite()):
            return
        bad: list[int] = []
        for micro_batch, losses in enumerate(self._losses):
            ids = self.rounds.ids(micro_batch)
            bad += [i for i, finite in zip(ids, losses.isfinite().tolist(), strict=False) if not finite]
        what = "the gradient, on rows whose losses are finite here,"
        if bad:
            what = f"the loss of train_dataset's rows {bad}"
        raise UserError(
            f"step {self.rounds.steps_done}: {what} is not a finite number; look at the rows, lower learning_rate, or "
            "go on from the last checkpoint without them"
        )
