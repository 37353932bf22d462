"""The utility update: the formula, visits, dummies."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lead_kernels import idu_update, reference

module = importlib.import_module("lead_kernels.idu_update")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few samples then take several programs."""
    monkeypatch.setattr(module, "BLOCK", 4)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_agrees_with_reference_and_leaves_the_rest_alone(form: str, data: st.DataObject) -> None:
    samples, slots = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 20))
    smoothing = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.999]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    ids = torch.full((2, slots), samples)  # dummies between the samples, and no sample twice
    chosen = torch.randperm(samples, generator=g)[: data.draw(st.integers(0, min(samples, 2 * slots)))]
    ids.view(-1)[torch.randperm(2 * slots, generator=g)[: len(chosen)]] = chosen
    utility, visits = torch.randn(samples + 1, generator=g), torch.arange(samples + 1, dtype=torch.int32)
    loss, change = torch.randn(2, slots, generator=g), torch.randn(2, slots, generator=g)
    exact, exact_visits, plain = utility.double(), visits.clone(), utility.clone()
    reference.idu_update(exact, exact_visits, ids, loss.double(), change.double(), smoothing)
    reference.idu_update(plain, visits.clone(), ids, loss, change, smoothing)  # the same arithmetic, sample by sample

    before = utility.clone()
    idu_update(utility, visits, ids, loss, change, smoothing)
    assert (utility - exact).abs().max() <= 1.2 * (plain - exact).abs().max() + torch.finfo(torch.float32).eps
    assert torch.equal(visits, exact_visits)
    untouched = torch.ones(samples + 1, dtype=torch.bool).index_fill_(0, chosen, False)
    assert torch.equal(utility[untouched], before[untouched])


def test_both_forms_agree_in_every_bit(form: str) -> None:
    """Otherwise two ranks, or a resumed run on another device, could order two samples differently."""
    g = torch.Generator().manual_seed(1)
    utility, visits, ids = (
        torch.randn(101, generator=g),
        torch.zeros(101, dtype=torch.int32),
        torch.randperm(100, generator=g),
    )
    loss, change = torch.randn(100, generator=g).bfloat16(), torch.randn(100, generator=g)
    want = utility.clone()
    want[ids] = 0.9 * (loss.float() + change) + 0.1 * utility[ids]
    idu_update(utility, visits, ids, loss, change, 0.1)
    assert torch.equal(utility, want)
    assert module.NO_FUSION == {"enable_fp_fusion": False}  # what makes it so on a GPU


def test_dummies_do_nothing_whatever_they_carry(form: str) -> None:
    utility, visits = torch.ones(4), torch.zeros(4, dtype=torch.int32)
    idu_update(utility, visits, torch.full((3,), 3), torch.tensor([torch.nan, torch.inf, 2.0]), torch.zeros(3), 0.5)
    assert utility.tolist() == [1.0] * 4
    assert visits.tolist() == [0] * 4


def test_smoothing_keeps_a_share_of_the_old_value(form: str) -> None:
    utility, visits = torch.tensor([2.0, 0.0]), torch.zeros(2, dtype=torch.int32)
    idu_update(utility, visits, torch.tensor([0]), torch.tensor([1.0]), torch.tensor([-0.5]), 0.1)
    assert utility[0].item() == pytest.approx(0.9 * 0.5 + 0.1 * 2.0)
    assert visits.tolist() == [1, 0]


def test_no_samples_and_strides(form: str) -> None:
    utility, visits = torch.ones(4), torch.zeros(4, dtype=torch.int32)
    none = torch.zeros(0)
    idu_update(utility, visits, none.long(), none, none, 0.5)
    assert visits.tolist() == [0] * 4
    idu_update(
        utility,
        visits,
        torch.tensor([0, 1, 2, 3])[::2],
        torch.tensor([3.0, 4.0, 5.0, 6.0])[::2],
        torch.zeros(1).expand(2),
        0.0,
    )
    assert utility.tolist() == [3.0, 1.0, 5.0, 1.0]
    assert visits.tolist() == [1, 0, 1, 0]


@pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET"), reason="CPU tensors reach the kernels in Triton's interpreter only"
)
def test_the_kernels_path_reads_nothing(no_host_reads: type) -> None:
    utility, visits = torch.ones(9), torch.zeros(9, dtype=torch.int32)
    with no_host_reads():
        module._on_gpu(utility, visits, torch.tensor([3, 8, 5, 0, 1]), torch.zeros(5), torch.zeros(5), 0.5)
    assert visits.tolist() == [1, 1, 0, 1, 0, 1, 0, 0, 0]
    assert utility.tolist() == [0.5, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0, 1.0, 1.0]


def test_without_data(blind_host: Callable[[], Any]) -> None:
    with blind_host() as device:
        utility, visits = torch.empty(9, device=device), torch.empty(9, device=device, dtype=torch.int32)
        ids, loss = torch.empty(2, 3, device=device, dtype=torch.int64), torch.empty(2, 3, device=device)
        idu_update(utility, visits, ids, loss, loss, 0.5)


def test_under_torch_compile(form: str) -> None:
    """A graph sees that the operator changes its arguments: U is read before and after it."""

    def step(utility: torch.Tensor, visits: torch.Tensor, ids: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        before = utility.clone()
        idu_update(utility, visits, ids, loss * 2, loss, 0.5)
        return utility - before

    states = [(torch.ones(6), torch.zeros(6, dtype=torch.int32)) for _ in range(2)]
    ids, loss = torch.tensor([1, 5, 4]), torch.tensor([1.0, 2.0, 3.0])
    fall = [
        f(*state, ids, loss)
        for f, state in zip((step, torch.compile(step, fullgraph=True, backend="aot_eager")), states, strict=True)
    ]
    assert torch.equal(fall[0], torch.tensor([0.0, 1.0, 0.0, 0.0, 4.0, 0.0]))
    assert torch.equal(fall[0], fall[1])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_as_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    g = torch.Generator().manual_seed(0)
    ids = torch.randperm(10_000, generator=g)[:3001]
    utility, visits = torch.randn(10_001, generator=g), torch.zeros(10_001, dtype=torch.int32)
    loss, change = torch.randn(3001, generator=g), torch.randn(3001, generator=g)
    on_gpu = [x.cuda() for x in (utility, visits)]
    idu_update(*on_gpu, ids.cuda(), loss.cuda(), change.cuda(), 0.1)
    idu_update(utility, visits, ids, loss, change, 0.1)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu, (utility, visits), strict=True))


def test_refusals() -> None:
    utility, visits, ids, one = torch.ones(3), torch.zeros(3, dtype=torch.int32), torch.tensor([0]), torch.ones(1)
    with pytest.raises(ValueError, match="visits"):
        idu_update(utility, visits.long(), ids, one, one, 0.1)
    with pytest.raises(ValueError, match="loss has shape"):
        idu_update(utility, visits, ids, torch.ones(2), one, 0.1)
    with pytest.raises(ValueError, match=r"change is torch\.float64"):
        idu_update(utility, visits, ids, one, one.double(), 0.1)
    with pytest.raises(ValueError, match="contiguous"):
        idu_update(torch.ones(6)[::2], visits, ids, one, one, 0.1)
