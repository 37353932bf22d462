"""Fingerprints: every change of contents is caught and named; copies, moves and re-saves are no change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lead_engine.base import fingerprint
from lead_engine.base.errors import UserError
from lead_engine.model.identity import check_base, model_parts
from lead_engine.pool.identity import source_parts, tokenizer_parts
from lead_engine.pool.store_files import store_digest, write_store
from lead_engine.pool.tokenizer import train_tokenizer

FEW = settings(max_examples=15, deadline=None)


def flip(path: Path, place: int) -> None:
    """Change one byte, and nothing else: not the size."""
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1
    path.write_bytes(data)


# --- sources ---


@FEW
@given(data=st.binary(min_size=1, max_size=200), place=st.integers(0, 10**6), chunk=st.sampled_from([7, 64, 1 << 24]))
def test_any_byte_of_a_source(data: bytes, place: int, chunk: int, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("source")
    path = folder / "a.jsonl"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "CHUNK", chunk)
        before = source_parts([str(path)], "--pool")
        moved = shutil.copy(path, folder / "b.jsonl")
        assert not fingerprint.differences({"sources": before}, {"sources": source_parts([moved], "--pool")})
        flip(path, place)
        found = fingerprint.differences({"sources": before}, {"sources": source_parts([str(path)], "--pool")})
    assert found == [f"a.jsonl has other contents ({len(data):,} bytes then, {len(data):,} now)"]


def test_sources_are_named_in_number_and_order(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(name)

    def parts(names: str) -> dict:
        return {"sources": source_parts([str(tmp_path / f"{name}.jsonl") for name in names], "--pool")}

    assert fingerprint.differences(parts("ab"), parts("abc")) == ["2 sources then, 3 now"]
    assert fingerprint.differences(parts("ab"), parts("ba")) == ["the sources are in another order (b.jsonl, a.jsonl)"]
    assert fingerprint.differences(parts("ab"), parts("ac")) == [
        "c.jsonl (then: b.jsonl) has other contents (1 bytes then, 1 now)"
    ]
    hub = {"sources": [{"name": "some/set", "bytes": None, "digest": "x"}]}
    gone = {"sources": [{"name": "some/set", "bytes": None, "digest": None}]}
    found = ["some/set cannot be loaded, so whether it has changed cannot be told"]
    assert fingerprint.differences(hub, gone) == found
    assert parts("abc") == {"sources": source_parts([str(tmp_path)], "--pool")}  # a folder stands for its files


def test_threads_and_chunks_keep_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "CHUNK", 3)
    path = tmp_path / "x"
    digests = set()
    for data in (b"abcdefgh", b"abcfdegh", b"defabcgh", b"abcdefg", b"abcdefghi", b""):
        path.write_bytes(data)
        digests.add(fingerprint.digest_file(path))
    assert len(digests) == 6


# --- tokenizers ---


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a few words are enough for some merges of words"] * 3, 300).save_pretrained(folder)
    return folder


@FEW
@given(place=st.integers(0, 10**6), new=st.sampled_from("x \n{é"), resaved=st.booleans())
def test_any_character_of_a_template(
    place: int, new: str, resaved: bool, tokenizer_folder: Path, tmp_path_factory
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    before = tokenizer_parts(tokenizer)
    place %= len(tokenizer.chat_template) + 1
    tokenizer.chat_template = tokenizer.chat_template[:place] + new + tokenizer.chat_template[place:]
    if resaved:
        folder = tmp_path_factory.mktemp("again")
        tokenizer.save_pretrained(folder)
        assert tokenizer_parts(AutoTokenizer.from_pretrained(folder)) == tokenizer_parts(tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    found = fingerprint.differences({"tokenizer": before}, {"tokenizer": tokenizer_parts(tokenizer)})
    assert found == ["chat template of the tokenizer differs"]


def edit_core(edit) -> object:
    """A change of tokenizer.json."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        core = json.loads(path.read_text())
        edit(core)
        path.write_text(json.dumps(core))

    return change


def set_config(**values: object):
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def add(*tokens: str):
    def change(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(list(tokens))
        tokenizer.save_pretrained(folder)

    return change


def swap_merges(core: dict) -> None:
    core["model"]["merges"][0], core["model"]["merges"][1] = core["model"]["merges"][1], core["model"]["merges"][0]


def swap_ids(core: dict) -> None:
    vocab = core["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


CHANGES = {
    "merges of": edit_core(swap_merges),
    "vocabulary of the tokenizer differs": edit_core(swap_ids),
    "normalizer of": edit_core(lambda core: core.update(normalizer={"type": "Lowercase"})),
    "pre-tokenizer of": edit_core(lambda core: core.update(pre_tokenizer={"type": "Whitespace"})),
    "model of": edit_core(lambda core: core["model"].update(dropout=0.5)),
    "special tokens of": set_config(eos_token="<|endoftext|>"),
    "(289 tokens then, 291 now)": add("<tool>", "<call>"),
}


@pytest.mark.parametrize("named", CHANGES)
def test_any_part_of_a_tokenizer(named: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "changed"))
    before = tokenizer_parts(AutoTokenizer.from_pretrained(folder))
    CHANGES[named](folder)
    found = fingerprint.differences(
        {"tokenizer": before}, {"tokenizer": tokenizer_parts(AutoTokenizer.from_pretrained(folder))}
    )
    assert any(named in phrase for phrase in found), found


def test_a_tokenizer_in_use_and_saved_again_is_the_same(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    before = tokenizer_parts(tokenizer)
    tokenizer(["a", "a few words"], padding=True, truncation=True, max_length=2)
    tokenizer.pad_token = "<|endoftext|>"  # what trainers do; no text has other tokens for it
    for name in "abc":
        tokenizer.save_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer_parts(tokenizer) == before


# --- models ---


def write_model(folder: Path, tensors: dict, **config: object) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "transformers_version": "5", **config}))


@FEW
@given(place=st.integers(0, 10**6), chunk=st.sampled_from([1, 5, 1 << 24]))
def test_any_byte_of_the_weights(place: int, chunk: int, make_model, tmp_path_factory) -> None:
    """Same size, same header, one bit of one number: a fine-tuned model under its base's name."""
    folder = Path(shutil.copytree(make_model(), tmp_path_factory.mktemp("weights") / "m"))
    weights = folder / "model.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "CHUNK", max(chunk * 1000, 1))
        before = model_parts(folder)
        header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
        flip(weights, header + place % (weights.stat().st_size - header))
        found = fingerprint.differences({"model": before}, {"model": model_parts(folder)})
    assert found == ["weights of the model differ"]


def test_saved_again_in_shards_moved_and_touched_is_the_same(make_model, tmp_path: Path) -> None:
    before = model_parts(make_model())
    AutoModelForCausalLM.from_pretrained(make_model()).save_pretrained(tmp_path / "a", max_shard_size="40KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    after = model_parts(tmp_path / "a")
    assert {key: after[key] for key in ("tensors", "shapes", "weights")} == {
        key: before[key] for key in ("tensors", "shapes", "weights")
    }
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert model_parts(tmp_path / "b") == after
    config = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(
        json.dumps(config | {"transformers_version": "9", "_name_or_path": "elsewhere"})
    )
    assert model_parts(tmp_path / "b") == after
    (tmp_path / "b/config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    found = fingerprint.differences({"model": after}, {"model": model_parts(tmp_path / "b")})
    assert found == ["config of the model differs"]


def test_other_tensors_are_named_by_their_number(make_model, tmp_path: Path) -> None:
    with safe_open(make_model() / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    write_model(tmp_path / "m", tensors)
    before = model_parts(tmp_path / "m")
    del tensors[min(tensors)]
    write_model(tmp_path / "m", tensors)
    found = fingerprint.differences({"model": before}, {"model": model_parts(tmp_path / "m")})
    assert found == [
        "shapes of the model differ",
        f"weights of the model differ ({len(tensors) + 1} tensors then, {len(tensors)} now)",
    ]


@pytest.mark.parametrize("data", [b"", b"12", b"\xff" * 40, (2).to_bytes(8, "little") + b"[]"])
def test_a_damaged_file_is_named(data: bytes, make_model, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model(), tmp_path / "m"))
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file"):
        model_parts(folder)


def test_what_is_known_within_a_process_is_not_read_again_but_after_a_change(
    make_model, tmp_path: Path, monkeypatch
) -> None:
    from lead_engine.model import identity

    folder = Path(shutil.copytree(make_model(), tmp_path / "m"))
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    before = model_parts(folder)
    read: list[object] = []
    digest = fingerprint.digest_spans
    monkeypatch.setattr(fingerprint, "digest_spans", lambda spans: read.append(spans) or digest(spans))
    assert model_parts(folder) == before
    assert not read
    weights = folder / "model.safetensors"
    shutil.copy2(weights, tmp_path / "kept")
    flip(weights, -1)
    shutil.copystat(tmp_path / "kept", weights)  # a change that keeps size and modification time
    assert model_parts(folder) != before


# --- pools and adapters ---


def test_a_store_notes_its_contents_and_an_older_one_is_read(make_pool, tmp_path: Path) -> None:
    store = Path(shutil.copytree(make_pool(samples=9) / "store", tmp_path / "store"))
    noted = store_digest(store)
    meta = json.loads((store / "meta.json").read_text())
    del meta["digests"]
    (store / "meta.json").write_text(json.dumps(meta))
    assert store_digest(store) == noted
    write_store(tmp_path / "other", [([1, 2, 3], [False, True, True])] * 9)
    assert store_digest(tmp_path / "other")[1] != noted[1]


def test_an_adapter_knows_its_base(make_model, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = Path(shutil.copytree(make_model(), tmp_path / "base"))
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    peft.save_pretrained(tmp_path / "adapter")
    assert set(model_parts(tmp_path / "adapter")) == {"adapter", "base"}  # peft's own says nothing of its base
    fingerprint.write(tmp_path / "adapter", {"base": model_parts(base)})
    check_base(tmp_path / "adapter")
    flip(base / "model.safetensors", -1)
    with pytest.raises(
        UserError,
        match=r"base is not the base that the adapter was trained on: weights of the base model differ\. Bring",
    ):
        check_base(tmp_path / "adapter")


def test_an_adapter_and_a_whole_model_are_not_the_same() -> None:
    one, two = {"model": {"weights": "x"}}, {"model": {"adapter": {"weights": "x"}, "base": {"weights": "y"}}}
    assert fingerprint.differences(one, two) == ["the model is an adapter now only"]
    assert fingerprint.differences(two, one) == ["the model is an adapter then only"]
