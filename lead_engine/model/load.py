"""From a name to a model: hub names, folders, run folders and `scratch:NAME` all become a Hugging Face folder first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lead_engine.base.console import say
from lead_engine.base.errors import UserError
from lead_engine.config import LoraConfig, RuntimeConfig
from lead_engine.model import adapter, architectures, nf4, weights
from lead_engine.model.adapter_config import find_base, read_config
from lead_engine.model.attention import NAME, choose_attention
from lead_engine.model.packed import PackedLM
from lead_engine.model.parallelize import move_buffers, parallelize, parameter_device
from lead_engine.model.precision import choose_precision
from lead_engine.model.rope import settle_rope
from lead_engine.pool.chat_template import mend_bos


def weights_folder(folder: Path) -> Path:
    """Where the whole model's weights and config.json are: a model folder itself, or an adapter's base."""
    return find_base(folder) if (folder / adapter.CONFIG).exists() else folder


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder, its chat template as `chat_template.mend_bos` leaves it.

    Raises UserError if there is none that can be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: no tokenizer that can be read ({str(error).splitlines()[0]})") from None
    mend_bos(tokenizer)
    return tokenizer


def build_model(
    folder: Path,
    *,
    device: torch.device,
    runtime: RuntimeConfig,
    max_length: int,
    mesh: DeviceMesh | None = None,
    lora: LoraConfig | None = None,
    trainable: bool = True,
    seed: int = 0,
) -> PackedLM:
    """A PackedLM with the weights of a Hugging Face folder (an adapter folder: base and adapter).

    With a mesh it is sharded (FSDP2) and every rank reads only its slices; without one it is whole. Parameters are fp32
    where they are trained, else in the compute dtype. max_length: longest sample in tokens. seed: of new adapter
    weights. Raises UserError for models whose layout is not supported and for files that cannot be read.
    """
    adapter_folder = folder if (folder / adapter.CONFIG).exists() else None
    base = weights_folder(folder)
    dtype = choose_precision(runtime.precision, device)
    kind = choose_attention(runtime.attention, device, dtype)
    config = load_config(base)
    architectures.check(config, base)
    if trainable and (noise := architectures.noise_of(config)):
        say(
            f"{base}: trained without the {', '.join(f'{name} {value:g}' for name, value in noise.items())} of its "
            "config.json"
        )
    options = {"attn_implementation": NAME, "dtype": torch.float32, **architectures.experts_option(config)}
    with init_empty_weights(include_buffers=False):  # parameters on the meta device, rotary tables real
        hf: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            architectures.as_trained(config), **options
        )
        if adapter_folder:
            adapter.inject(hf, read_config(adapter_folder), adapter_folder / adapter.CONFIG)
            adapter.check_options(hf, adapter_folder, lora or LoraConfig())
        elif lora is not None and lora.rank:
            adapter.inject(hf, adapter.new_config(lora), head=lora.head)
    if nf4.was_trained_on(adapter_folder) or (lora is not None and lora.quantize == "nf4"):
        nf4.quantize_blocks(hf, sharded=mesh is not None and (mesh.size() > 1 or runtime.offload))
    hf.tie_weights()  # the move to the meta device parted shared parameters
    settle_rope(hf.get_decoder(), max_length)
    model = PackedLM(hf, attention=kind, max_length=max_length, chunk_bytes=None)
    model.config = config  # as it is written to config.json again
    model.compute_dtype = dtype
    parallelize(model, runtime, dtype, mesh, trainable=trainable)
    stored = torch.float32 if trainable else dtype
    weights.materialise(model, parameter_device(device, mesh, runtime), stored, frozen=dtype if mesh else None)
    weights.load(model, base, adapter_folder)
    move_buffers(model, device)  # only now: where parameters are offloaded, quantising needs both on the host
    adapter.initialise(model, seed, skip=adapter_folder is not None)
    model.train(trainable)
    return model.requires_grad_(False) if not trainable else model


def load_for_inference(
    folder: Path, runtime: RuntimeConfig, max_length: int
) -> tuple[PackedLM, PreTrainedTokenizerBase]:
    """An unsharded model in the compute dtype for scoring, and its tokenizer."""
    model = build_model(folder, device=default_device(), runtime=runtime, max_length=max_length, trainable=False)
    return model, load_tokenizer(folder)


def load_hf(folder: Path) -> PreTrainedModel:
    """The plain transformers model (adapter merged in), for generation; fp32 on the CPU, bf16 on a GPU.

    An adapter that was trained on a 4-bit base is merged into that base, dequantised: it is the model that was trained.
    """
    device = default_device()
    dtype = choose_precision("auto", device) if device.type == "cuda" else torch.float32
    if not (folder / adapter.CONFIG).exists():
        return _on_device(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), device)
    base = AutoModelForCausalLM.from_pretrained(find_base(folder), dtype=dtype)
    if nf4.was_trained_on(folder):
        nf4.round_blocks(base)
    return _on_device(adapter.merge(base, folder), device)


def _on_device(model: Any, device: torch.device) -> PreTrainedModel:
    """The model, for inference. transformers' annotations of `to` do not take a device."""
    moved: PreTrainedModel = model.to(device).eval()
    return moved


def load_config(folder: Path) -> Any:
    """The transformers config of a folder. Raises UserError naming the file if it cannot be read."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise UserError(
            f"{folder / 'config.json'}: not a transformers model config ({str(error).splitlines()[0]})"
        ) from None


def default_device() -> torch.device:
    """The accelerator of this process if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trained) parameters, a shared one counted once; global sizes where they are sharded.

    In 4 bits a weight counts as one, too.
    """
    parameters = list(model.parameters())
    extra = sum(
        layer.in_features * layer.out_features - layer.weight.numel() - layer.scale_codes.numel()
        for _, layer in nf4.layers(model)
    )
    return sum(p.numel() for p in parameters) + extra, sum(p.numel() for p in parameters if p.requires_grad)
