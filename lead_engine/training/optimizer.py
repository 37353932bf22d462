"""AdamW, its schedule, clipping, and the step's true first-order effect on the loss."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lead_engine.config import OptimizerConfig
from lead_engine.model.bnb import bitsandbytes_functional
from lead_engine.training.adamw8bit import AdamW8bit

_CHUNK = 1 << 22
"""Numbers that `inner_product` multiplies at a time: bounds its scratch memory to 16 MiB."""


def check_available(config: OptimizerConfig) -> None:
    """Raise UserError where the optimizer needs bitsandbytes and it is missing."""
    if config.kind == "adamw8bit":
        bitsandbytes_functional("--optimizer.kind adamw8bit")


EPS = 1e-8
"""AdamW's denominator floor."""
FINAL_LR = 0.1
"""Learning rate at the end of a schedule that falls, as a share of the peak."""


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, torch's fused one or with moments in 8 bits; weight decay on matrices only.

    Raises UserError where bitsandbytes, which 8 bits need, is missing.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.kind == "adamw8bit":
        return AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=EPS)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=EPS, fused=True)


def learning_rate(config: OptimizerConfig, progress: float) -> float:
    """Learning rate after a share `progress` in [0, 1] of the token budget.

    Linear warm-up, then decay to FINAL_LR * lr.

    Warm-up starts at a tenth of the peak: the very first step trains too.
    """
    if progress < config.warmup:
        return config.lr * (0.1 + 0.9 * progress / config.warmup)
    left = 1 - min(1.0, (progress - config.warmup) / (1 - config.warmup))
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[config.schedule]
    if config.schedule == "constant":
        return config.lr
    return config.lr * (FINAL_LR + (1 - FINAL_LR) * shape)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> tuple[Tensor, Tensor]:
    """Scale gradients in place to a global norm of at most max_norm.

    Returns (norm before, factor applied): 0-d tensors, the same on every rank.

    A norm that is not finite leaves gradients that are good for nothing: see training/finite.py.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def inner_product(parameters: Iterable[nn.Parameter]) -> Tensor:
    """<gradient, parameter> over this rank's shards: 0-d float64. Its sum over all ranks is that of the whole model.

    The change of a parameter under a step is the difference of two of these, so no copy of the parameters is needed.
    Sums are float64: the two differ in about the fifth digit only, and fp32 sums over millions of terms would lose it.
    Products are fp32: their rounding errors (6e-8 each, independent) average out far below the difference. ValueError
    where no parameter has a gradient.
    """
    total, copies = None, 1
    for parameter in parameters:
        if parameter.grad is None:
            continue
        copies = _copies(parameter)
        gradient, value = (_local(x).flatten() for x in (parameter.grad, parameter))
        for g, v in zip(torch.split(gradient, _CHUNK), torch.split(value, _CHUNK), strict=True):
            # They may be bf16 under Hugging Face's Trainer.
            part = torch.sum(g.float() * v.float(), dtype=torch.float64)
            total = part if total is None else total + part
    if total is None:
        raise ValueError("no parameter has a gradient")
    return total if copies == 1 else total / copies  # all parameters are on one mesh


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copies(parameter: Tensor) -> int:
    """How many ranks hold the same shard: 1, or HSDP's replicas."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    return math.prod(mesh.size(dim) for dim, placement in enumerate(parameter.placements) if placement.is_replicate())
