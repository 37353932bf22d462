"""Checkpoints on disk: damaged ones are found out and passed over, nothing in them is run, and what cannot be written
harms nothing.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lead_engine.base.errors import UserError
from lead_engine.training.checkpoint import MARKER, Checkpoints
from lead_engine.training.distributed import Ranks, process_group
from lead_engine.training.rounds import Progress
from runs import OPTIONS, assert_same_run, kill_after_checkpoint

pytestmark = pytest.mark.slow


class Part:
    """Something with a state."""

    def __init__(self) -> None:
        self.value = torch.zeros(5, dtype=torch.int64)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.value.copy_(state["value"])


class World:
    """A model that trains and its checkpoints, without the rest of a run."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int = 3) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 5))
        self.model[0].bias.requires_grad_(False)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], fused=True, lr=0.1)
        self.part = Part()
        self.checkpoints = Checkpoints(folder, ranks, keep)

    def train(self, step: int) -> None:
        self.model(torch.randn(3, 30)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.part.value.fill_(step)

    def save(self, step: int) -> bool:
        progress = Progress(step, step, 10 * step)
        started = self.checkpoints.save(self.model, self.optimizer, {"part": self.part}, progress, {"step": step})
        return started and self.checkpoints.finish()

    def load(self) -> tuple[Progress, dict[str, Any]]:
        return self.checkpoints.load(self.model, self.optimizer, {"part": self.part})

    def values(self) -> list[torch.Tensor]:
        state = [value for p in self.optimizer.param_groups[0]["params"] for value in self.optimizer.state[p].values()]
        return [x.detach().clone() for x in (*self.model.parameters(), *state, self.part.value)]


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with process_group() as ranks:
        yield ranks


@pytest.fixture
def three(tmp_path: Path, ranks: Ranks) -> tuple[Path, dict[int, list[torch.Tensor]]]:
    """Checkpoints of steps 1, 2 and 3, and what is in them."""
    world, values = World(tmp_path / "checkpoints", ranks), {}
    for step in (1, 2, 3):
        world.train(step)
        assert world.save(step)
        values[step] = world.values()
    return tmp_path / "checkpoints", values


def newest(folder: Path) -> Path:
    return sorted(folder.iterdir())[-1]


def sign(path: Path) -> None:
    """Make the marker fit what the files are now, as an attacker would."""
    marker = json.loads((path / MARKER).read_text())
    marker["files"] = {
        name: [len(data), zlib.crc32(data)]
        for name in marker["files"]
        if (data := (path / name).read_bytes()) is not None
    }
    (path / MARKER).write_text(json.dumps(marker))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "data cut": (lambda path: cut(path / "__0_0.distcp"), r"__0_0\.distcp has [\d,]+ bytes of"),
    "data gone": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp: No such file"),
    "one bit": (lambda path: flip(path / "__0_0.distcp"), "checksum"),
    "metadata cut": (lambda path: cut(path / ".metadata"), r"\.metadata has"),
    "metadata gone": (lambda path: (path / ".metadata").unlink(), r"\.metadata: No such file"),
    "marker empty": (lambda path: (path / MARKER).write_text(""), "COMPLETE cannot be read"),
    "signed, but no pickle": (lambda path: ((path / ".metadata").write_bytes(b"none"), sign(path)), "UnpicklingError"),
    "signed, but of something else": (
        lambda path: ((path / ".metadata").write_bytes(pickle.dumps([1])), sign(path)),
        "no checkpoint's",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(damage: str, three, ranks: Ranks, capsys) -> None:
    folder, values = three
    spoil, reason = DAMAGES[damage]
    spoil(newest(folder))
    world = World(folder, ranks)
    progress, notes = world.load()
    assert (progress, notes) == (Progress(2, 2, 20), {"step": 2})
    assert all(torch.equal(a, b) for a, b in zip(world.values(), values[2], strict=True))
    told = capsys.readouterr().err
    assert str(newest(folder)) in told
    assert re.search(reason, told), told


def test_the_newest_is_used_where_nothing_is_wrong(three, ranks: Ranks, capsys) -> None:
    folder, values = three
    world = World(folder, ranks)
    assert world.load() == (Progress(3, 3, 30), {"step": 3})
    assert all(torch.equal(a, b) for a, b in zip(world.values(), values[3], strict=True))
    assert not capsys.readouterr().err


def test_none_whole_is_an_error_and_none_at_all_a_start(three, ranks: Ranks, tmp_path: Path) -> None:
    folder, _ = three
    assert World(tmp_path / "elsewhere", ranks).load() == (Progress(), {})
    for path in folder.iterdir():
        cut(path / "__0_0.distcp")
    with pytest.raises(
        UserError, match=r"(?s)no checkpoint in .* is whole.*step-00000003.*step-00000002.*step-00000001"
    ):
        World(folder, ranks).load()


def test_frozen_parameters_are_not_stored(three) -> None:
    folder, _ = three
    stored = dcp.FileSystemReader(newest(folder)).read_metadata().state_dict_metadata
    assert {name for name in stored if name.startswith("model.")} == {
        "model.0.weight",
        "model.1.weight",
        "model.1.bias",
    }


def test_only_the_last_are_kept_and_damaged_ones_do_not_push_out_whole_ones(three, ranks: Ranks) -> None:
    folder, _ = three
    shutil.copytree(folder / "step-00000001", folder / "step-00000000")
    (folder / "step-00000000" / MARKER).unlink()  # as one whose writing was killed
    cut(newest(folder) / "__0_0.distcp")
    world = World(folder, ranks, keep=2)
    world.load()
    shutil.copytree(folder / "step-00000003", folder / "step-00000009")  # damaged, and later than what is trained again
    world.train(3)
    assert world.save(3)
    assert {path.name for path in folder.iterdir()} == {"step-00000002", "step-00000003", "step-00000009"}
    assert World(folder, ranks).load()[0].step == 3


# --- nothing on disk is run ---


class Evil:
    """Whoever unpickles it makes a folder."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)

    def __deepcopy__(self, memo: object) -> Evil:
        return self


def test_a_pickle_in_the_metadata_is_refused(three, ranks: Ranks, tmp_path: Path, capsys) -> None:
    folder, _ = three
    proof = tmp_path / "executed"
    (newest(folder) / ".metadata").write_bytes(pickle.dumps(Evil(proof)))
    sign(newest(folder))
    assert World(folder, ranks).load()[0].step == 2
    assert not proof.exists()
    assert "mkdir" in capsys.readouterr().err
    with pytest.raises(AttributeError):  # os.mkdir's None has no storage_meta: but it was run
        dcp.FileSystemReader(newest(folder)).read_metadata()
    assert proof.exists(), "torch's own reader no longer runs pickles: this test shows nothing"


def test_a_pickle_in_an_entry_is_refused(three, ranks: Ranks, tmp_path: Path) -> None:
    folder, _ = three
    proof = tmp_path / "executed"
    world = World(folder, ranks)
    world.train(4)
    world.optimizer.param_groups[0]["lr"] = Evil(proof)
    assert world.save(4)
    assert not proof.exists()
    assert World(folder, ranks).load()[0].step == 3
    assert not proof.exists()
    dcp.load({"optimizer": {"param_groups": [{"lr": 0.1}]}}, checkpoint_id=newest(folder))
    assert proof.exists(), "torch's own planner no longer runs pickles: this test shows nothing"


def test_metadata_may_not_name_files_elsewhere(three, ranks: Ranks, capsys) -> None:
    folder, _ = three
    path = newest(folder) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../step-00000001/" + info.relative_path
    path.write_bytes(pickle.dumps(metadata))
    sign(newest(folder))
    assert World(folder, ranks).load()[0].step == 2
    assert "outside" in capsys.readouterr().err


# --- what cannot be written ---


def test_a_checkpoint_that_cannot_be_written_is_given_up(three, ranks: Ranks, capsys) -> None:
    """RLIMIT_FSIZE: the kernel refuses to let a file grow."""
    folder, _ = three
    world = World(folder, ranks)
    world.load()
    world.train(4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        assert not world.save(4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002", "step-00000003"]
    told = capsys.readouterr().err
    assert "step-00000004" in told
    assert "File too large" in told
    world.train(5)
    assert world.save(5)
    assert World(folder, ranks).load()[0].step == 5


def test_a_folder_that_cannot_be_made_is_told_alike(three, ranks: Ranks, capsys) -> None:
    folder, _ = three
    world = World(folder, ranks)
    world.train(4)
    (folder / "step-00000004").write_text("a file is in the way")
    assert not world.save(4)
    assert "File exists" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"A FULL DISK IS NOT TESTED HERE: no right to mount a small file system ({done.stderr.strip()})")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.timeout(300)
def test_a_full_disk_costs_checkpoints_not_the_run(
    small_disk: Path, make_pool, make_model, run_ranks, tmp_path: Path
) -> None:
    pool, model = make_pool(samples=60), make_model("llama", hidden_size=64, shards="100KB")
    arguments = ["train", "--pool", pool, "--model", model, *OPTIONS, "--checkpoint-every", "2"]
    run_ranks(*arguments, "--out", tmp_path / "whole", ranks=2)
    size = sum(path.stat().st_size for path in newest(tmp_path / "whole" / "checkpoints").iterdir())
    out, ballast = small_disk / "run", small_disk / "ballast"
    # Room for one checkpoint and the logs, not for the model.
    ballast.write_bytes(bytes((4 << 20) - int(1.1 * size) - (180 << 10)))

    full = run_ranks(*arguments, "--out", out, ranks=2, check=False)
    assert full.wait() == [2, 2]
    kept = [path.name for path in (out / "checkpoints").iterdir()]
    assert len(kept) == 1, full.output()
    told = full.output(0)
    assert told.count("this checkpoint could not be written (No space left on device: it needs") >= 2
    assert f"{out / 'model'}: cannot be written (" in told
    assert "--resume" in told
    assert "Traceback" not in full.output()
    assert not (out / "model").exists()
    assert not (out / "model.writing").exists()

    ballast.unlink()
    run_ranks(*arguments, "--out", out, "--resume", ranks=2)
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.timeout(300)
def test_ranks_go_back_together(make_pool, make_model, start_ranks, run_ranks, tmp_path: Path) -> None:
    """A file of rank 1 is damaged: both ranks take the checkpoint before it."""
    pool, model = make_pool(samples=260), make_model("llama")
    arguments = [
        "train",
        "--pool",
        pool,
        "--model",
        model,
        *OPTIONS,
        "--checkpoint-every",
        "2",
        "--keep-checkpoints",
        "9",
    ]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_ranks(*arguments, "--out", whole, ranks=2)
    kill_after_checkpoint(start_ranks(*arguments, "--out", parted, ranks=2), parted)
    last = sorted(path.parent for path in parted.glob(f"checkpoints/*/{MARKER}"))[-1]
    cut(last / "__1_0.distcp")
    told = run_ranks(*arguments, "--out", parted, "--resume", ranks=2).output(0)
    assert f"{last}: damaged, not used (__1_0.distcp has" in told
    assert_same_run(whole, parted)
