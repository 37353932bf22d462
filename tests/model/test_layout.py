"""Checkpoints in shards: a rank reads its own slices and no others; what is written has the names, shapes and dtypes of
what was read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from forked import in_ranks
from lead_engine.base.errors import UserError
from lead_engine.config import RuntimeConfig
from lead_engine.model import stored
from lead_engine.model.load import build_model, load_tokenizer
from lead_engine.model.packed import PackedLM
from lead_engine.model.save import save_model
from lead_engine.model.shards import local_part
from lead_engine.model.weights import SINGLE, base_tensors
from model_kinds import KINDS, MIXTURE

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ODD = 323
"""A vocabulary that neither two nor three ranks divide."""
SHARDED = {
    "qwen3": {"tie_word_embeddings": True, "vocab_size": ODD},
    "gemma2": {"tie_word_embeddings": False, "vocab_size": ODD},
    "phi": {"vocab_size": ODD},
    "qwen3_moe": {**MIXTURE, "num_experts": 11, "num_local_experts": 11, "vocab_size": ODD},
    "mixtral": {**MIXTURE, "num_experts": 6, "num_local_experts": 6},
    "glm4_moe": {**MIXTURE, "num_experts": 6, "n_routed_experts": 6},
}


def build(folder: Path, **options) -> PackedLM:
    return build_model(folder, device=CPU, runtime=RuntimeConfig(precision="fp32"), max_length=64, **options)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


class Meter:
    """Stands before safetensors and counts what is read: bytes, and how often each tensor is touched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.bytes = 0
        monkeypatch.setattr(stored, "safe_open", self.open)

    def open(self, path: Path, **options) -> _File:
        return _File(self, safe_open(path, **options))


class _File:
    def __init__(self, meter: Meter, file):
        self.meter, self.file, self.keys = meter, file, file.keys

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self.meter, self.file.get_slice(name))


class _Slice:
    def __init__(self, meter: Meter, found):
        self.meter, self.found = meter, found
        self.get_shape, self.get_dtype = found.get_shape, found.get_dtype

    def __getitem__(self, place):
        part = self.found[place]
        self.meter.bytes += part.numel() * part.element_size()
        return part


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_reads_its_own_slices_and_no_more(world: int, make_model, monkeypatch, tmp_path: Path) -> None:
    folders, truth = {}, {}
    for kind, options in SHARDED.items():
        folders[kind] = make_model(kind, shards="40KB", dtype=torch.bfloat16, all_random=True, **options)
        assert len(list(folders[kind].glob("*.safetensors"))) > 1
        theirs = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32)
        truth[kind] = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    meter = Meter(monkeypatch)

    def work(rank: int) -> dict[str, tuple[int, int, int]]:
        """Bytes read, bytes held (in bf16), and those of them that every rank holds."""
        mesh, found = init_device_mesh("cpu", (world,)), {}
        for kind, folder in folders.items():
            meter.bytes = held = 0
            model = build(folder, mesh=mesh)
            names = model.checkpoint_names()
            for name, tensor in base_tensors(model):
                local, place = local_part(tensor)
                assert torch.equal(local, truth[kind][names[name]][place].to(local.dtype)), name
                held += 2 * local.numel()
            found[kind] = meter.bytes, held, sum(2 * buffer.numel() for buffer in model.persistent_buffers().values())
        return found

    ranks = in_ranks(world, tmp_path / "ranks", work)
    for kind, folder in folders.items():
        read, held, by_all = zip(*(rank[kind] for rank in ranks), strict=True)
        once = sum(tensor.nbytes for tensor in tensors_of(folder).values())
        assert read == held, kind
        assert sum(read) == once + (world - 1) * by_all[0], kind
        assert max(read) <= 1.25 * once / world, kind


@pytest.mark.parametrize("kind", KINDS)
def test_written_as_it_was_read(kind: str, make_model, tmp_path: Path, capsys) -> None:
    """bf16 in shards -> engine (fp32) -> files: the same names, shapes, dtypes and bits in the same files, and a config
    that says so.
    """
    folder = make_model(kind, shards="40KB", dtype=torch.bfloat16, all_random=True, **KINDS[kind])
    model = build(folder)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert "warning" not in capsys.readouterr().err
    save_model(model, load_tokenizer(folder), tmp_path / "model", base=folder, rank=0)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files == sorted(file.name for file in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        was, is_now = (load_file(place / file) for place in (folder, tmp_path / "model"))
        assert was.keys() == is_now.keys()
        for name, value in was.items():
            assert value.dtype == is_now[name].dtype == torch.bfloat16
            assert torch.equal(value, is_now[name]), name
    index, again = (json.loads((place / f"{SINGLE}.index.json").read_text()) for place in (folder, tmp_path / "model"))
    assert index["weight_map"] == again["weight_map"]
    assert index["metadata"]["total_size"] == again["metadata"]["total_size"]
    config, again = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "model"))
    assert config == again


def test_one_file_without_an_index_stays_one(make_model, tmp_path: Path) -> None:
    """And what the base has to say about generation, even what transformers would not write, stays too."""
    folder = shutil.copytree(make_model("llama"), tmp_path / "base")
    generation = '{"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": false}'
    (folder / "generation_config.json").write_text(generation)
    save_model(build(folder), load_tokenizer(folder), tmp_path / "model", base=folder, rank=0)
    assert (tmp_path / "model" / "generation_config.json").read_text() == generation
    assert [file.name for file in (tmp_path / "model").glob("*safetensors*")] == [SINGLE]


def changed(folder: Path, place: Path, change) -> Path:
    """A copy of a one-file model whose tensors went through `change`."""
    shutil.copytree(folder, place)
    save_file(
        {name: value.clone() for name, value in change(load_file(folder / SINGLE)).items()},
        place / SINGLE,
        {"format": "pt"},
    )
    return place


def same(a: PackedLM, b: PackedLM) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_other_forms_of_the_same_checkpoint(make_model, tmp_path: Path) -> None:
    """Tied weights under either name or both, a bare decoder's names, and experts that were saved fused."""
    tied = make_model("qwen3", tie_word_embeddings=True)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    under_head = changed(tied, tmp_path / "head", lambda t: {head if n == embedding else n: v for n, v in t.items()})
    under_both = changed(tied, tmp_path / "both", lambda t: {**t, head: t[embedding]})
    bare = changed(tied, tmp_path / "bare", lambda t: {n.removeprefix("model."): v for n, v in t.items()})
    for folder in (under_head, under_both, bare):
        model = build(folder)
        assert model.tied
        assert same(model, build(tied))
        save_model(model, load_tokenizer(tied), tmp_path / "saved", base=folder, rank=0)
        assert tensors_of(tmp_path / "saved").keys() == tensors_of(folder).keys()
    mixture = make_model("qwen3_moe", **MIXTURE)
    fused = changed(mixture, tmp_path / "fused", lambda _: AutoModelForCausalLM.from_pretrained(mixture).state_dict())
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors_of(fused)
    assert same(build(fused), build(mixture))


def test_tensors_that_the_model_has_no_place_for_are_named_and_kept(make_model, tmp_path: Path, capsys) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    extra = {
        bias: torch.arange(32.0, dtype=torch.float16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    folder = changed(make_model("llama"), tmp_path / "more", lambda t: {**t, **extra})
    model = build(folder)
    assert f"one of its tensors is not in the model that config.json describes, and kept as stored: {bias}" in " ".join(
        capsys.readouterr().err.split()
    )
    save_model(model, load_tokenizer(folder), tmp_path / "saved", base=folder, rank=0)
    saved = tensors_of(tmp_path / "saved")
    assert all(torch.equal(saved[name], value) and saved[name].dtype == value.dtype for name, value in extra.items())


def test_checkpoints_that_do_not_fit_are_named(make_model, tmp_path: Path) -> None:
    tied, mixture = make_model("qwen3", tie_word_embeddings=True), make_model("qwen3_moe", **MIXTURE)
    expert = "model.layers.1.mlp.experts.2.up_proj.weight"
    untied = changed(tied, tmp_path / "untied", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1})
    with pytest.raises(UserError, match=r"tie_word_embeddings.*differ"):
        build(untied)
    lost = changed(mixture, tmp_path / "lost", lambda t: {n: v for n, v in t.items() if n != expert})
    with pytest.raises(UserError, match=r"not all of .*up_proj.*layers.1.mlp.experts.gate_up_proj"):
        build(lost)
    few = changed(mixture, tmp_path / "few", lambda t: {n: v for n, v in t.items() if ".experts.3." not in n})
    with pytest.raises(UserError, match=r"down_proj .* has shape \[3, 32, 16\], the model wants \[4, 32, 16\]"):
        build(few)
    whole = changed(
        mixture,
        tmp_path / "eight",
        lambda t: {n: v.to(torch.float8_e4m3fn) if n == expert else v for n, v in t.items()},
    )
    with pytest.raises(UserError, match=r"up_proj.weight is stored as F8_E4M3.*not quantised"):
        build(whole)
    lying = tmp_path / "lying"
    shutil.copytree(make_model("llama", shards="40KB"), lying)
    index = json.loads((lying / f"{SINGLE}.index.json").read_text())
    files = index["weight_map"]
    files["model.norm.weight"] = next(file for file in files.values() if file != files["model.norm.weight"])
    (lying / f"{SINGLE}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"no tensor model.norm.weight, though the index says so"):
        build(lying)
    (lying / f"{SINGLE}.index.json").write_text('{"weight_map": ')
    with pytest.raises(UserError, match=r"index.json: not a safetensors index"):
        build(lying)
