"""Every supported architecture: packed = separate, for losses and all gradients, against transformers' own forward of
each sample alone.

The table is the list of what is trained at all (lead_engine/model/architectures.py): an architecture that is not here
is refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import import_utils

from lead_engine.base.errors import UserError
from lead_engine.config import RuntimeConfig
from lead_engine.model import architectures
from lead_engine.model.attention import NAME
from lead_engine.model.load import build_model
from lead_engine.model.packed import PackedLM
from lead_engine.pool.store import TokenStore
from lead_kernels import PackedBatch, gather_batch
from model_kinds import KINDS
from separate import reference, worst

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
IDS = [3, 17, 4, 29, 11]


def test_the_table_is_what_is_supported() -> None:
    assert set(KINDS) == set(architectures.SUPPORTED)


def build(folder: Path, attention: str = "auto", max_length: int = 64) -> PackedLM:
    return build_model(
        folder, device=CPU, runtime=RuntimeConfig(precision="fp32", attention=attention), max_length=max_length
    )


def batch(store: TokenStore, ids: list[int], slots: int = 8, spare: int = 6) -> PackedBatch:
    """A micro-batch with empty slots and an empty tail of `spare` tokens."""
    padded = torch.tensor(ids + [store.num_samples] * (slots - len(ids)))
    rows = int(store.response_rows[ids].sum()) if ids else 0
    return store.batch(padded, capacity=int(store.lengths[ids].sum()) + spare, num_rows=rows + 5)


def compare(folder: Path, store: TokenStore, ids: list[int]) -> None:
    exact, exact_grads = reference(folder, store, ids, torch.float64)
    single, single_grads = reference(folder, store, ids, torch.float32)
    for attention in ("segment", "mask"):
        model = build(folder, attention)
        out = model(batch(store, ids))
        out.loss.backward()
        assert worst(out.sample_nll[: len(ids)], exact) <= 1.2 * worst(single, exact) + 2e-6, attention
        assert not out.sample_nll[len(ids) :].any()
        with torch.no_grad():  # one sample, no empty slot, no tail
            alone = build(folder, attention)(batch(store, ids[:1], slots=1, spare=0)).sample_nll
        assert worst(alone, exact[:1]) <= 1.2 * worst(single, exact) + 2e-6, attention
        names, seen = model.checkpoint_names(), set()
        for name, parameter in model.named_parameters():
            truth = exact_grads[names[name]]
            bound = 2 * worst(single_grads[names[name]], truth) + 2e-6 * float(truth.abs().max()) + 1e-8
            assert worst(parameter.grad, truth) <= bound, (attention, name)
            seen.add(names[name])
        assert seen == set(exact_grads)


@pytest.fixture(scope="module")
def store(make_pool) -> TokenStore:
    return TokenStore.open(make_pool(samples=30) / "store")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_separate(kind: str, make_model, store: TokenStore) -> None:
    compare(make_model(kind, all_random=True, **KINDS[kind]), store, IDS)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_that_teach_nothing(kind: str, make_model, store: TokenStore, silent_store: TokenStore) -> None:
    """No sample, or none with a response token: loss 0 and a zero gradient for every parameter, so that ranks reduce
    the same set.
    """
    folder = make_model(kind, all_random=True, **KINDS[kind])
    for attention in ("segment", "mask"):
        model = build(folder, attention)
        for nothing in (
            batch(store, [], spare=16),
            batch(silent_store, [0, 1]),
            batch(silent_store, [1], slots=1, spare=0),
        ):
            out = model(nothing, token_weight=0.25)
            out.loss.backward()
            assert out.loss == 0
            assert not out.sample_nll.any()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, (attention, name)
                assert not parameter.grad.any(), (attention, name)
                parameter.grad = None


@pytest.fixture(scope="module")
def silent_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Two samples without a response token."""
    folder = tmp_path_factory.mktemp("silent") / "store"
    TokenStore.write(
        folder, [(torch.arange(5, 5 + n).numpy(), torch.zeros(n, dtype=torch.bool).numpy()) for n in (9, 12)]
    )
    return TokenStore.open(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_reads_the_device(kind: str, make_model, monkeypatch) -> None:
    """Forward and backward under FakeTensorMode: tensors have no data, so whatever depends on some (an experts' loop
    does) raises.

    transformers spares fake tensors some of its reads ("is this row packed?"); here it must not.
    """
    monkeypatch.setattr(import_utils, "is_fake_tensor", lambda _: False)
    config = AutoConfig.from_pretrained(make_model(kind, all_random=True, **KINDS[kind]))
    fake_step(config, architectures.experts_option(config))


def test_the_plain_experts_loop_does(make_model) -> None:
    config = AutoConfig.from_pretrained(make_model("qwen3_moe", all_random=True, **KINDS["qwen3_moe"]))
    with pytest.raises(DynamicOutputShapeException):
        fake_step(config, {"experts_implementation": "eager"})


def fake_step(config, options: dict[str, str]) -> None:
    # bf16: grouped products have a kernel on a GPU in no other dtype.
    options |= {
        "attn_implementation": NAME,
        "dtype": torch.bfloat16,
    }
    hf = AutoModelForCausalLM.from_config(architectures.as_trained(config), **options)
    model = PackedLM(hf, attention="mask", max_length=12, chunk_bytes=1 << 16)
    mode = FakeTensorMode()
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(mode.from_tensor(value.detach())))
        for name, value in list(module.named_buffers(recurse=False)):
            setattr(module, name, mode.from_tensor(value))
    with mode:
        tokens, response, offsets = (
            torch.zeros(60, dtype=torch.int32),
            torch.ones(60, dtype=torch.bool),
            torch.arange(0, 61, 12),
        )
        packed = gather_batch(tokens, response, offsets, torch.tensor([0, 3, 5]), capacity=48, num_rows=40)
        model(packed).loss.backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("longest", [40, 16])
def test_longrope_is_chosen_by_each_samples_own_length(longest: int, make_model, make_pool) -> None:
    """Phi-3's long frequencies are for samples of more than 16 tokens here; transformers goes
    by the longest of a call.
    """
    rope = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    }
    rope |= {"original_max_position_embeddings": 16}
    folder = make_model("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    store = TokenStore.open(make_pool(samples=30, longest=longest) / "store")
    assert (int(store.lengths[IDS].max()) > 16) == (longest > 16)
    assert int(store.lengths[IDS].min()) <= 16
    compare(folder, store, IDS)


def test_dynamic_rope_is_refused_beyond_its_length(make_model, store: TokenStore) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    folder = make_model("llama", rope_parameters=rope, max_position_embeddings=48)
    assert build(folder, max_length=48)
    with pytest.raises(UserError, match="--max-length 48"):
        build(folder, max_length=49)


def test_dropout_is_off_and_said_so(make_model, capsys) -> None:
    folder = make_model("phi", all_random=True, **KINDS["phi"])
    model = build(folder)
    assert "trained without the resid_pdrop 0.1 of its config.json" in " ".join(capsys.readouterr().out.split())
    assert not [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.p]
    assert model.config.resid_pdrop == 0.1  # what is saved is the model's own


REFUSED = {
    "qwen3_next": "layers of other kinds .*linear_attention",
    "lfm2": "compared",
    "llama4": "chunked_attention",
    "t5": "encoder-decoder",
    "mllama": "multimodal",
    "gpt_oss": "compared",  # attention sinks
    "nanochat": "compared",  # applies its last norm before the blocks too: wrong without an error before it was refused
    "phimoe": "compared",  # draws experts at random while it trains
    "gpt2": "compared",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_right_is_refused(kind: str, tmp_path: Path) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=REFUSED[kind]) as refused:
        build(tmp_path)
    assert f"{tmp_path}: a model of type {kind} " in str(refused.value)


def test_configs_that_cannot_be_right_are_refused() -> None:
    config = AutoConfig.for_model("gemma3_text", use_bidirectional_attention=True)
    assert "bidirectional" in architectures.why_not(config)
    config = AutoConfig.for_model("llama", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised" in architectures.why_not(config)
    assert architectures.why_not(AutoConfig.for_model("llama")) is None
