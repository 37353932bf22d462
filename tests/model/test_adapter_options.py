"""LoRA's options against peft: its adapters are read, give its losses, are trained by its gradients, merged, and saved
as it reads them.
"""

from __future__ import annotations

import functools
import json
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lead_engine.base.errors import UserError
from lead_engine.config import LoraConfig, RuntimeConfig
from lead_engine.model import adapter
from lead_engine.model.adapter_config import read_config
from lead_engine.model.dropout import seed_dropout
from lead_engine.model.load import build_model, load_hf, load_tokenizer
from lead_engine.model.packed import PackedLM
from lead_engine.model.save import save_model
from lead_engine.pool.store import TokenStore

pytestmark = pytest.mark.slow

CPU, IDS = torch.device("cpu"), torch.tensor([0, 1, 2])
THEIRS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "pattern, last layer": {"target_modules": r".*\.1\.self_attn\.(q|v)_proj", "use_rslora": True},
    "layers and ranks": {
        "target_modules": ["q_proj", "up_proj", "o_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"q_proj": 3},
        "exclude_modules": ["o_proj"],
    },
    "DoRA, rank-stabilised": {
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "use_dora": True,
        "use_rslora": True,
    },
    "all whole": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "DoRA and a module": {
        "target_modules": "all-linear",
        "use_dora": True,
        "modules_to_save": ["model.norm", "mlp.down_proj"],
    },
    "drawn otherwise": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "lora_dropout": 0.3},
}


def build(folder: Path, **options: Any) -> PackedLM:
    return build_model(folder, device=CPU, runtime=RuntimeConfig(precision="fp32"), max_length=64, **options)


def losses(model: PackedLM, store: TokenStore, **options: Any):
    return model(store.batch(IDS, capacity=128, num_rows=int(store.response_rows[IDS].sum())), **options)


def their_losses(model: nn.Module, store: TokenStore) -> Tensor:
    """[3], differentiable."""
    found = []
    for low, high in zip(store.offsets[:3].tolist(), store.offsets[1:4].tolist(), strict=True):
        tokens, mask = store.tokens[low:high].long(), store.response[low:high]
        nll = nn.functional.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
        found.append(nll[mask[1:]].mean())
    return torch.stack(found)


def their_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")


def shake(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def base(make_model) -> Path:
    return make_model("llama")


@pytest.fixture(scope="module")
def store(make_pool) -> TokenStore:
    return TokenStore.open(make_pool(samples=20) / "store")


def made_by_peft(base: Path, folder: Path, **options: Any) -> Path:
    config = PeftLoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    shake(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", THEIRS)
def test_an_adapter_of_peft(name: str, base: Path, store: TokenStore, tmp_path: Path) -> None:
    """Losses and gradients are peft's, in memory, merged, and of what is saved again."""
    theirs = made_by_peft(base, tmp_path / "theirs", **THEIRS[name])
    ours, shares = build(theirs), (store.response_rows[IDS] / store.response_rows[IDS].sum()).double()
    gradients = {}
    for dtype in (torch.float64, torch.float32):
        peft = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=dtype), theirs, is_trainable=True
        )
        peft = peft.to(dtype).eval()
        found = their_losses(peft, store)
        (found * shares.to(dtype)).sum().backward()
        gradients[dtype] = {
            adapter.stored_name(their_name(name)): parameter.grad.double()
            for name, parameter in peft.named_parameters()
            if parameter.requires_grad
        }
    ours.eval()  # without dropout
    head = losses(ours, store, token_weight=1.0 / float(store.response_rows[IDS].sum()))
    torch.testing.assert_close(head.sample_nll, found.detach(), rtol=1e-5, atol=1e-5)
    head.loss.backward()
    names = ours.checkpoint_names()
    mine = {adapter.stored_name(names[n]): p.grad.double() for n, p in ours.named_parameters() if p.requires_grad}
    assert mine.keys() == gradients[torch.float64].keys()
    for key, exact in gradients[torch.float64].items():
        error, allowed = ((each[key] - exact).norm() for each in (mine, gradients[torch.float32]))
        assert error <= 3 * allowed + 3e-7 * exact.norm(), key
    with torch.no_grad():
        torch.testing.assert_close(their_losses(load_hf(theirs), store), found.detach(), rtol=1e-5, atol=1e-5)
        shake(ours)
        save_model(ours, load_tokenizer(base), tmp_path / "ours", base=theirs, rank=0)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours")
        torch.testing.assert_close(their_losses(again, store), losses(ours, store).sample_nll, rtol=1e-5, atol=1e-5)
        assert (losses(ours, store).sample_nll - head.sample_nll).abs().max() > 1e-3
        torch.testing.assert_close(
            losses(build(tmp_path / "ours").eval(), store).sample_nll, losses(ours, store).sample_nll
        )


def test_new_adapters_have_peft_s_layers(base: Path, store: TokenStore) -> None:
    """What the flags ask for is what peft puts in for the same words, starts at the base, and can be saved."""
    lora = LoraConfig(
        rank=4, target_modules=("q_proj", "v_proj"), dora=True, rslora=True, dropout=0.2, modules_to_save=("lm_head",)
    )
    model, theirs = (
        build(base, lora=lora),
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter.new_config(lora)),
    )
    names = model.checkpoint_names()
    wanted = {their_name(name) for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert {names[name] for name in model.adapter_parameters} == wanted
    assert next(m for m in model.modules() if isinstance(m, adapter.LoraLayer)).scaling["default"] == 16 / 4**0.5
    assert torch.equal(losses(model.eval(), store).sample_nll, losses(build(base).eval(), store).sample_nll)
    by_pattern = build(base, lora=LoraConfig(rank=4, target_modules=(r".*\.0\..*_proj",)))
    assert all(".0." in name for name in by_pattern.adapter_parameters)
    assert len(by_pattern.adapter_parameters) == 14


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_dropout_is_what_its_seed_says(quantize: str, make_model, store: TokenStore) -> None:
    """The same losses and gradients whatever is recomputed or compiled or was drawn before; others for another
    micro-batch.
    """
    base = make_model("llama", hidden_size=64, head_dim=16, intermediate_size=128)
    lora = LoraConfig(rank=4, dora=True, dropout=0.3, quantize=quantize)
    found = {}
    for checkpointing, compiled in (("none", False), ("selective", False), ("full", False), ("full", True)):
        runtime = RuntimeConfig(precision="fp32", checkpointing=checkpointing, compile=compiled)
        with mock.patch("torch.compile", functools.partial(torch.compile, backend="aot_eager")):
            model = build_model(base, device=CPU, runtime=runtime, max_length=64, lora=lora)
        shake(model)
        torch.rand(3)
        seed_dropout(5, 7, 1)
        head = losses(model, store, token_weight=0.1)
        head.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found[checkpointing, compiled] = {"loss": head.sample_nll.detach(), **gradients}
    for (mode, compiled), values in found.items():
        for name, value in found["none", False].items():
            error = (values[name] - value).norm() / value.norm()
            assert error <= (1e-5 if compiled else 0), (mode, name)  # the compiler takes other sums
    seed_dropout(5, 7, 2)
    assert (losses(model, store).sample_nll - head.sample_nll).abs().min() > 1e-4
    model.eval()
    assert torch.equal(losses(model, store).sample_nll, losses(model, store).sample_nll)


@pytest.mark.parametrize(
    "kind", [kind.value for kind in PeftType if kind != PeftType.LORA] + ["NO_SUCH", "", None, 3, ["LORA"]]
)
def test_other_kinds_are_refused(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "base_model_name_or_path": "x"}))
    with pytest.raises(
        UserError, match=r"adapter_config.json: (an adapter of kind|it names no peft_type).*merge it into its base"
    ):
        read_config(tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"bias": "lora_only"}, 'bias is "lora_only": it trains biases of the base'),
    "experts": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters .* mixture's experts"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices is .3.: single rows"),
    "later peft": ({"use_tomorrow": True}, "use_tomorrow is true: it is not computed here"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "changes the base's weights"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config is"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config is"),
    "classifier": ({"task_type": "SEQ_CLS"}, "task_type SEQ_CLS: only"),
    "rank": ({"r": 0}, "r is 0: a rank is"),
    "rank pattern": ({"rank_pattern": {"q_proj": -1}}, "rank_pattern of q_proj is -1"),
    "alpha": ({"lora_alpha": float("inf")}, "lora_alpha is Infinity"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
    "bias of LoRA": ({"lora_bias": True}, "lora_bias on .*q_proj, which has no bias"),
    "bias of DoRA": ({"lora_bias": True, "use_dora": True}, "not a config of peft's"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "embed_tokens is a Embedding: adapters on linear layers alone"),
    "names": ({"target_modules": ["c_attn"]}, "this llama model cannot have that adapter .*c_attn"),
    "pattern": ({"target_modules": "(q_proj"}, "cannot have that adapter|not a config of peft's"),
    "layers": ({"layers_to_transform": [17]}, "cannot have that adapter"),
    "module": ({"modules_to_save": ["score"]}, "no module whose name ends with score"),
    "both": ({"modules_to_save": ["proj"]}, "cannot have that adapter .modules_to_save cannot be applied"),
    "DoRA on the head": (
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
        "inside the loss, chunk by chunk, without use_dora",
    ),
}


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by_peft(base, tmp_path_factory.mktemp("plain"), target_modules=["q_proj", "v_proj"])


def changed(plain: Path, folder: Path, **values: Any) -> Path:
    """A copy of an adapter with other values in its config."""
    config = json.loads((plain / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))
    (folder / "adapter_model.safetensors").write_bytes((plain / "adapter_model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_are_refused(name: str, plain: Path, tmp_path: Path) -> None:
    """By training, and by generation and merging alike."""
    values, said = REFUSED[name]
    folder = changed(plain, tmp_path, **values)
    for read in (build, load_hf):
        with pytest.raises(UserError, match=rf"{folder}/adapter_config.json: .*(?:{said})"):
            read(folder)


WORDS = st.sampled_from([None, True, -1, 0.5, "", "x", [], ["x"], {}, {"x": 1}, "all", float("nan")])


@settings(max_examples=150, deadline=None)
@given(
    values=st.dictionaries(
        st.sampled_from([*PeftLoraConfig.__dataclass_fields__, "surprise"]), WORDS, min_size=1, max_size=3
    )
)
def test_no_config_raises_anything_else(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("config")
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "x", **values}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with suppress(UserError):
        read_config(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_damaged_configs_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin1"))
    for read in (build, load_hf):
        with pytest.raises(UserError, match=r"adapter_config.json: .*copy or download it again"):
            read(tmp_path)


def test_weights_that_do_not_fit_are_named(base: Path, plain: Path, make_model, tmp_path: Path) -> None:
    """Missing, too many, of another shape, of integers, as a pickle, of another base: by
    training and by merging alike.
    """
    tensors, name = (
        load_file(plain / "adapter_model.safetensors"),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
    )
    other = make_model("llama", hidden_size=48, head_dim=12)
    config = json.loads((plain / "adapter_config.json").read_text())
    wrong = {
        f"no tensor {name}": {n: v for n, v in tensors.items() if n != name},
        r"base_model.model.lm_head.weight has no place": {
            **tensors,
            "base_model.model.lm_head.weight": torch.ones(320, 32),
        },
        rf"{name} has shape \[2, 32\], the model wants \[4, 32\]": {**tensors, name: tensors[name][:2].contiguous()},
        name: {**tensors, name: tensors[name].to(torch.int8)},
        r"lora_A.weight has shape \[4, 32\], the model wants \[4, 48\]": tensors,
    }
    for number, (said, content) in enumerate(wrong.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        of = other if "48" in said else base
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(of)}))
        save_file(content, folder / "adapter_model.safetensors")
        for read in (build, load_hf):
            with pytest.raises(UserError, match=rf"{folder}/adapter_model.safetensors.*{said}"):
                read(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    for read in (build, load_hf):
        with pytest.raises(UserError, match=r"adapter_model.bin: only adapter_model.safetensors is read"):
            read(folder)


def test_tied_modules_are_refused(make_model) -> None:
    tied = make_model("qwen3", tie_word_embeddings=True)
    for module in ("lm_head", "embed_tokens"):
        said = rf"--lora.modules-to-save (model.)?{module}: this model's LM head and embedding are one matrix"
        with pytest.raises(UserError, match=said):
            build(tied, lora=LoraConfig(rank=2, modules_to_save=(module,)))
    assert any(
        "q_norm" in name
        for name in build(tied, lora=LoraConfig(rank=2, modules_to_save=("q_norm",))).adapter_parameters
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dora": True}, "--lora.dora True: must be left out without adapters"),
        ({"modules_to_save": ("a", "b")}, "--lora.modules-to-save a b: must be left out without adapters"),
        (
            {"rank": 2, "target_modules": ("q_proj", ".*")},
            r"--lora.target-modules q_proj \.\*: must be names, or one regular",
        ),
        ({"rank": 2, "target_modules": ("(q",)}, r"--lora.target-modules \(q: no regular expression"),
        ({"rank": 2, "target_modules": ("all-linear", "x")}, "or all-linear alone"),
        ({"rank": 2, "dropout": 1.0}, "--lora.dropout 1.0: "),
        ({"rank": 2, "dropout": float("nan")}, "--lora.dropout nan: "),
        ({"rank": 2, "head": True, "dora": True}, "--lora.dora True: must be left out beside --lora.head"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LoraConfig(**options)
