"""The formula of lead_engine/training/flops.py against what torch counts while real models run forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from lead_engine.config import LoraConfig, RuntimeConfig
from lead_engine.model import adapter
from lead_engine.model.load import build_model
from lead_engine.model.packed import PackedLM
from lead_engine.training.flops import ModelFlops, Peak, find_peak, peak_of, utilisation, visible_pairs

LENGTH = 48
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
MODELS = {
    "llama": {},
    "llama, grouped heads, tied": {"kind": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen3, wide heads": {"kind": "qwen3", "head_dim": 16},
    "mistral": {"sliding_window": None},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
}
LORA = {"none": LoraConfig(), "LoRA": LoraConfig(rank=4)}


def load(folder, lora: LoraConfig) -> PackedLM:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora.rank:
        adapter.inject(model, adapter.new_config(lora))
    return PackedLM(model, attention="segment", max_length=LENGTH, chunk_bytes=None)


def counted(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """FLOPs of transformers' own forward and backward pass over one sample, its head on every token; eager attention is
    plain products.
    """
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("name", MODELS)
def test_formula_counts_what_runs(name: str, lora: str, make_model) -> None:
    options = dict(MODELS[name])
    folder = make_model(options.pop("kind", name), **options)
    flops = ModelFlops.of(load(folder, LORA[lora]))
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    if LORA[lora].rank:
        adapter.inject(model, adapter.new_config(LORA[lora]))
    # Eager attention multiplies every query with every key, whether it may see it or not.
    pairs = LENGTH**2 * sum(per_pair for _, per_pair in flops.attention)
    expected = flops.per_token * LENGTH + flops.per_row * LENGTH + pairs
    assert counted(model, torch.randint(4, 300, (1, LENGTH))) == pytest.approx(expected, rel=0.005)


def test_engine_runs_what_is_counted(make_model) -> None:
    """The engine's own decoder over a packed micro-batch: samples do not see each other, and the plain products show
    it.
    """
    runtime = RuntimeConfig(precision="bf16", attention="segment")
    model = build_model(make_model("llama"), device=torch.device("cpu"), runtime=runtime, max_length=LENGTH).bfloat16()
    lengths = torch.tensor([40, 7, 17])
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0), torch.tensor([64])]).int()
    packed = type("Batch", (), {"cu_seqlens": cu, "input_ids": torch.arange(64) + 4, "position_ids": torch.arange(64)})
    with FlopCounterMode(display=False) as counter:
        model.hidden(packed).float().square().mean().backward()
    flops = ModelFlops.of(model)
    squares = int((lengths**2).sum()) * sum(per_pair for _, per_pair in flops.attention)
    assert counter.get_total_flops() == pytest.approx(64 * flops.per_token + squares, rel=0.005)


def test_bases_and_adapters_count_as_what_they_stand_for(make_model) -> None:
    """In 4 bits, on the head, DoRA (whose norms are no token's), modules trained whole."""
    folder = make_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    whole = [LoraConfig(rank=4, modules_to_save=names) for names in (("lm_head", "norm"), ("embed_tokens",))]
    plain, quantised, head, dora, trained_head, trained_embedding = (
        ModelFlops.of(
            build_model(
                folder, device=torch.device("cpu"), runtime=RuntimeConfig(precision="fp32"), max_length=8, lora=lora
            )
        )
        for lora in (
            LoraConfig(rank=4),
            LoraConfig(rank=4, quantize="nf4"),
            LoraConfig(rank=4, head=True),
            LoraConfig(rank=4, dora=True),
            *whole,
        )
    )
    assert quantised == plain
    assert plain.per_row == 4 * 320 * 64
    assert head.per_row == plain.per_row + 6 * 4 * (320 + 64)
    assert head.per_token == plain.per_token
    assert dora == plain
    assert trained_head.per_row == 6 * 320 * 64
    # Query, key, value (64, 32, 32 wide) and the A of their adapters, in the first block: their input has a gradient
    # now.
    assert trained_embedding.per_token == plain.per_token + 2 * 64 * (64 + 32 + 32 + 3 * 4)
    assert trained_embedding.per_row == plain.per_row


def test_pairs_are_those_of_the_mask() -> None:
    lengths = torch.tensor([1, 5, 8, 9, 40])
    for window in (None, 1, 8, 100):
        place = torch.arange(40)
        back = place[:, None] - place[None, :]
        seen = (back >= 0) & (back < (window or 1000))
        expected = [int(seen[:n, :n].sum()) for n in lengths.tolist()]
        assert visible_pairs(lengths, window).tolist() == expected


def test_windows_of_layers(make_model) -> None:
    model = load(
        make_model("gemma3_text", sliding_window=16, layer_types=["sliding_attention", "full_attention"]), LoraConfig()
    )
    per_layer = 12 * 4 * 8
    assert sorted(ModelFlops.of(model).attention, key=str) == [(16, per_layer), (None, per_layer)]


def test_samples_add_up(make_model) -> None:
    flops = ModelFlops.of(load(make_model("llama"), LoraConfig()))
    lengths, rows = torch.tensor([10, 3]), torch.tensor([4, 0])
    per_pair = sum(f for _, f in flops.attention)
    assert flops.samples(lengths, rows).tolist() == [
        10 * flops.per_token + 4 * flops.per_row + 55 * per_pair,
        3 * flops.per_token + 6 * per_pair,
    ]


def test_peaks() -> None:
    assert peak_of("NVIDIA H200").tflops == 989
    assert peak_of("NVIDIA H100 80GB HBM3").tflops == 989
    assert peak_of("NVIDIA H100 PCIe").tflops == 756
    assert peak_of("NVIDIA A100-SXM4-80GB").tflops == 312
    assert peak_of("NVIDIA L40S").tflops == 362
    assert peak_of("NVIDIA L4").tflops == 121
    assert peak_of("NVIDIA B200").tflops == 2250
    assert peak_of("AMD Instinct MI300X OAM").tflops == 1307.4
    assert peak_of("NVIDIA GeForce GTX 1080").tflops is None
    assert find_peak(torch.device("cpu")).tflops is None


def test_utilisation() -> None:
    assert utilisation(4e12, 2.0, 4, Peak(1.0, "")) == pytest.approx(0.5)
    assert utilisation(4e12, 2.0, 4, Peak(None, "")) is None
