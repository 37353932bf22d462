"""The head's benchmark: what it computes from its measurements, its reference, and a small run on a CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import head
import head_check
import head_measure
import head_peers
import pytest
import torch
import torch.nn.functional as F
from head_counts import Shape

pytestmark = pytest.mark.slow

SHAPE = Shape(37, 12, 101)


@pytest.fixture
def inputs() -> head_peers.Inputs:
    return head_peers.make_inputs(SHAPE, torch.float64, "cpu")


def test_reference_is_autograd_s(inputs: head_peers.Inputs) -> None:
    loss = F.cross_entropy(inputs.hidden @ inputs.weight.T, inputs.targets)
    loss.backward()
    expected = head_check.reference(inputs, rows=10)
    assert expected.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(expected.dhidden, inputs.hidden.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(expected.dweight, inputs.weight.grad, rtol=1e-10, atol=1e-14)


def test_inputs_are_like_a_language_model_s() -> None:
    inputs = head_peers.make_inputs(Shape(512, 256, 8192), torch.float32, "cpu")
    assert 0.5 < float(F.cross_entropy(inputs.hidden @ inputs.weight.T, inputs.targets).detach()) < 3.0


def test_error_is_the_relative_norm_of_the_difference() -> None:
    expected = torch.full((5, 4), 2.0, dtype=torch.float64)
    value = expected.clone()
    value[4, 0] += 1.0
    assert head_check.relative_error(value, expected) == pytest.approx(1.0 / math.sqrt(20 * 4))


def test_a_wrong_contestant_is_not_admitted(inputs: head_peers.Inputs) -> None:
    def doubled(inputs: head_peers.Inputs) -> head_peers.Loss:
        return lambda h, w, y: 2.0 * head_peers.naive(inputs)(h, w, y)

    def broken(inputs: head_peers.Inputs) -> head_peers.Loss:
        raise ValueError("no such kernel\nand much more")

    expected = head_check.reference(inputs)
    loss, entry = head_check.admit(doubled, inputs, expected, 60)
    assert loss is None
    assert entry["absent"] == "wrong result"
    assert entry["error"]["dW"] == pytest.approx(1.0)
    assert head_check.admit(broken, inputs, expected, 60) == (None, {"absent": "ValueError: no such kernel"})
    loss, entry = head_check.admit(head_peers.naive, inputs, expected, 60)
    assert loss is not None
    assert max(entry["error"].values()) < 1e-6, "its logits are rounded to fp32"


def test_a_contestant_that_does_not_get_ready_is_left_out(inputs: head_peers.Inputs) -> None:
    def endless(inputs: head_peers.Inputs) -> head_peers.Loss:
        while True:
            pass

    assert head_check.admit(endless, inputs, head_check.reference(inputs), 1) == (
        None,
        {"absent": "TimeoutError: not ready after 1 s"},
    )


def test_missing_packages_are_named_by_what_pip_calls_them() -> None:
    assert (
        head_check._reason(ModuleNotFoundError("No module named 'liger_kernel'", name="liger_kernel"))
        == "liger-kernel is not installed"
    )
    assert "cutlass" in head_check._reason(ModuleNotFoundError("No module named 'cutlass'", name="cutlass")), (
        "a package's own missing need"
    )


def test_ratios_are_taken_within_turns() -> None:
    # The machine was ten times slower in the second turn: the ratio of medians would be 0.2.
    result = head_measure.summary([1.0, 20.0, 2.0], {"naive": [2.0, 40.0, 10.0]})
    assert result["ms"] == 2000.0
    assert result["quartiles_ms"] == [1500.0, 11000.0]
    assert result["over_naive"] == 0.5
    assert result["over_naive_quartiles"] == pytest.approx([0.35, 0.5])


def test_all_take_turns_in_a_rotating_order() -> None:
    order: list[str] = []
    times = head_measure.take_turns(
        {name: lambda name=name: order.append(name) for name in "abc"}, lambda run: run() or len(order), 4, 60.0
    )
    assert "".join(order) == "abcbcacababcbca"
    assert times == {"a": [6, 8, 10, 15], "b": [4, 9, 11, 13], "c": [5, 7, 12, 14]}, "the first turn does not count"
    assert len(head_measure.take_turns({"a": lambda: None}, lambda run: 0.0, 9, 0.0)["a"]) == 3, (
        "out of time: three turns all the same"
    )


def test_peak_memory_is_what_was_held_at_once_beyond_what_was_there(inputs: head_peers.Inputs) -> None:
    def run() -> None:
        for _ in range(2):
            a = torch.ones(2**24)
            a = a + 1.0  # both at once, 128 MiB
            del a

    there = torch.ones(2**24)
    assert head_measure.peak_bytes(run, inputs) == pytest.approx(2**27, rel=0.05)
    del there


def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "head.json"
    chosen = ["ours", "naive", "torch-chunked", "cce"]
    head.main(
        [
            "--device",
            "cpu",
            "--shapes",
            "300x32x2003",
            "--dtype",
            "bf16",
            "--threads",
            "1",
            "--turns",
            "2",
            "--contestants",
            *chosen,
            "--out",
            str(out),
        ]
    )
    result: dict[str, Any] = json.loads(out.read_text())
    case = result["cases"][0]
    entries = case["entries"]
    assert set(entries) == {
        *chosen,
        "ours, signature",
        "ours, row weights",
        "ours, frozen head",
        "1 product",
        "2 products",
        "3 products",
    }
    assert entries["cce"] == {"absent": "NotImplementedError: runs on a GPU only"}
    for name in ("ours", "naive"):
        both = entries[name]["forward+backward"]
        assert both["ms"] > 0
        assert entries[name]["forward"]["ms"] > 0
        assert 0 < entries[name]["error"]["dW"] < 0.01
    assert entries["3 products"]["forward+backward"]["over_products"] == 1.0
    assert entries["naive"]["forward+backward"]["over_naive"] == 1.0
    assert "Not measured: cce: NotImplementedError: runs on a GPU only." in head.table(case)
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_the_run_fails_if_our_own_loss_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        head.CONTESTANTS, "ours", lambda inputs: lambda h, w, y: 1.2 * head_peers.naive(inputs)(h, w, y)
    )
    monkeypatch.setattr(head, "VARIANTS", {})
    with pytest.raises(SystemExit, match="failed: ours"):
        head.main(
            [
                "--device",
                "cpu",
                "--shapes",
                "30x8x101",
                "--dtype",
                "fp32",
                "--turns",
                "2",
                "--contestants",
                "ours",
                "naive",
                "--out",
                str(tmp_path / "head.json"),
            ]
        )
    assert json.loads((tmp_path / "head.json").read_text())["cases"][0]["entries"]["ours"]["absent"] == "wrong result"
