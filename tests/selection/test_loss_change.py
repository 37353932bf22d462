"""The estimators of dL against explicit per-sample gradient matrices, built with autograd a sample at a time.

H hidden, V vocabulary, B slots, R rows of a micro-batch; the last slot is always empty and the last rows are padding.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from lead_engine.selection.loss_change import KEEP, make_loss_change
from lead_engine.selection.step_gradient import SketchGradient
from lead_kernels import HeadLoss, linear_cross_entropy

H, V, B, R, Q = 12, 19, 4, 24, 5
FORMS = ["sketch", "exact"]


class MicroBatch(NamedTuple):
    hidden: Tensor  # [R, H]
    targets: Tensor  # int64 [R]
    slots: Tensor  # int64 [R]


def micro_batch(seed: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (B - 1,), generator=generator)
    slots = torch.repeat_interleave(torch.arange(B - 1), lengths)
    targets = torch.randint(0, V, (len(slots),), generator=generator)
    hidden = F.rms_norm(torch.randn(R, H, generator=generator), (H,))
    return MicroBatch(
        hidden, F.pad(targets, (0, R - len(slots)), value=-100), F.pad(slots, (0, R - len(slots)), value=B - 1)
    )


def head_weight(seed: int = 0) -> Tensor:
    return torch.randn(V, H, generator=torch.Generator().manual_seed(seed)) / H**0.5


def tokens(batches: list[MicroBatch]) -> int:
    return max(1, sum(int((b.targets >= 0).sum()) for b in batches))


def sample_weights(batches: list[MicroBatch], step: list[MicroBatch] | None = None) -> list[Tensor]:
    """w_i = n_i / response tokens of the step, [B] of every micro-batch."""
    return [torch.bincount(b.slots[b.targets >= 0], minlength=B).float() / tokens(step or batches) for b in batches]


def sample_gradients(batch: MicroBatch, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """m_i [B, H, H]: gradient of the sample's mean loss for a matrix put between hidden state and head, at identity."""
    result = torch.zeros(B, H, H, dtype=dtype)
    for i in range(B):
        rows = (batch.slots == i) & (batch.targets >= 0)
        if rows.any():
            between = torch.eye(H, dtype=dtype, requires_grad=True)
            logits = batch.hidden[rows].to(dtype) @ between.T @ weight.to(dtype).T
            (result[i],) = torch.autograd.grad(F.cross_entropy(logits, batch.targets[rows]), between)
    return result


def reference(estimator, batches, weight, dtype):
    """(G [D], s [A, B]) from explicit matrices, in the estimator's form."""
    m = torch.stack([sample_gradients(b, weight, dtype) for b in batches])
    if estimator.signature is not None:
        left, right = (part.to(dtype) for part in estimator.signature)
        m = left.T @ m @ right
    m, w = m.flatten(2), torch.stack(sample_weights(batches)).to(dtype)
    step = (w[..., None] * m).sum((0, 1))
    return step, m @ step


def collect(estimator, batches, weight, step=None):
    """Run the real head over one rank's micro-batches, as the training loop does; `step`: those of all ranks."""
    for batch, w in zip(batches, sample_weights(batches, step), strict=True):
        hidden = batch.hidden.clone().requires_grad_()
        result = head(hidden, weight, batch, estimator, tokens(step or batches))
        result.loss.backward()
        estimator.collect(result, w, hidden.detach(), hidden.grad, batch.slots)


def head(hidden, weight, batch, estimator, denominator) -> HeadLoss:
    return linear_cross_entropy(
        hidden,
        weight,
        batch.targets,
        sample_ids=batch.slots,
        num_samples=B,
        token_weight=1 / denominator,
        signature=estimator.signature,
    )


def alone(tensor: Tensor) -> None:
    """all_reduce of a single rank."""


def close(ours: Tensor, exact: Tensor, rounded: Tensor) -> None:
    """Our error is at most a few times that of the explicit matrices in fp32."""
    floor = 8 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert float((ours.double() - exact).abs().max()) <= 4 * float((rounded.double() - exact).abs().max()) + floor


def make(change="inner", form="sketch", clusters=3, device="cpu", every=3, seed=0):
    sketch_dim = 0 if form == "exact" else Q
    return make_loss_change(change, H, clusters, device, seed, sketch_dim=sketch_dim, calibrate_every=every)


ARM = torch.tensor(0)
NORM = torch.tensor(1.7)  # of the whole gradient


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_inner_equals_explicit_gradients(form, accumulation):
    estimator, weight = make(form=form), head_weight()
    batches = [micro_batch(i) for i in range(accumulation)]
    collect(estimator, batches, weight)
    change = estimator.estimate(ARM, 0.1, alone, torch.tensor(-0.3), NORM)
    assert change.shape == (accumulation, B)

    def expected(dtype):
        step, s = reference(estimator, batches, weight, dtype)
        return -0.3 * s / (step @ step)

    exact = expected(torch.float64)
    assert exact[:, :-1].abs().min() > 0
    close(change, exact, expected(torch.float32))
    assert change[:, -1].tolist() == [0] * accumulation
    mean = (torch.stack(sample_weights(batches)) * change).sum()
    assert float(mean) == pytest.approx(-0.3, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weighted_mean_is_the_first_order_change_of_a_real_step(form, optimizer):
    """Norm and head behind a trained layer, any optimizer: sum_i w_i dL_i = <G, dtheta> on a calibrated step."""
    torch.manual_seed(0)
    batches = [micro_batch(i) for i in range(2)]
    layer, norm, last = torch.nn.Linear(H, H), torch.nn.RMSNorm(H), torch.nn.Linear(H, V, bias=False)
    parameters = [*layer.parameters(), *norm.parameters(), *last.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.1) if optimizer == "sgd" else torch.optim.AdamW(parameters, 1e-3)
    estimator, weights = make(form=form, every=1), sample_weights(batches)
    for step in range(4):
        assert estimator.wants_first_order(step)
        optimizer.zero_grad()
        for batch, w in zip(batches, weights, strict=True):
            hidden = norm(layer(batch.hidden))
            hidden.retain_grad()
            result = head(hidden, last.weight, batch, estimator, tokens(batches))
            result.loss.backward()
            estimator.collect(result, w, hidden, hidden.grad, batch.slots)
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        first_order = sum(((p.detach() - b) * p.grad).sum() for p, b in zip(parameters, before, strict=True))
        change = estimator.estimate(ARM, optimizer.param_groups[0]["lr"], alone, first_order, NORM)
        assert float(first_order) < 0
        assert float((torch.stack(weights) * change).sum()) == pytest.approx(float(first_order), rel=1e-5)


def test_exact_form_predicts_each_loss_where_the_last_layer_is_all_there_is():
    """Only a matrix between hidden state and head is trained, by SGD: dL_i is each loss's true derivative."""
    batches, weight, lr = [micro_batch(i) for i in range(2)], head_weight(), 1e-5
    w = torch.stack(sample_weights(batches)).double()
    m = torch.stack([sample_gradients(b, weight, torch.float64) for b in batches])
    step = -lr * (w[..., None, None] * m).sum((0, 1))

    def sample_loss(batch, i, between):
        rows = (batch.slots == i) & (batch.targets >= 0)
        return F.cross_entropy(batch.hidden[rows].double() @ between.T @ weight.double().T, batch.targets[rows])

    eye = torch.eye(H, dtype=torch.float64)
    seen = torch.tensor(
        [[float(sample_loss(b, i, eye + step) - sample_loss(b, i, eye)) for i in range(B - 1)] for b in batches]
    )
    estimator = make(form="exact")
    collect(estimator, batches, weight)
    change = estimator.estimate(ARM, lr, alone, -(step.square().sum() / lr).float(), NORM)
    torch.testing.assert_close(change[:, :-1], seen, rtol=1e-3, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_between_measurements_the_calibration_is_a_bias_corrected_mean(form):
    estimator, weight, ratios = make(form=form, every=3), head_weight(), []
    for step in range(11):
        lr, batches, norm = 0.1 / (1 + step), [micro_batch(100 + step)], torch.tensor(0.3 + step)
        collect(estimator, batches, weight)
        assert estimator.wants_first_order(step) == (step % 3 == 0)
        measured = torch.tensor(-0.05 * (1 + step % 4)) if step % 3 == 0 else None
        change = estimator.estimate(ARM, lr, alone, measured, norm)

        def expected(dtype, ratios, estimator=estimator, batches=batches, lr=lr, measured=measured, norm=norm):
            gradient, s = reference(estimator, batches, weight, dtype)
            if measured is not None:
                ratios = [*ratios, measured.to(dtype) / (lr * norm.to(dtype))]
                first_order = measured.to(dtype)
            else:
                parts = torch.tensor([KEEP**age for age in range(len(ratios))], dtype=dtype).flip(0)
                first_order = lr * norm.to(dtype) * (parts * torch.stack(ratios)).sum() / parts.sum()
            return first_order / (gradient @ gradient) * s, ratios

        exact, ratios_after = expected(torch.float64, ratios)
        rounded, _ = expected(torch.float32, [r.float() for r in ratios])
        close(change, exact, rounded)
        ratios = ratios_after


def test_a_measurement_is_wanted_until_there_is_one():
    """Step 0 of a warm-up has lr 0: no update, nothing to measure, no change; the next step is measured instead."""
    estimator, weight = make(every=8), head_weight()
    for step, (lr, measured) in enumerate([(0.0, torch.tensor(0.0)), (0.1, None)]):
        assert estimator.wants_first_order(step)
        collect(estimator, [micro_batch(step)], weight)
        assert not estimator.estimate(ARM, lr, alone, measured, NORM).any()
    collect(estimator, [micro_batch(2)], weight)
    assert estimator.estimate(ARM, 0.1, alone, torch.tensor(-1.0), NORM).any()
    assert [step for step in range(3, 20) if estimator.wants_first_order(step)] == [8, 16]


def empty_batch() -> MicroBatch:
    return micro_batch(0)._replace(targets=torch.full((R,), -100))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["inner", "paper"])
def test_an_empty_step_measures_nothing(change, form):
    """A step that the budget has cut away changes nothing, and dL stays finite."""
    estimator, weight = make(change, form), head_weight()
    collect(estimator, [micro_batch(0)], weight)
    estimator.estimate(ARM, 0.1, alone, torch.tensor(-1.0), NORM)
    before = {name: value.clone() for name, value in estimator.state_dict().items()}
    collect(estimator, [empty_batch()], weight)
    assert not estimator.estimate(ARM, 0.1, alone, torch.tensor(0.0), NORM).any()
    assert all(torch.equal(before[name], value) for name, value in estimator.state_dict().items())
    if change == "paper":
        estimator.finish_round(ARM)
        once = {name: value.clone() for name, value in estimator.state_dict().items()}
        assert once["last"].any()
        collect(estimator, [empty_batch()], weight)
        estimator.estimate(ARM, 0.1, alone, None, NORM)
        estimator.finish_round(torch.tensor(1))
        assert all(torch.equal(once[name], value) for name, value in estimator.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["inner", "paper"])
def test_two_ranks_equal_one(change, form):
    """Four micro-batches on one rank, and two each on two ranks that reduce through a barrier: the same changes."""
    weight, barrier, shared = head_weight(), threading.Barrier(2), [None, None]
    arms = [torch.tensor(k) for k in (0, 1, 0, 2, 0)]

    def rounds(estimator, mine, all_reduce):
        changes = []
        for round, arm in enumerate(arms):
            for step in range(2):
                batches = [micro_batch(1000 * round + 10 * step + i) for i in range(4)]
                collect(estimator, batches[mine], weight, batches)
                changes.append(
                    estimator.estimate(arm, 0.1, all_reduce, torch.tensor(-0.5) if step == 0 else None, NORM)
                )
            estimator.finish_round(arm)
        return torch.stack(changes), estimator.state_dict()

    def rank(r):
        def all_reduce(tensor):
            shared[r] = tensor.clone()
            barrier.wait(30)
            tensor.copy_(shared[0] + shared[1])
            barrier.wait(30)

        return rounds(make(change, form), slice(2 * r, 2 * r + 2), all_reduce)

    one, state = rounds(make(change, form), slice(0, 4), alone)
    with ThreadPoolExecutor(2) as pool:
        (first, state0), (second, state1) = pool.map(rank, range(2))
    assert one[1:].abs().max() > 0
    torch.testing.assert_close(torch.cat([first, second], 1), one, rtol=2e-5, atol=1e-6 * float(one.abs().max()))
    assert all(torch.equal(state0[name], state1[name]) for name in state)  # ranks stay bit-identical


def literal_paper(own, last, lr):
    """DESIGN's formula as it stands; own is None on a first visit, last is None in the first round."""
    if last is None:
        return 0.0
    if own is None:
        return -lr * float(last @ last)
    delta_k, delta_prev, c = float(own @ own), float(last @ last), float(own @ last)
    if delta_k + delta_prev - 2 * c <= 1e-12 * delta_k:  # the same gradient: every beta gives its squared norm
        return -lr * delta_k
    beta = min(max((delta_prev - c) / (delta_k + delta_prev - 2 * c), 0.0), 1.0)
    return -lr * (beta**2 * delta_k + (1 - beta) ** 2 * delta_prev + 2 * beta * (1 - beta) * c)


@pytest.mark.parametrize("form", FORMS)
def test_paper_equals_its_formula(form):
    """Rounds of one to three steps; clusters that repeat at once, after a while, and for the first time."""
    estimator, weight = make("paper", form), head_weight()
    own, last, kinds = {}, None, set()
    for round, arm in enumerate([1, 1, 0, 1, 0, 2, 2, 1, 0, 0, 2]):
        weight, steps = weight * 0.8 + 0.2 * head_weight(round), []
        for step in range(1 + round % 3):
            batches = [micro_batch(50 * round + 10 * step + i) for i in range(2)]
            collect(estimator, batches, weight)
            change = estimator.estimate(torch.tensor(arm), 0.1 + round, alone, None, NORM)
            expected = literal_paper(own.get(arm), last, 0.1 + round)
            used = torch.stack(sample_weights(batches)) > 0
            assert change[~used].abs().max() == 0
            assert change[used].unique().numel() == 1
            assert float(change[0, 0]) == pytest.approx(expected, rel=1e-4)
            steps.append(reference(estimator, batches, weight, torch.float64)[0])
            kinds.add(
                "none" if last is None else "first" if arm not in own else "same" if own[arm] is last else "mixed"
            )
        estimator.finish_round(torch.tensor(arm))
        own[arm] = last = torch.stack(steps).mean(0)
    assert kinds == {"none", "first", "same", "mixed"}


def test_none_is_zero():
    estimator = make("none")
    collect(estimator, [micro_batch(0), micro_batch(1)], head_weight())
    change = estimator.estimate(ARM, 0.1, alone, None, NORM)
    assert change.shape == (2, B)
    assert not change.any()
    assert not any(estimator.wants_first_order(step) for step in range(20))
    assert estimator.signature is None
    assert not estimator.wants_hidden
    assert estimator.state_dict() == {}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["inner", "paper"])
def test_restored_estimator_goes_on_alike(change, form):
    """State taken in the middle of a round."""
    first, second, weight = make(change, form), make(change, form), head_weight()

    def go_on(estimator, rounds):
        changes, wanted = [], []
        for round in rounds:
            for step in range(2):
                collect(estimator, [micro_batch(10 * round + step)], weight)
                wanted.append(estimator.wants_first_order(2 * round + step))
                measured = torch.tensor(-1.0 / (1 + round)) if wanted[-1] else None
                changes.append(estimator.estimate(torch.tensor(round % 3), 0.1, alone, measured, NORM))
            estimator.finish_round(torch.tensor(round % 3))
        return torch.stack(changes), wanted

    go_on(first, range(4))
    collect(first, [micro_batch(7)], weight)
    first.estimate(torch.tensor(1), 0.1, alone, None, NORM)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    (ours, wanted), (theirs, wanted_too) = go_on(first, range(4, 8)), go_on(second, range(4, 8))
    assert torch.equal(ours, theirs)
    assert wanted == wanted_too


def test_sketches_are_unbiased_and_the_same_for_the_same_seed():
    """<P^T m Q, P^T m' Q> over many seeds has mean <m, m'>."""
    m = sample_gradients(micro_batch(0), head_weight(), torch.float32)[:2]
    products = []
    for seed in range(2000):
        left, right = SketchGradient(H, Q, torch.device("cpu"), seed).signature
        phi = (left.T @ m @ right).flatten(1)
        products.append(phi @ phi.T)
    products, exact = torch.stack(products), m.flatten(1) @ m.flatten(1).T
    error = products.std(0) / len(products) ** 0.5
    assert ((products.mean(0) - exact).abs() < 4 * error).all()
    again = SketchGradient(H, Q, torch.device("cpu"), 1999).signature
    assert torch.equal(left, again[0])
    assert torch.equal(right, again[1])
    assert not torch.equal(left, right)


@pytest.mark.parametrize("form", FORMS)
def test_missing_inputs_are_refused(form):
    estimator = make(form=form)
    result = HeadLoss(torch.zeros(()), torch.zeros(R), torch.zeros(B), torch.zeros(B, dtype=torch.int64), None)
    with pytest.raises(ValueError, match="signature" if form == "sketch" else "hidden_grad"):
        estimator.collect(result, torch.zeros(B))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["inner", "paper", "none"])
def test_estimates_never_look_at_the_device(blind, change, form):
    estimator = make(change, form)
    with blind.mode():
        blind.convert(estimator)
        device = blind.device
        arm, w = torch.zeros((), dtype=torch.int64, device=device), torch.ones(B, device=device)
        hidden, slots = torch.ones(R, H, device=device), torch.zeros(R, dtype=torch.int64, device=device)
        for round in range(2):
            for step in range(3):
                for _ in range(2):
                    counts = torch.ones(B, dtype=torch.int64, device=device)
                    result = HeadLoss(w.sum(), hidden.sum(1), w, counts, torch.ones(B, Q, Q, device=device))
                    estimator.collect(result, w, hidden, hidden, slots)
                measured = w.sum() if estimator.wants_first_order(3 * round + step) else None
                estimate = estimator.estimate(arm, 0.1, lambda tensor: tensor.mul_(2), measured, w.sum())
                assert estimate.shape == (2, B)
                assert estimate.device.type == device
            estimator.finish_round(arm)
        assert all(value.device.type == device for value in estimator.state_dict().values())
        with pytest.raises((DataDependentOutputException, RuntimeError)):
            estimate.sum().item()  # so that the test can fail


@pytest.mark.parametrize("own_scale", [0.5, 3.0])
@pytest.mark.parametrize("tilt", [0.0, 0.2])
def test_paper_takes_the_shorter_gradient_where_both_point_one_way(own_scale, tilt):
    """g_k almost along g: the shortest combination is an end of the segment, beta is clamped."""
    generator = torch.Generator().manual_seed(0)
    last, other = torch.randn(2, Q * Q, generator=generator)
    own = own_scale * (last + tilt * other)
    estimator = make("paper")
    estimator.load_state_dict(
        {
            **estimator.state_dict(),
            "by_cluster": torch.stack([torch.zeros(Q * Q), own, torch.zeros(Q * Q)]),
            "visited": torch.tensor([False, True, False]),
            "last": last,
        }
    )
    collect(estimator, [micro_batch(0)], head_weight())
    change = estimator.estimate(torch.tensor(1), 0.1, alone, None, NORM)
    shorter = min(own.double().square().sum(), last.double().square().sum())
    assert literal_paper(own.double(), last.double(), 0.1) == pytest.approx(-0.1 * float(shorter))
    assert float(change[0, 0]) == pytest.approx(-0.1 * float(shorter), rel=1e-5)
