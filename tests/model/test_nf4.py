"""4-bit bases are bitsandbytes' own, on any number of ranks; what is trained on them is what transformers, peft, eval
and merge compute.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lead_engine.base.errors import UserError
from lead_engine.config import LoraConfig, MergeConfig, RuntimeConfig
from lead_engine.model import merge, nf4, weights
from lead_engine.model.load import build_model, count_parameters, load_hf
from lead_engine.model.packed import PackedLM
from lead_engine.pool.store import TokenStore
from lead_engine.training.distributed import process_group
from needs import BITSANDBYTES, SHARDED_INTEGERS

pytestmark = [pytest.mark.slow, BITSANDBYTES]
CPU = torch.device("cpu")
# Rows that three ranks do not divide; more than one block of scales in a weight; biases.
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "head_dim": 32,
    "num_key_value_heads": 2,
    "attention_bias": True,
}
OPTIONS = [
    "--budget",
    "0.5",
    "--batch.capacity",
    "64",
    "--batch.micro-batches",
    "6",
    "--selection.round-steps",
    "2",
    "--lora.rank",
    "4",
    "--lora.quantize",
    "nf4",
    "--lead.sketch-dim",
    "8",
    "--optimizer.lr",
    "1e-3",
    "--runtime.precision",
    "fp32",
]


def build(folder: Path, runtime: RuntimeConfig | None = None, **options) -> PackedLM:
    return build_model(folder, device=CPU, runtime=runtime or RuntimeConfig(precision="fp32"), max_length=64, **options)


def load_4bit(folder: Path):
    options = json.loads((folder / nf4.CONFIG).read_text()) if (folder / nf4.CONFIG).exists() else None
    quantised = (
        BitsAndBytesConfig.from_dict(options)
        if options
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    )
    base = (
        folder
        if options is None
        else json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=quantised)


def our_losses(model: PackedLM, store: TokenStore) -> torch.Tensor:
    ids = torch.tensor([0, 1, 2])
    with torch.no_grad():
        return model(store.batch(ids, capacity=128, num_rows=int(store.response_rows[ids].sum()))).sample_nll


def their_losses(model: nn.Module, store: TokenStore) -> torch.Tensor:
    losses = []
    for low, high in zip(store.offsets[:3].tolist(), store.offsets[1:4].tolist(), strict=True):
        tokens, mask = store.tokens[low:high].long(), store.response[low:high]
        with torch.no_grad():
            nll = nn.functional.cross_entropy(model(tokens[None]).logits[0, :-1].float(), tokens[1:], reduction="none")
        losses.append(nll[mask[1:]].mean())
    return torch.stack(losses)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_bitsandbytes(stored: torch.dtype, make_model, tmp_path: Path) -> None:
    base = make_model("llama", **SHAPE)
    if stored == torch.bfloat16:
        AutoModelForCausalLM.from_pretrained(base, dtype=stored).save_pretrained(tmp_path)
        base = tmp_path
    ours, theirs = build(base, lora=LoraConfig(rank=4, quantize="nf4")), load_4bit(base)
    layers = dict(nf4.layers(ours))
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        weight = theirs.get_submodule("model." + name.removeprefix("decoder.").removesuffix(".base_layer")).weight
        state = weight.quant_state
        assert torch.equal(layer.weight.flatten(), weight.data.flatten()), name
        assert torch.equal(layer.scale_codes.flatten(), state.absmax), name
        assert torch.equal(layer.scale_scales, state.state2.absmax)
        assert torch.equal(layer.scale_offset, state.offset)
        assert torch.equal(layer.levels, state.state2.code)
    bits = 8 * sum(
        sum(t.nbytes for t in (x.weight, x.scale_codes, x.scale_scales, x.scale_offset)) for x in layers.values()
    )
    assert bits / sum(x.in_features * x.out_features for x in layers.values()) < 4.14
    plain = build(base, lora=LoraConfig(rank=4))
    assert count_parameters(ours) == count_parameters(plain)
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in plain.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient(dtype: torch.dtype) -> None:
    """Against float64 over the dequantised weight: as near as a linear layer with that weight.

    No weight is kept for the backward pass.
    """
    torch.manual_seed(0)
    weight = torch.randn(96, 192)
    layer = nf4.NF4Linear(96, 192, nn.Parameter(torch.randn(96).to(dtype))).to_empty(device="cpu")
    layer.levels.copy_(nf4._levels())
    layer.fill(lambda rows, place: rows.copy_(weight[place]))
    with torch.no_grad():
        layer.bias.normal_()
    held = (layer.weight, layer.scale_codes, layer.scale_scales, layer.scale_offset, layer.levels)
    exact = nf4.dequantize(*held, torch.float32)
    # 16 levels, the widest gap of 0.3 of a block's largest magnitude: half of it, and what rounding the scales adds.
    scales = weight.view(96, 3, 64).abs().amax(-1, keepdim=True)
    assert ((exact - weight).view(96, 3, 64).abs() <= 0.17 * scales).all()

    x, upstream = torch.randn(50, 192, dtype=dtype), torch.randn(50, 96, dtype=dtype)
    like = nn.Linear(192, 96, dtype=dtype)
    with torch.no_grad():
        like.weight.copy_(exact)
        like.bias.copy_(layer.bias)
    kept: list[torch.Tensor] = []
    results = []
    for product, seen in ((layer, kept), (like, [])):
        own = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: (seen.append(t), t)[1], lambda t: t):
            y = product(own)
        y.backward(upstream)
        results.append((y.detach().double(), own.grad.double()))
    assert kept
    assert not [t.shape for t in kept if t.is_floating_point() and t.numel() > 256]
    wanted = (x.double() @ exact.double().T + layer.bias.detach().double(), upstream.double() @ exact.double())
    for ours, theirs, reference in zip(*results, wanted, strict=True):
        assert (ours - reference).abs().max() <= 1.5 * (theirs - reference).abs().max()


def test_a_product_reads_nothing_from_the_device() -> None:
    """Tensors without data: whatever reads one raises."""
    layer, mode = nf4.NF4Linear(96, 192, None), FakeTensorMode()
    held = {
        name: mode.from_tensor(torch.zeros(t.shape, dtype=t.dtype))
        for name, t in layer.state_dict(keep_vars=True).items()
    }
    held |= {name: mode.from_tensor(torch.zeros_like(t)) for name, t in layer.named_buffers()}
    with mode:
        x = torch.randn(5, 192, requires_grad=True)
        parts = (held[name] for name in ("weight", "scale_codes", "scale_scales", "scale_offset", "levels"))
        y = nf4._Product.apply(x, None, *parts)
        assert y.shape == (5, 96)
        y.sum().backward()
        assert x.grad.shape == (5, 192)


def test_adapters_get_the_gradients_that_the_rounded_base_gives_them(make_model, make_pool, tmp_path: Path) -> None:
    """A plain LoRA on a checkpoint whose weights were rounded beforehand is the same model: losses and gradients to
    fp32's rounding.
    """
    base, store = make_model("llama", **SHAPE), TokenStore.open(make_pool(samples=20) / "store")
    rounded = AutoModelForCausalLM.from_pretrained(base)
    nf4.round_blocks(rounded)
    rounded.save_pretrained(tmp_path)
    results = []
    for folder, quantize in ((base, "nf4"), (tmp_path, "none"), (base, "none")):
        model = build(folder, lora=LoraConfig(rank=4, quantize=quantize))
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1)
        ids = torch.tensor([0, 1, 2])
        head = model(store.batch(ids, capacity=128, num_rows=int(store.response_rows[ids].sum())), token_weight=0.1)
        head.loss.backward()
        results.append([head.sample_nll, *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, same, unrounded in zip(*results, strict=True):
        assert (ours - same).norm() <= 1e-5 * same.norm()
        assert (ours - unrounded).norm() > 1e-3 * same.norm()


def test_what_is_frozen_is_stored_as_it_is_computed_with(
    make_model, make_pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under FSDP in bf16: adapters fp32, codes bytes, all else of the base bf16, which changes no bit of any loss."""
    base, store = make_model("llama", **SHAPE), TokenStore.open(make_pool(samples=20) / "store")
    options = {
        "device": CPU,
        "runtime": RuntimeConfig(precision="bf16"),
        "max_length": 64,
        "lora": LoraConfig(rank=4, quantize="nf4"),
    }
    materialise = weights.materialise
    with process_group() as ranks:
        model = build_model(base, mesh=ranks.mesh, **options)
        monkeypatch.setattr(
            weights, "materialise", lambda model, device, dtype, frozen: materialise(model, device, dtype)
        )
        wide = build_model(base, mesh=ranks.mesh, **options)
        for name, parameter in model.named_parameters():
            codes = name.endswith("scale_codes") or ("_proj." in name and name.endswith("base_layer.weight"))
            assert parameter.dtype == (
                torch.uint8 if codes else torch.float32 if parameter.requires_grad else torch.bfloat16
            ), name
        assert wide.decoder.embed_tokens.weight.dtype == torch.float32
        assert torch.equal(our_losses(model, store), our_losses(wide, store))


@SHARDED_INTEGERS
def test_trained_run_is_the_same_everywhere(make_model, make_pool, run_ranks, run_cli, tmp_path: Path) -> None:
    """With DoRA and dropout: 1 and 3 ranks; transformers with peft; eval; merge. And rounding the base did matter."""
    base, pool = make_model("llama", **SHAPE), make_pool(samples=180)
    runs = {}
    for ranks in (1, 3):
        runs[ranks] = tmp_path / str(ranks)
        line = [
            "train",
            "--pool",
            pool,
            "--model",
            base,
            "--out",
            runs[ranks],
            *OPTIONS,
            "--lora.dora",
            "--lora.dropout",
            "0.1",
        ]
        run_ranks(*line, ranks=ranks)
    losses = {
        ranks: [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for ranks, out in runs.items()
    }
    adapters = {ranks: load_file(out / "model" / "adapter_model.safetensors") for ranks, out in runs.items()}
    assert len(losses[1]) >= 4
    np.testing.assert_allclose(losses[3], losses[1], rtol=1e-5)
    for name, value in adapters[1].items():
        assert (adapters[3][name] - value).abs().mean() <= 1e-3 * value.abs().mean(), name

    folder, store = runs[3] / "model", TokenStore.open(pool / "store")
    ours = our_losses(build(folder, trainable=False), store)
    unrounded = tmp_path / "unrounded"
    unrounded.mkdir()
    for file in folder.iterdir():
        if file.name != nf4.CONFIG:
            (unrounded / file.name).write_bytes(file.read_bytes())
    plain = our_losses(build(unrounded, trainable=False), store)
    apart = (ours - plain).abs().min()
    assert apart > 1e-3  # what 4 bits change: all below must be far nearer
    # In training mode, which but for dropout changes nothing else: in evaluation bitsandbytes multiplies in bf16 on a
    # CPU that can.
    peft = PeftModel.from_pretrained(load_4bit(folder), folder).train()
    for module in peft.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for theirs in (peft, load_hf(folder)):
        assert (their_losses(theirs, store) - ours).abs().max() < 1e-2 * apart
    done = run_cli("merge", runs[3], "--out", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert "rounded to NF4" in done.stdout
    assert "gemm_4bit" not in done.stdout + done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (their_losses(merged, store) - ours).abs().max() < 1e-2 * apart


def test_what_cannot_be_quantised_is_refused(
    make_model, make_pool, run_ranks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lora = LoraConfig(rank=4, quantize="nf4")
    narrow = make_model("llama", **{**SHAPE, "intermediate_size": 96})
    refused = run_ranks(
        "train", "--pool", make_pool(samples=60), "--model", narrow, "--out", tmp_path / "run", *OPTIONS, check=False
    )
    assert refused.processes[0].exitcode == 2
    assert "--lora.quantize nf4: model.layers.0.mlp.down_proj has 96 inputs, no multiple of 64" in " ".join(
        refused.output().split()
    )
    experts = make_model(
        "qwen3_moe", **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1
    )
    with pytest.raises(
        UserError, match=r"--lora\.quantize nf4: model\.layers\.0\.mlp\.experts\.\w+ is a weight .* of no linear layer"
    ):
        build(experts, lora=lora)
    with monkeypatch.context() as older:
        older.setattr(torch, "__version__", TorchVersion("2.11.1+cpu"))
        build(make_model("llama", **SHAPE), lora=lora)
        with process_group() as ranks:
            build(make_model("llama", **SHAPE), lora=lora, mesh=ranks.mesh)  # on one rank nothing is sharded
            offload = RuntimeConfig(precision="fp32", offload=True)
            with pytest.raises(
                UserError, match=r"--lora\.quantize nf4: FSDP shards and offloads integers from torch 2\.12 on"
            ):
                build(make_model("llama", **SHAPE), lora=lora, mesh=ranks.mesh, runtime=offload)
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"--lora\.quantize nf4: needs bitsandbytes.*pip install"):
        build(make_model("llama", **SHAPE), lora=lora)


def test_merge_of_a_plain_adapter_keeps_the_base(
    make_model, make_pool, run_ranks, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, options = make_model("llama", **SHAPE), list(OPTIONS)
    options[options.index("nf4")] = "none"
    run_ranks("train", "--pool", make_pool(samples=60), "--model", base, "--out", tmp_path / "run", *options)
    merge.run(MergeConfig(run=tmp_path / "run", out=tmp_path / "merged"))
    assert "NF4" not in capsys.readouterr().out
    name = "model.embed_tokens.weight"
    assert torch.equal(
        load_file(tmp_path / "merged" / "model.safetensors")[name], load_file(base / "model.safetensors")[name]
    )
