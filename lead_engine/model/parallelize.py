"""How a model is wrapped: what is recomputed, what is compiled, how it is cut into FSDP units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from lead_engine.base.errors import UserError
from lead_engine.config import RuntimeConfig
from lead_engine.model.packed import PackedLM
from lead_engine.model.recompute import recompute
from lead_engine.model.shards import shards_integers


def parallelize(
    model: PackedLM, runtime: RuntimeConfig, dtype: torch.dtype, mesh: DeviceMesh | None, *, trainable: bool = True
) -> None:
    """Wrap a model in place, from the inside out.

    Blocks are recomputed and compiled (where the model is trained), then sharded (with a mesh).
    """
    model.compiled = trainable and runtime.compile
    for block in model.decoder.layers if trainable else ():
        recompute(block, runtime.checkpointing)
        if runtime.compile:
            compile_block(block)
    if mesh is not None:
        shard(model, mesh, dtype, offload=runtime.offload)


def compile_block(block: nn.Module) -> None:
    """Compile a block's forward pass, in place: the hooks that FSDP puts around the call stay outside.

    The whole forward is one graph, recomputation included, or the run stops with the compiler's reason; blocks of one
    shape share one compilation, and a micro-batch's shapes never change. What varies with it, the head's rows, is
    outside the blocks. The first forward pass raises UserError if the block cannot be compiled.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    name, compiled = type(block).__name__, torch.compile(block.forward, fullgraph=True, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            reason = next(line.strip() for line in str(error).splitlines() if line.strip())
            raise UserError(
                f"--runtime.compile: {name} cannot be compiled as one graph ({reason}); leave the flag out"
            ) from error

    block.forward = call


def shard(model: PackedLM, mesh: DeviceMesh, dtype: torch.dtype, *, offload: bool = False) -> None:
    """FSDP2 over `mesh`, in place: fp32 master weights, `dtype` compute, fp32 gradient reduction. Two dimensions:
    (replicas, shards).

    The order is the order of wrapping: blocks first, then the head (with the embedding where they share a weight: a
    shared parameter must belong to one unit), then the root, which takes what is left. offload: parameters, gradients
    and with them the optimizer's state stay in host memory, pinned where there is a GPU to copy to.
    """
    # Inputs are not cast: the batch is integers, and the token weight and the sketch must stay fp32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    head = [model.decoder.embed_tokens, model.head] if model.tied else model.head
    units = [*model.decoder.layers, head, model]
    # Where FSDP takes no integers, 4-bit weights stay out of it: on one rank there is nothing to shard.
    integers = None
    if not shards_integers():
        integers = {p for p in model.parameters() if not p.is_floating_point()}
    for unit in units:
        # The head's backward follows its forward at once, so freeing its weight in between would only gather it again.
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=unit is not head,
            mp_policy=policy,
            offload_policy=place,
            ignored_params=integers,
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if mesh.size() == 1:  # nothing to sum; a factor, 1 too, costs a pass over the gradients, a buffer another
                module.set_custom_reduce_scatter(_OneBuffer())  # type: ignore[arg-type]  # a part of it
                continue
            # Losses carry the global 1 / response tokens already: gradients are summed over ranks, never averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


class _OneBuffer:
    """FSDP's buffers for a reduction on one rank.

    FSDP asks for one to fill and one for the sum, which get the same memory. Copying a tensor to itself does nothing,
    so the sum is there at once. The interface is `torch.distributed.fsdp`'s `ReduceScatter`; its communication is never
    called with one rank.
    """

    def __init__(self) -> None:
        self._filled: torch.Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if self._filled is None:
            self._filled = torch.empty(*size, dtype=dtype, device=device)
            return self._filled
        summed, self._filled = self._filled, None
        return summed


def keep_gathered(model: PackedLM) -> None:
    """Let a sharded model gather its weights once an optimizer step instead of twice a micro-batch, in place.

    Gathering casts the fp32 weights to the compute dtype, on one rank too. Units stay gathered from a step's first
    forward pass to its last backward pass (`end_of_step`), before the optimizer changes the weights: the next step's
    copies are made anew.
    """
    assert isinstance(model, FSDPModule)  # `fully_shard` changes a module's class in place
    model.set_reshard_after_forward(False)
    model.keeps_gathered = True


def end_of_step(model: PackedLM, last: bool) -> None:
    """Tell a sharded model, before a micro-batch's backward pass, whether the step ends with it.

    Then gradients are reduced, and units that stay gathered are freed.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last)
    if model.keeps_gathered:
        model.set_reshard_after_backward(last)


def gathered_bytes(model: PackedLM) -> int:
    """What the gathered weights of all units take on one rank, in the compute dtype."""
    dtype = model.compute_dtype
    sizes = (p.numel() * (dtype.itemsize if p.is_floating_point() else p.element_size()) for p in model.parameters())
    return sum(sizes)


def parameter_device(device: torch.device, mesh: DeviceMesh | None, runtime: RuntimeConfig) -> torch.device:
    """Where parameters lie while they are not in use: the compute device, or the host if they are offloaded to it."""
    return torch.device("cpu") if runtime.offload and mesh is not None else device


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers (rotary tables) to the compute device, wherever the parameters are."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
