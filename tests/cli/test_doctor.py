from __future__ import annotations

import importlib.metadata

import pytest
import torch
from torch import Tensor

from lead_engine.cli import doctor
from lead_kernels import HeadLoss, linear_cross_entropy


def test_the_report_says_what_is_there_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.run()
    out = " ".join(capsys.readouterr().out.split())  # columns are as wide as their widest cell
    for text in (
        f"| torch | {importlib.metadata.version('torch')} |",
        "--runtime.precision",
        "--runtime.attention",
        "gradient of weight, float32",
    ):
        assert text in out
    assert "FAILED" not in out


def test_what_is_missing_is_said_with_its_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", "flying")
    assert ["no-such-package", "not installed (needed for flying)"] in doctor.software()


class IgnoresUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return torch.ones_like(gradient)


class LosesHalfAChunk(torch.autograd.Function):
    """Gradients of the first rows are rounded away, as by an op that rounds before it subtracts the target."""

    @staticmethod
    def forward(ctx: object, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:8] *= 1 + 1e-3
        return gradient


@pytest.mark.parametrize("fault", ["upstream", "gradient", "loss"])
def test_a_wrong_loss_op_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(hidden: Tensor, weight: Tensor, targets: Tensor, **options: object) -> HeadLoss:
        hidden = LosesHalfAChunk.apply(hidden) if fault == "gradient" else hidden
        result = linear_cross_entropy(hidden, weight, targets, **options)
        if fault == "upstream":
            return result._replace(loss=IgnoresUpstream.apply(result.loss))
        return result._replace(loss=result.loss + (1e-4 if fault == "loss" else 0))

    monkeypatch.setattr(doctor, "linear_cross_entropy", broken)
    with pytest.raises(SystemExit) as caught:
        doctor.run()
    assert caught.value.code == 1
    assert "FAILED" in capsys.readouterr().out


def test_bf16_is_held_to_bf16s_own_error() -> None:
    for check in doctor.self_test(torch.device("cpu"), torch.bfloat16):
        assert check.passed
        assert 1e-6 < check.reference_error < 0.05
