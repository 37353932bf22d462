"""What is written is what Hugging Face reads: whole models, adapters, merged models; and damaged files are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from lead_engine.base.errors import UserError
from lead_engine.config import LoraConfig, MergeConfig, RuntimeConfig
from lead_engine.model import merge, save, weights
from lead_engine.model.find import find_model
from lead_engine.model.load import build_model, load_hf, load_tokenizer
from lead_engine.model.packed import PackedLM
from lead_engine.model.save import save_model
from lead_engine.pool.store import TokenStore

CPU = torch.device("cpu")


def build(folder: Path, **options) -> PackedLM:
    return build_model(folder, device=CPU, runtime=RuntimeConfig(precision="fp32"), max_length=64, **options)


def shake(model: PackedLM) -> None:
    """Move every trained weight, so that nothing written could be the base's."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def our_loss(model: PackedLM, store: TokenStore) -> torch.Tensor:
    ids = torch.tensor([0, 1, 2])
    with torch.no_grad():
        return model(store.batch(ids, capacity=128, num_rows=int(store.response_rows[ids].sum()))).sample_nll


def their_loss(model, store: TokenStore) -> torch.Tensor:
    losses = []
    for low, high in zip(store.offsets[:3].tolist(), store.offsets[1:4].tolist(), strict=True):
        tokens, mask = store.tokens[low:high].long(), store.response[low:high]
        with torch.no_grad():
            nll = torch.nn.functional.cross_entropy(
                model(tokens[None]).logits[0, :-1].float(), tokens[1:], reduction="none"
            )
        losses.append(nll[mask[1:]].mean())
    return torch.stack(losses)


def with_other_eos(model: Path, folder: Path) -> Path:
    """A copy of the model whose eos is <|endoftext|> (3), while its template ends turns with <|im_end|> (2)."""
    shutil.copytree(model, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 3, "pad_token_id": 0}')
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    return folder


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("qwen3", {"tie_word_embeddings": True})])
def test_model_is_read_by_transformers(kind: str, options: dict, make_model, make_pool, tmp_path: Path) -> None:
    base = with_other_eos(make_model(kind, **options), tmp_path / "base")
    store = TokenStore.open(make_pool(samples=20) / "store")
    model = build(base)
    shake(model)
    save_model(model, load_tokenizer(base), tmp_path / "model", base=base, rank=0)
    assert not list(tmp_path.glob("*.writing"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(our_loss(model, store), their_loss(theirs, store), rtol=1e-5, atol=1e-5)
    assert load_tokenizer(tmp_path / "model").chat_template
    assert (theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id) == ([3, 2], 0)
    again = build(tmp_path / "model")
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_adapter_is_read_by_peft_and_merged(make_model, make_pool, tmp_path: Path) -> None:
    base = with_other_eos(make_model("llama"), tmp_path / "base")
    store = TokenStore.open(make_pool(samples=20) / "store")
    model = build(base, lora=LoraConfig(rank=4, alpha=8.0))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    plain = build(base)
    torch.testing.assert_close(our_loss(model, store), our_loss(plain, store))  # B = 0: training starts at the base
    shake(model)
    assert (our_loss(model, store) - our_loss(plain, store)).abs().max() > 1e-3
    folder = tmp_path / "run" / "model"
    save_model(model, load_tokenizer(base), folder, base=base, rank=0)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    torch.testing.assert_close(our_loss(model, store), their_loss(peft, store), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_loss(model, store), our_loss(build(folder), store), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_loss(model, store), their_loss(load_hf(folder), store), rtol=1e-5, atol=1e-5)
    merge.run(MergeConfig(run=tmp_path / "run", out=tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.eos_token_id == [3, 2]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [3, 2]
    torch.testing.assert_close(our_loss(model, store), their_loss(merged, store), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="exists already"):
        merge.run(MergeConfig(run=tmp_path / "run", out=tmp_path / "merged"))
    with pytest.raises(UserError, match="holds no adapter"):
        merge.run(MergeConfig(run=base, out=tmp_path / "other"))


def test_new_adapters_depend_on_the_seed_alone(make_model) -> None:
    base = make_model("llama")
    first, again, other = (dict(build(base, lora=LoraConfig(rank=4), seed=s).named_parameters()) for s in (0, 0, 1))
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert first[name].abs().max() <= first[name].shape[1] ** -0.5


@pytest.mark.parametrize("damage", ["cut", "missing tensor", "other shape", "no file"])
def test_damaged_weights_are_named(damage: str, make_model, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama"), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "no file":
        file.unlink()
    else:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name][:5].contiguous()
        if damage == "missing tensor":
            del tensors[name]
        save_file(tensors, file)
    with pytest.raises(UserError, match=r"model\.safetensors|up_proj") as refused:
        build(folder)
    assert str(folder) in str(refused.value)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model .*holds no config.json"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(UserError, match="not a transformers model config"):
        build(tmp_path)


def test_what_cannot_be_written_is_told_after_all_is_gathered(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathering is a collective: if rank 0 left it at the first file that fails, the other ranks would wait for it for
    ever.
    """
    base, gathered, whole = make_model("llama", shards="40KB"), [], save.whole
    model = build(base)
    monkeypatch.setattr(save, "whole", lambda tensor: gathered.append(1) or whole(tensor))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        save_model(model, load_tokenizer(base), tmp_path / "file" / "model", base=base, rank=0)
    assert len(gathered) == len(list(weights.base_tensors(model)))
