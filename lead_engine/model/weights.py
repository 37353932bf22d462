"""Weights between safetensors files and a (possibly sharded) PackedLM.

Every rank opens the files and reads only the slices that its shards hold: no rank ever has the whole model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lead_engine.base.console import warn
from lead_engine.base.errors import UserError
from lead_engine.model import adapter, dora, nf4
from lead_engine.model.packed import PackedLM
from lead_engine.model.shards import local_part, whole
from lead_engine.model.stored import Checkpoint, find_layout, read

SINGLE = "model.safetensors"


def materialise(model: PackedLM, device: torch.device, dtype: torch.dtype, frozen: torch.dtype | None = None) -> None:
    """Give meta parameters storage on `device` in `dtype`.

    Buffers (rotary tables) and integers keep their values and dtype.

    frozen: dtype of those that are not trained. Where FSDP casts parameters for computing anyway, they may as well be
    stored in that dtype.
    """
    buffers, tied = {name: buffer.clone() for name, buffer in model.named_buffers()}, model.tied
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}

    def cast(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(dtype if frozen is None or id(tensor) in trained else frozen)

    model._apply(cast)  # type: ignore[no-untyped-call]  # torch has no annotations here
    model.to_empty(device=device)
    for name, value in buffers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, value.to(device))
    if tied and not model.tied:  # to_empty makes a new parameter for each module that holds a shared one
        model.head.projection.weight = model.decoder.embed_tokens.weight


def load(model: PackedLM, base: Path, adapter_folder: Path | None) -> None:
    """Fill parameters and persistent buffers from a Hugging Face folder, and the adapter's from its folder.

    Sets `model.stored`.

    Raises UserError naming the file for a file that cannot be read, a tensor that is missing or has another shape.
    """
    checkpoint = Checkpoint(base, SINGLE)
    tensors, aliases = dict(base_tensors(model)), aliases_of(model)
    quantised = {f"{name}.weight": layer for name, layer in nf4.layers(model)}
    shapes = {
        alias: tuple(quantised.get(name, tensors[name]).shape) for name, some in aliases.items() for alias in some
    }
    model.stored = find_layout(checkpoint, shapes, model.transforms, model.base_prefix)
    _name_strangers(model)
    for name, tensor in tensors.items():
        _fill(quantised.get(name, tensor), checkpoint, aliases[name], model)
    dora.measure(model)
    if adapter_folder is not None:
        names = model.checkpoint_names()
        adapter.load(model, {name: names[name] for name in model.adapter_parameters}, adapter_folder)


def _name_strangers(model: PackedLM) -> None:
    """Warn of stored tensors that the model has no place for: biases that config.json forgot, say."""
    stored, text = model.stored, model.config.get_text_config()
    strangers = [
        name for name in stored.file_of if name not in stored.dtype_of and not name.endswith("rotary_emb.inv_freq")
    ]
    if strangers and text is model.config:  # the rest of a multimodal model is known to be there
        what = f"{len(strangers)} of its tensors are" if len(strangers) > 1 else "one of its tensors is"
        warn(
            f"{stored.folder}: {what} not in the model that config.json describes, and kept as stored: "
            f"{', '.join(strangers[:3])}"
        )


def base_tensors(model: PackedLM) -> Iterator[tuple[str, Tensor]]:
    """Parameters (a shared one once) and persistent buffers that are the base model's, not an adapter's.

    A weight in 4 bits: its codes.
    """
    scales = {f"{name}.scale_codes" for name, _ in nf4.layers(model)}
    for name, parameter in model.named_parameters():
        if not adapter.is_adapter(name) and name not in scales:
            yield name, parameter
    yield from model.persistent_buffers().items()


def aliases_of(model: PackedLM) -> dict[str, list[str]]:
    """Name of each base tensor -> its names in transformers.

    There is one name, or two for a weight that embedding and head share.
    """
    names, by_identity = model.checkpoint_names(), defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity[id(parameter)].append(names[name])
    return {name: by_identity.get(id(tensor), [names[name]]) for name, tensor in base_tensors(model)}


@torch.no_grad()
def _fill(tensor: Tensor | nf4.NF4Linear, checkpoint: Checkpoint, aliases: list[str], model: PackedLM) -> None:
    stored = [alias for alias in aliases if alias in model.stored.pieces]
    if not stored:
        raise UserError(
            f"{checkpoint.folder}: no tensor {aliases[0]}; the files do not fit the model that config.json describes"
        )
    if isinstance(tensor, nf4.NF4Linear):
        tensor.fill(lambda rows, place: read(checkpoint, model.stored.pieces[stored[0]], rows, place))
        return
    local, place = local_part(tensor)
    if not local.numel():
        return
    read(checkpoint, model.stored.pieces[stored[0]], local, place)
    for other in stored[1:]:
        again = torch.empty_like(local)
        read(checkpoint, model.stored.pieces[other], again, place)
        if not torch.equal(local, again):
            raise UserError(
                f"{checkpoint.folder}: config.json says tie_word_embeddings, but {stored[0]} and {other} differ; "
                "set it to false there, or remove the one that does not count"
            )


def gather_adapter(model: PackedLM, rank: int) -> dict[str, Tensor]:
    """Whole adapter tensors by their names in peft's file; a collective over all ranks.

    On the CPU of rank 0; {} elsewhere.
    """
    names, tensors = model.checkpoint_names(), {}
    for name, parameter in model.named_parameters():
        if name in model.adapter_parameters:
            value = whole(parameter)
            if rank == 0:
                tensors[adapter.stored_name(names[name])] = adapter.as_stored(model, name, value).cpu().contiguous()
    return tensors
