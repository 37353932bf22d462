"""An adapter on the LM head works inside the loss: against peft, against the merged model, under FSDP, and through
merge.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lead_engine.base.errors import UserError
from lead_engine.config import LoraConfig, RuntimeConfig
from lead_engine.model.load import build_model, load_hf, load_tokenizer
from lead_engine.model.packed import PackedLM
from lead_engine.model.save import save_model
from lead_engine.pool.store import TokenStore

pytestmark = pytest.mark.slow

CPU, IDS = torch.device("cpu"), torch.tensor([0, 1, 2])
HEAD = LoraConfig(rank=4, alpha=8.0, head=True)


def build(folder: Path, **options) -> PackedLM:
    return build_model(folder, device=CPU, runtime=RuntimeConfig(precision="fp32"), max_length=64, **options)


def run(model: PackedLM, store: TokenStore, **options):
    return model(store.batch(IDS, capacity=128, num_rows=int(store.response_rows[IDS].sum())), **options)


def their_losses(model: nn.Module, store: TokenStore) -> Tensor:
    """[3], differentiable."""
    losses = []
    for low, high in zip(store.offsets[:3].tolist(), store.offsets[1:4].tolist(), strict=True):
        tokens, mask = store.tokens[low:high].long(), store.response[low:high]
        nll = nn.functional.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
        losses.append(nll[mask[1:]].mean())
    return torch.stack(losses)


@pytest.fixture
def trained(make_model, make_pool, tmp_path: Path) -> tuple[PackedLM, Path, Path, TokenStore]:
    """A model whose adapters were moved far from where they start, its folder, its base, and data."""
    base = make_model("llama")
    model = build(base, lora=HEAD)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    save_model(model, load_tokenizer(base), tmp_path / "run" / "model", base=base, rank=0)
    return model, tmp_path / "run" / "model", base, TokenStore.open(make_pool(samples=20) / "store")


def test_head_adapter_starts_at_the_base(make_model, make_pool) -> None:
    base, store = make_model("llama"), TokenStore.open(make_pool(samples=20) / "store")
    model, without = build(base, lora=HEAD), build(base, lora=LoraConfig(rank=4, alpha=8.0))
    assert torch.equal(run(model, store).sample_nll, run(build(base), store).sample_nll)
    names, others = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (model, without))
    assert names - others == {"head.projection.lora_A.default.weight", "head.projection.lora_B.default.weight"}
    own, other = dict(model.named_parameters()), dict(without.named_parameters())
    # The blocks' adapters start as they do without it.
    assert all(torch.equal(own[name], other[name]) for name in others)


def test_head_adapter_is_read_by_peft(trained) -> None:
    model, folder, base, store = trained
    ours = run(model, store).sample_nll
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    assert "base_model.model.lm_head.lora_B.weight" in load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for theirs in (PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder), load_hf(folder)):
            torch.testing.assert_close(their_losses(theirs, store), ours, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(build(folder), store).sample_nll, ours)
    blocks_only = dict(load_file(folder / "adapter_model.safetensors"))
    assert blocks_only["base_model.model.lm_head.lora_B.weight"].norm() > 0
    with torch.no_grad():
        model.head.projection.lora_B["default"].weight.zero_()
        assert (run(model, store).sample_nll - ours).abs().min() > 1e-2  # it mattered


def test_gradients_are_those_of_peft(trained) -> None:
    """Of every adapter, head and blocks, against float64: no further off than peft in the same precision."""
    model, folder, base, store = trained
    run(model, store, token_weight=1.0 / float(store.response_rows[IDS].sum())).loss.backward()
    ours = {model.checkpoint_names()[name]: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}
    shares = (store.response_rows[IDS] / store.response_rows[IDS].sum()).double()
    theirs = {}
    for dtype in (torch.float64, torch.float32):
        peft = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=dtype), folder, is_trainable=True
        ).to(dtype)
        (their_losses(peft, store) * shares.to(dtype)).sum().backward()
        theirs[dtype] = {
            n.removeprefix("base_model.model."): p.grad.double() for n, p in peft.named_parameters() if p.requires_grad
        }
    assert ours.keys() == theirs[torch.float64].keys()
    for name, exact in theirs[torch.float64].items():
        error, allowed = ((x[name] - exact).norm() for x in (ours, theirs[torch.float32]))
        assert error <= 3 * allowed + 1e-7 * exact.norm(), name


def test_selection_sees_the_effective_head(trained) -> None:
    """Signature and kept gradient are those of the model whose head is W + scale B A, and not those of W."""
    model, folder, base, store = trained
    generator = torch.Generator().manual_seed(5)
    sketch = tuple(torch.randn(32, 8, generator=generator) for _ in range(2))
    merged = build(base)
    with torch.no_grad():
        plain = dict(load_hf(folder).named_parameters())
        for name, parameter in merged.named_parameters():
            parameter.copy_(plain[merged.checkpoint_names()[name]])
    seen = []
    for which in (model, merged):
        which.head.keep_gradient = True
        result = run(which, store, token_weight=0.1, signature=sketch)
        result.loss.backward()
        seen.append((result.signature, which.head.hidden_RH, which.head.hidden_grad_RH))
    for ours, effective in zip(*seen, strict=True):
        torch.testing.assert_close(ours, effective, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.head.projection.lora_B["default"].weight.zero_()
    assert (run(model, store, token_weight=0.1, signature=sketch).signature - seen[0][0]).norm() > 0.1 * seen[0][
        0
    ].norm()


OPTIONS = [
    "--budget",
    "0.5",
    "--batch.capacity",
    "64",
    "--batch.micro-batches",
    "2",
    "--selection.round-steps",
    "2",
    "--lora.rank",
    "4",
    "--lora.head",
    "--lead.calibrate-every",
    "2",
    "--optimizer.lr",
    "1e-3",
]


def test_an_adapter_is_trained_on_as_it_is(make_model, make_pool, run_ranks, tmp_path: Path) -> None:
    """A run that starts from a run's adapter (4-bit base, head) goes on where that one ended,
    and names the same base.
    """
    pool, base = make_pool(samples=60), make_model("llama", hidden_size=64, head_dim=16, intermediate_size=128)
    line = [
        "train",
        "--pool",
        pool,
        "--batch.capacity",
        "64",
        "--batch.micro-batches",
        "2",
        "--selection.round-steps",
        "2",
    ]
    line += ["--lora.rank", "4", "--lora.head", "--optimizer.lr", "1e-3"]
    line += ["--runtime.precision", "fp32", "--method", "full", "--lora.quantize", "nf4"]
    run_ranks(*line, "--model", base, "--out", tmp_path / "first", "--optimizer.lr", "1e-2")
    bare = [part for part in line if part != "--lora.head"]
    for name in ("--lora.rank", "--lora.quantize"):
        place = bare.index(name)
        del bare[place : place + 2]
    run_ranks(*bare, "--model", tmp_path / "first", "--out", tmp_path / "second", "--optimizer.lr", "1e-9")
    first, second = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-6, rtol=0)
    assert (tmp_path / "second" / "model" / "quantization_config.json").exists()
    config = json.loads((tmp_path / "second" / "model" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == base
    refused = run_ranks(
        *line, "--model", tmp_path / "first", "--out", tmp_path / "third", "--lora.rank", "8", check=False
    )
    assert refused.processes[0].exitcode == 2
    assert "--lora.rank 8: --model" in refused.output()
    assert "is an adapter already (LoRA rank 4, alpha 16; here: 4)" in " ".join(refused.output().split())


@pytest.mark.parametrize("form", ["sketch", "exact"])
def test_ranks_do_not_matter(form: str, make_model, make_pool, run_ranks, tmp_path: Path) -> None:
    pool, base = make_pool(samples=200), make_model("llama")
    extra = ["--runtime.precision", "fp32", "--lead.sketch-dim", "8" if form == "sketch" else "0"]
    outs = {ranks: tmp_path / str(ranks) for ranks in (1, 2)}
    for ranks, out in outs.items():
        run_ranks("train", "--pool", pool, "--model", base, "--out", out, *OPTIONS, *extra, ranks=ranks)
    one, two = (
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in outs.values()
    )
    for key, tolerance in (("loss", 1e-5), ("mean_change", 1e-3)):
        np.testing.assert_allclose(
            [line[key] for line in one], [line[key] for line in two], rtol=tolerance, err_msg=key
        )
    weights = [load_file(out / "model" / "adapter_model.safetensors") for out in outs.values()]
    moved = weights[0]["base_model.model.lm_head.lora_B.weight"]
    assert moved.abs().mean() > 1e-4
    for name, value in weights[0].items():
        assert (weights[1][name] - value).abs().mean() <= 1e-3 * value.abs().mean(), name


def test_bf16_and_everything_at_once(make_model, make_pool, run_ranks, tmp_path: Path) -> None:
    """Adapters fp32 on a bf16 base with bytes among its parameters, in one FSDP unit; 8-bit moments; on two ranks."""
    pool, base = make_pool(samples=100), make_model("llama", hidden_size=64, head_dim=16, intermediate_size=128)
    extra = [
        "--lora.quantize",
        "nf4",
        "--optimizer.kind",
        "adamw8bit",
        "--runtime.precision",
        "bf16",
        "--lora.rank",
        "16",
    ]
    run_ranks("train", "--pool", pool, "--model", base, "--out", tmp_path / "run", *OPTIONS, *extra, ranks=2)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    adapter = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert all(
        value.dtype == torch.float32 and value.isfinite().all() and value.abs().max() > 0 for value in adapter.values()
    )


def test_a_tied_head_is_refused(make_model, make_pool, run_ranks, tmp_path: Path) -> None:
    tied = make_model("qwen3", tie_word_embeddings=True)
    refused = run_ranks(
        "train", "--pool", make_pool(samples=60), "--model", tied, "--out", tmp_path / "run", *OPTIONS, check=False
    )
    assert refused.processes[0].exitcode == 2
    text = " ".join(refused.output().split())
    assert (
        "--lora.head, or the head among --lora.target-modules: this model's LM head and embedding are one matrix"
        in text
    )
    assert "Traceback" not in text


def test_a_foreign_adapter_that_the_loss_could_not_follow_is_refused(trained) -> None:
    folder = trained[1]
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.1}))
    with pytest.raises(UserError, match="lora_dropout"):
        build(folder)
