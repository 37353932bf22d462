"""Writing a trained model in Hugging Face format: a whole model, or a peft adapter folder."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from lead_engine.model import adapter, weights
from lead_engine.model.packed import PackedLM


def save_model(model: PackedLM, tokenizer: PreTrainedTokenizerBase, folder: Path, *, base: Path, rank: int) -> None:
    """Write `folder` (model or adapter, config, tokenizer); a collective over all ranks, files by rank 0.

    The folder appears whole: it is written beside its place and renamed. Tensors are stored in the base checkpoint's dtype.
    """
    lora = any(adapter.is_adapter(name) for name, _ in model.named_parameters())
    tensors = weights.gather(model, trained_only=lora, rank=rank)
    if rank != 0:
        return
    building = folder.with_name(folder.name + ".writing")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    if lora:
        save_file({adapter.stored_name(name): value for name, value in tensors.items()}, building / adapter.WEIGHTS, {"format": "pt"})
        config = model.peft_config
        config.base_model_name_or_path, config.inference_mode = str(base.resolve()), True
        config.save_pretrained(building)
    else:
        dtype = model.config.dtype or torch.float32
        save_torch_state_dict({name: value.to(dtype) for name, value in tensors.items()}, building, safe_serialization=True)
        model.config.save_pretrained(building)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(building)
    tokenizer.save_pretrained(building)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(building, folder)
