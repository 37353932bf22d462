"""The state of a pool is kept exactly, and a damaged or foreign one is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from lead_engine.base.errors import UserError
from lead_engine.pool.state import DTYPES, PoolState


def make_state(n: int = 11) -> PoolState:
    generator = torch.Generator().manual_seed(n)
    return PoolState(
        utility=torch.rand(n, generator=generator),
        difficulty=torch.rand(n, generator=generator) * 2,
        answer_nll=torch.rand(n, generator=generator) * 5,
        cluster=torch.arange(n) % 3,
        task=torch.arange(n) % 2,
        dropped=torch.arange(n) % 4 == 0,
        task_names=["gsm8k", "Fragen & Wörter"],
        num_clusters=3,
    )


def test_round_trip(tmp_path: Path) -> None:
    state = make_state()
    state.save(tmp_path / "prepared")
    assert sorted(p.name for p in (tmp_path / "prepared").iterdir()) == ["state.json", "state.safetensors"]
    loaded = PoolState.load(tmp_path / "prepared", 11)
    for name, dtype in DTYPES.items():
        assert getattr(loaded, name).dtype == dtype
        assert torch.equal(getattr(loaded, name), getattr(state, name))
    assert (loaded.task_names, loaded.num_clusters) == (state.task_names, 3)
    make_state(5).save(tmp_path / "prepared")
    assert PoolState.load(tmp_path / "prepared").num_samples == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"utility": torch.zeros(11, dtype=torch.float64)},
        {"difficulty": torch.zeros(10)},
        {"dropped": torch.zeros(11, dtype=torch.int64)},
        {"cluster": torch.full((11,), 3)},
        {"task": torch.full((11,), -1)},
        {"task_names": ["only one"]},
    ],
)
def test_vectors_must_agree(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        dataclasses.replace(make_state(), **changes)


def change_header(folder: Path, **values: object) -> None:
    header = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    (folder / "state.json").write_text(json.dumps({**header, **values}))


DAMAGE = {
    "no header": ("state.json", lambda f: (f / "state.json").unlink()),
    "no tensors": ("state.safetensors", lambda f: (f / "state.safetensors").unlink()),
    "broken header": ("state.json", lambda f: (f / "state.json").write_text("{")),
    "header of another kind": ("state.json", lambda f: (f / "state.json").write_text('{"a": 1}')),
    "other version": ("state.json", lambda f: change_header(f, version=99)),
    "cut tensors": (
        "state.safetensors",
        lambda f: (f / "state.safetensors").write_bytes((f / "state.safetensors").read_bytes()[:-9]),
    ),
    "too few clusters": ("state.safetensors", lambda f: change_header(f, num_clusters=2)),
    "another count": ("state.safetensors", lambda f: change_header(f, num_samples=12)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    make_state().save(tmp_path)
    name, damage = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises(UserError, match=name):
        PoolState.load(tmp_path)


def test_another_pools_state_is_refused(tmp_path: Path) -> None:
    make_state().save(tmp_path)
    with pytest.raises(UserError, match=r"11 samples.*token store has 12"):
        PoolState.load(tmp_path, 12)


def test_missing_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    make_state().save(tmp_path)
    save_file({"utility": torch.zeros(11)}, tmp_path / "state.safetensors")
    with pytest.raises(UserError, match=r"state\.safetensors"):
        PoolState.load(tmp_path)
