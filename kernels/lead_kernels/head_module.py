"""An LM head whose forward is the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lead_kernels.head_types import Lora
from lead_kernels.linear_cross_entropy import HeadLoss, linear_cross_entropy


class LinearCrossEntropy(nn.Linear):
    """`nn.Linear` without logits: forward(hidden, targets, ...) -> HeadLoss, see `linear_cross_entropy`.

    A module of its own can be wrapped by `fully_shard`: in its forward the parameters are whole, in the dtype of the
    mixed-precision policy. Taking `full_tensor()` of a sharded weight and calling the function instead gives a wrong
    gradient under mixed precision.

    Parameters: weight [V, H], bias [V], and with lora_rank lora_a [R, H], which starts as `nn.Linear`'s weights do, and
    lora_b [V, R], which starts with zeros, as in arXiv 2106.09685. Weight and bias are then frozen.

    Args:
        lora_rank, lora_alpha: an adapter of that rank, scaled by lora_alpha / lora_rank.
        loss_options: keyword arguments of `linear_cross_entropy` for every call (softcap, label_smoothing, ...).
    """

    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **loss_options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.loss_options = loss_options
        self.lora_a = self.lora_b = None
        if lora_rank:
            self._add_adapter(lora_rank, lora_rank if lora_alpha is None else lora_alpha)

    @classmethod
    def of(
        cls, linear: nn.Linear, *, lora_rank: int = 0, lora_alpha: float | None = None, **loss_options: Any
    ) -> LinearCrossEntropy:
        """The same parameters (not copies, so that tied embeddings stay tied) behind the loss."""
        head = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", **loss_options)
        head.weight, head.bias = linear.weight, linear.bias
        if lora_rank:
            head._add_adapter(lora_rank, lora_rank if lora_alpha is None else lora_alpha)
        return head

    def _add_adapter(self, rank: int, alpha: float) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)
        self.lora_scale = alpha / rank

    def forward(  # type: ignore[override] # nn.Linear returns logits
        self, hidden: Tensor, targets: Tensor, **options: Any
    ) -> HeadLoss:
        """hidden: [T, H]; targets: int64 [T]; options of `linear_cross_entropy`, which override the constructor's."""
        if self.lora_a is not None and self.lora_b is not None:
            options["lora"] = Lora(self.lora_a, self.lora_b, self.lora_scale)
        return linear_cross_entropy(hidden, self.weight, targets, bias=self.bias, **{**self.loss_options, **options})
