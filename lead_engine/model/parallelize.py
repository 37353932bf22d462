"""How a model is cut into FSDP units."""
from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lead_engine.model.packed import PackedLM


def parallelize(model: PackedLM, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard `model` in place over `mesh`: fp32 master weights, `dtype` compute, fp32 gradient reduction.

    The order is the order of wrapping: blocks first, then the head (with the embedding where they share a weight: a shared
    parameter must belong to one unit), then the root, which takes what is left.
    """
    # Inputs are not cast: the batch is integers, and the token weight and the sketch must stay fp32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    head = [model.decoder.embed_tokens, model.head] if model.tied else model.head
    units = [*model.decoder.layers, head, model]
    for unit in units:
        # The head's backward follows its forward at once, so freeing its weight in between would only gather it again.
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=unit is not head)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            # Losses carry the global 1 / response tokens already: gradients are summed over ranks, never averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
