"""Weights between safetensors files and a (possibly sharded) PackedLM.

Every rank opens the files and reads only the slices that its shards hold: no rank ever has the whole model.
"""
from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from lead_engine.errors import UserError
from lead_engine.model import adapter
from lead_engine.model.packed import PackedLM
from lead_engine.model.shards import local_part


def materialise(model: PackedLM, device: torch.device, dtype: torch.dtype) -> None:
    """Give meta parameters storage on `device` in `dtype`; buffers (rotary tables) keep their values and dtype."""
    buffers, tied = {name: buffer.clone() for name, buffer in model.named_buffers()}, model.tied
    model.to(dtype)
    model.to_empty(device=device)
    for name, value in buffers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, value.to(device))
    if tied and not model.tied:  # to_empty makes a new parameter for each module that holds a shared one
        model.head.projection.weight = model.decoder.embed_tokens.weight


def load(model: PackedLM, base: Path, adapter_folder: Path | None) -> None:
    """Fill the parameters from a Hugging Face folder, and the adapter's from its folder.

    Raises UserError naming the file for a file that cannot be read, a tensor that is missing or has another shape.
    """
    checkpoint = _Files(base, "model.safetensors")
    adapters = _Files(adapter_folder, adapter.WEIGHTS) if adapter_folder else None
    names = model.checkpoint_names()
    for name, parameter in model.named_parameters():
        source, stored = checkpoint, names[name]
        if adapter.is_adapter(name):
            if adapters is None:
                continue
            source, stored = adapters, adapter.stored_name(stored)
        source.read_into(parameter, stored)


class _Files:
    """The safetensors files of one folder: one file, or shards with an index."""

    def __init__(self, folder: Path, single: str):
        index = folder / f"{single}.index.json"
        if index.exists():
            where = json.loads(index.read_text())["weight_map"]
        elif (folder / single).exists():
            with _open(folder / single) as file:
                where = dict.fromkeys(file.keys(), single)
        else:
            raise UserError(f"{folder}: no {single} (only safetensors weights are read; convert .bin files with transformers first)")
        self.folder, self.where = folder, where

    def read_into(self, parameter: Tensor, name: str) -> None:
        if name not in self.where:
            raise UserError(f"{self.folder}: no tensor {name}; the file does not fit the model that its config.json describes")
        path = self.folder / self.where[name]
        with _open(path) as file, torch.no_grad():
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != tuple(parameter.shape):
                raise UserError(f"{path}: {name} has shape {stored.get_shape()}, the model wants {list(parameter.shape)}")
            local, place = local_part(parameter)
            if local.numel():
                local.copy_(stored[place])


def _open(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from None


def gather(model: PackedLM, *, trained_only: bool, rank: int) -> dict[str, Tensor]:
    """Whole tensors by checkpoint name, on the CPU, on rank 0 ({} elsewhere); a collective over all ranks.

    One tensor is whole at a time, so no device needs room for the model. trained_only: adapter parameters alone.
    """
    names, tensors = model.checkpoint_names(), {}
    for name, parameter in model.named_parameters():
        if trained_only and not adapter.is_adapter(name):
            continue
        value = parameter.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if rank == 0:
            tensors[names[name]] = whole.cpu().contiguous()
    return tensors
