"""DoRA (arXiv 2402.09353): the rows of an adapted weight have magnitudes of their own.

W' = m (W + s B A) / |W + s B A|, with the norm taken a row.

As peft's, with its norms kept out of the gradient, and its file. Three things differ inside:

- The parameter is m - |W|, how far a magnitude has moved, beside a buffer |W|. In bf16 a magnitude near 1 would not
  see a step of 1e-4, and training would start beside the base rather than at it.
- |W + s B A|^2 = |W|^2 + 2 s <W, B A> + s^2 |B A|^2 is computed from W A^T [out, r] and A A^T [r, r]: no matrix of W's
  size is made, and the move of the norm is not a difference of two large numbers.
- The weight may be in 4 bits. FSDP has gathered it, with everything else of its block, when this runs.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from lead_engine.model import nf4
from lead_engine.model.shards import whole

NAME = "default"
_TINY = 1e-12


class Magnitude(nn.Module):
    """Magnitudes [out] of an adapted weight.

    `weight`, a parameter, is how far they are from the base's norms, `base`.
    """

    base: Tensor

    def __init__(self, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features))
        self.register_buffer("base", torch.zeros(out_features), persistent=False)
        """fp32; worked out from the base's weights whenever the model is built, the same on all ranks."""

    def gain(self, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """m / |W + s B A| - 1: fp32 [out], differentiable in m. weight: W [out, in], a: [r, in], b: [out, r]."""
        with torch.no_grad():
            b32, a32 = b.float(), a.float()
            cross = ((weight @ a.T).float() * b32).sum(1)
            square = ((b32 @ (a32 @ a32.T)) * b32).sum(1)
            moved = scaling * (2 * cross + scaling * square)  # |W + s B A|^2 - |W|^2
            norm = (self.base.square() + moved).clamp(min=0).sqrt().clamp(min=_TINY)
            longer = moved / (norm + self.base)
        return (self.weight.float() - longer) / norm


class Dora(LoraVariant):
    """What peft calls where a layer has magnitudes."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        layer: Any = module  # peft declares few of its layers' attributes
        a, b = layer.lora_A[active_adapter], layer.lora_B[active_adapter]
        base, dropout = layer.get_base_layer(), layer.lora_dropout[active_adapter]
        scaling = layer.scaling[active_adapter]
        weight = base.dense(x.dtype) if isinstance(base, nf4.NF4Linear) else base.weight
        gain = layer.lora_magnitude_vector[active_adapter].gain(weight, a.weight, b.weight, scaling).to(result.dtype)
        product = result
        if layer.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            product = base(x)
        if base.bias is not None:
            product = product - base.bias
        adapted: Tensor = result + gain * product + (1 + gain) * (b(a(x)) * scaling)
        return adapted


def install(layer: Any) -> None:
    """Put Magnitude in the place of peft's own in a layer that was given DoRA."""
    layer.lora_magnitude_vector[NAME] = Magnitude(layer.out_features)
    layer.lora_variant[NAME] = Dora()


@torch.no_grad()
def measure(model: nn.Module) -> None:
    """Fill `base` of every Magnitude from the weights; a collective where they are sharded, a layer at a time."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and NAME in layer.lora_magnitude_vector:
            base: Any = layer.get_base_layer()
            weight = base.dense(torch.float32) if isinstance(base, nf4.NF4Linear) else whole(base.weight)
            norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
            magnitude: Any = layer.lora_magnitude_vector[NAME]
            magnitude.base = norms.to(magnitude.base.device)
