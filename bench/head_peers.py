"""The head's contestants: each as a user of that library would write it, on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config
import torch.nn.functional as F
from head_counts import Shape
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lead_kernels import linear_cross_entropy

SAMPLE_ROWS = 256
SKETCH = 64
PACKAGES = {"liger_kernel": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy", "quack": "quack-kernels"}
"""Import name -> what pip calls it."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden, weight, targets) -> mean loss."""


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    sample_ids: Tensor
    sketches: tuple[Tensor, Tensor]
    token_weight: Tensor
    """1 / T, given row by row."""

    @property
    def shape(self) -> Shape:
        return Shape(*self.hidden.shape, self.weight.shape[0])

    def drop_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    rows, hidden, vocabulary = shape
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    targets = torch.randint(0, vocabulary, (rows,), generator=g, device=device)
    weight = normal(vocabulary, hidden) / math.sqrt(hidden)
    # Other logits have a standard deviation of 2, so log-sum-exp of log V + 2: the target's logit comes close to it.
    states = 2.0 * normal(rows, hidden) + (math.log(vocabulary) + 1.5) * weight[targets]
    return Inputs(
        states.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        targets,
        torch.arange(rows, device=device) // SAMPLE_ROWS,
        (normal(hidden, SKETCH) / SKETCH**0.5, normal(hidden, SKETCH) / SKETCH**0.5),
        torch.full((rows,), 1.0 / rows, device=device),
    )


# Contestants: each function gives the loss as a user of that library would write it, or raises why it cannot.


def ours(inputs: Inputs, **options: Any) -> Loss:
    samples = -(-inputs.shape.rows // SAMPLE_ROWS)

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, targets, sample_ids=inputs.sample_ids, num_samples=samples, **options
        ).loss

    return loss


def naive(inputs: Inputs) -> Loss:
    return lambda hidden, weight, targets: F.cross_entropy((hidden @ weight.T).float(), targets)


def compiled(inputs: Inputs) -> Loss:
    """Chunks of rows, each compiled into one fused graph and computed again in the backward pass."""
    rows = 2048 if inputs.hidden.is_cuda else 512

    def block(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")

    torch._dynamo.reset()
    torch._inductor.config.cpp.threads = torch.get_num_threads()
    fused = torch.compile(block, dynamic=False)

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        parts = zip(hidden.split(rows), targets.split(rows), strict=True)
        return (
            torch.stack([checkpoint(fused, h, weight, y, use_reentrant=False) for h, y in parts]).sum()
            / targets.shape[0]
        )

    return loss


def torch_own(inputs: Inputs) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return F.linear_cross_entropy


def torch_chunked(inputs: Inputs) -> Loss:
    own = torch_own(inputs)
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: own(hidden, weight, targets, options=options)


def liger(inputs: Inputs, **options: Any) -> Loss:
    _needs_gpu(inputs)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(**options)
    return lambda hidden, weight, targets: module(weight, hidden, targets)


def cce(inputs: Inputs, **options: Any) -> Loss:
    _needs_gpu(inputs)
    from cut_cross_entropy import linear_cross_entropy as cut

    return lambda hidden, weight, targets: cut(hidden, weight, targets, **options)


def quack(inputs: Inputs) -> Loss:
    _needs_gpu(inputs)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, targets: chunked_linear_cross_entropy(hidden, weight, targets, chunk_size=4096)


def _needs_gpu(inputs: Inputs) -> None:
    if not inputs.hidden.is_cuda:
        raise NotImplementedError("runs on a GPU only")


CONTESTANTS: dict[str, Callable[[Inputs], Loss]] = {
    "ours": ours,
    "naive": naive,
    "compiled": compiled,
    "torch": torch_own,
    "torch-chunked": torch_chunked,
    "liger": liger,
    "liger-fp32": lambda inputs: liger(inputs, accum_dtype=torch.float32),  # dW added up as ours is
    "cce": cce,
    "cce-exact": lambda inputs: cce(inputs, filter_eps=None),  # no gradient is skipped
    "quack": quack,
}
VARIANTS: dict[str, Callable[[Inputs], Loss]] = {
    "ours, signature": lambda inputs: ours(inputs, signature=inputs.sketches),
    "ours, row weights": lambda inputs: ours(inputs, token_weight=inputs.token_weight),
}
"""What others do not have; and "ours, frozen head", which is the same loss with a weight that needs no gradient."""
GPU_VARIANTS: dict[str, Callable[[Inputs], Loss]] = {
    # The number of counted rows is not read either.
    "ours, no host read": lambda inputs: ours(inputs, max_rows=inputs.shape.rows),
}
