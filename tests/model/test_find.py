"""A base model is named so that others find it, by the hub's name and commit, and files can be read as others' can."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lead_engine.base.errors import UserError
from lead_engine.base.files import publish
from lead_engine.config import LoraConfig, MergeConfig, RuntimeConfig
from lead_engine.model import merge
from lead_engine.model.adapter_config import find_base
from lead_engine.model.find import find_model, hub_name
from lead_engine.model.load import build_model, load_hf, load_tokenizer
from lead_engine.model.packed import PackedLM
from lead_engine.model.save import save_model

COMMIT, NAME = "0123456789abcdef0123456789abcdef01234567", "acme/tiny-base"


@pytest.fixture
def cache(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of a made-up hub model in a made-up cache."""
    repository = tmp_path / "hub" / "models--acme--tiny-base"
    shutil.copytree(make_model("llama"), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "snapshots" / COMMIT


@pytest.fixture(params=[0o022, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def train(folder: Path, out: Path, **options) -> PackedLM:
    model = build_model(
        folder, device=torch.device("cpu"), runtime=RuntimeConfig(precision="fp32"), max_length=64, **options
    )
    save_model(model, load_tokenizer(folder), out, base=folder, rank=0)
    return model


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def named(folder: Path) -> tuple[str, str | None]:
    return config_of(folder)["base_model_name_or_path"], config_of(folder)["revision"]


def test_an_adapter_names_the_hub(cache: Path, tmp_path: Path) -> None:
    """And so do the adapter trained on, and one that was saved with another machine's path;
    both are read, and merged.
    """
    assert find_model(NAME) == find_model(f"{NAME}@main") == find_model(f"{NAME}@{COMMIT}") == cache
    with pytest.raises(UserError, match=r"--model acme/tiny-base@v2: .*not found on the hub"):
        find_model(f"{NAME}@v2")
    short = shutil.copytree(cache, cache.with_name("abc123"))  # which the hub's client takes for the name of a branch
    assert find_model(f"{NAME}@abc123") == short
    run = tmp_path / "run" / "model"
    train(find_model(NAME), run, lora=LoraConfig(rank=2))
    assert named(run) == (NAME, COMMIT)
    assert find_base(run) == cache
    elsewhere = f"/home/other/hub/models--acme--tiny-base/snapshots/{COMMIT}"
    for wrong in (elsewhere, str(cache)):
        changed = {**config_of(run), "base_model_name_or_path": wrong, "revision": None}
        (run / "adapter_config.json").write_text(json.dumps(changed))
        train(run, tmp_path / "again")
        assert named(tmp_path / "again") == (NAME, COMMIT)
    load_hf(run)
    merge.run(MergeConfig(run=run, out=tmp_path / "merged"))
    train(find_model(NAME), tmp_path / "full")
    for name in ("again", "merged", "full"):
        assert all(str(cache).encode() not in file.read_bytes() for file in (tmp_path / name).iterdir()), name


def test_a_base_that_is_a_folder_stays_one(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute: relative to what, nobody would know once the run has moved."""
    shutil.copytree(make_model("llama"), tmp_path / "base@1")
    monkeypatch.chdir(tmp_path)
    train(find_model("base@1"), tmp_path / "run", lora=LoraConfig(rank=2))
    assert named(tmp_path / "run") == (str(tmp_path / "base@1"), None)
    assert find_base(tmp_path / "run") == tmp_path / "base@1"
    shutil.move("base@1", "moved")
    with pytest.raises(UserError, match=r"run/adapter_config.json: base_model_name_or_path /.*base@1"):
        find_base(tmp_path / "run")


@pytest.mark.parametrize("name", ["gpt2", NAME])
def test_hub_name(name: str) -> None:
    folder = Path("/cache/hub") / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
    assert hub_name(folder) == f"{name}@{COMMIT}"
    assert hub_name(folder.parent) is None
    assert hub_name(Path("model")) is None


def test_modes_are_those_of_any_file(umask: int, make_model, tmp_path: Path) -> None:
    """Weights, adapters, merged models: safetensors writes 0600. tests/cli/test_whole_path.py looks at all commands."""
    shutil.copytree(make_model("llama"), tmp_path / "base", copy_function=shutil.copyfile)
    (tmp_path / "base" / "generation_config.json").chmod(0o400)  # it is copied beside the trained weights
    train(tmp_path / "base", tmp_path / "full")
    train(tmp_path / "base", tmp_path / "lora", lora=LoraConfig(rank=2))
    merge.run(MergeConfig(run=tmp_path / "lora", out=tmp_path / "merged"))
    written = [file for name in ("full", "lora", "merged") for file in (tmp_path / name).rglob("*")]
    assert len(written) > 12
    assert {stat.S_IMODE(file.stat().st_mode) for file in written} == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "base" / "generation_config.json").stat().st_mode) == 0o400


def test_publish_replaces_what_was_there(tmp_path: Path) -> None:
    for name, text in (("new", "2"), ("place", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / text).write_text(text)
    publish(tmp_path / "new", tmp_path / "place")
    assert [path.name for path in tmp_path.rglob("*")] == ["place", "2"]
    (tmp_path / "file").write_text("3")
    publish(tmp_path / "file", tmp_path / "place" / "2")
    assert (tmp_path / "place" / "2").read_text() == "3"
