"""The head's gradients: known weights, upstream gradients at rows and samples, adapters, a bound on the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lead_kernels import Lora, backend, linear_cross_entropy, row_pass
from lead_kernels.counted_rows import CountedRows

pytestmark = pytest.mark.slow

T, H, V, B, R = 41, 12, 150, 5, 3
IDS = torch.repeat_interleave(torch.arange(B), torch.tensor([10, 0, 1, 25, 5]))
CHUNK = 8 * V * 16
PARTS = ("hidden", "weight", "bias", "lora_a", "lora_b")
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "all": {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 0.6},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of columns a row, the last one partly filled."""
    monkeypatch.setattr(row_pass, "_launch_shape", lambda vocabulary, simple: (64, 64))


def make_case(seed: int = 0, dtype: torch.dtype = torch.float64, ignored: float = 0.3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (T,), generator=g)
    targets[torch.rand(T, generator=g) < ignored] = -100
    shapes = {"hidden": (T, H), "weight": (V, H), "bias": (V,), "lora_a": (R, H), "lora_b": (V, R)}
    leaves = {
        name: (0.6 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype) for name, shape in shapes.items()
    }
    return {**leaves, "targets": targets}


def leaves_of(case: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: case[name].detach().clone().requires_grad_() for name in PARTS}


def dense(
    leaves: dict[str, Tensor], targets: Tensor, lora_scale: float, options: dict[str, float]
) -> dict[str, Tensor]:
    """The same by plain autograd, with all logits at once."""
    kept = targets >= 0
    z = leaves["hidden"] @ (leaves["weight"] + lora_scale * leaves["lora_b"] @ leaves["lora_a"]).t() + leaves["bias"]
    z = z * options.get("logit_scale", 1.0)
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    lse = z.logsumexp(-1)
    nll = torch.where(kept, lse - z.gather(1, targets.clamp(min=0)[:, None]).squeeze(1), 0.0)
    s = options.get("label_smoothing", 0.0)
    objective = torch.where(kept, (1 - s) * nll + s * (lse - z.mean(-1)) + options.get("z_loss", 0.0) * lse**2, 0.0)
    sums = torch.zeros(B, dtype=nll.dtype).index_add(0, IDS, nll)
    counts = torch.zeros(B, dtype=nll.dtype).index_add(0, IDS, kept.to(nll.dtype))
    return {"objective": objective, "token_nll": nll, "sample_nll": sums / counts.clamp(min=1)}


def combine(loss: Tensor, token_nll: Tensor, sample_nll: Tensor, upstream: str) -> Tensor:
    """What a trainer might do with the three outputs: a loss that is not linear in the rows."""
    g = torch.Generator().manual_seed(9)
    parts = {
        "loss": -2.5 * loss,
        "token": (torch.randn(T, generator=g, dtype=torch.float64).to(token_nll.dtype) * token_nll).sum(),
        "sample": (sample_nll**2).sum(),
    }
    return sum(parts[name] for name in upstream.split("+"))  # type: ignore[return-value]


@pytest.mark.parametrize("upstream", ["loss", "token", "sample", "loss+token", "loss+token+sample"])
@pytest.mark.parametrize("gradients", ["auto", "recompute"])
@pytest.mark.parametrize("options", OPTIONS)
def test_any_upstream_gradient(form: str, options: str, gradients: Any, upstream: str) -> None:
    case, weights = make_case(), torch.rand(T, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours, theirs = leaves_of(case), leaves_of(case)
    out = linear_cross_entropy(
        ours["hidden"],
        ours["weight"],
        case["targets"],
        sample_ids=IDS,
        num_samples=B,
        bias=ours["bias"],
        token_weight=weights,
        lora=Lora(ours["lora_a"], ours["lora_b"], 0.7),
        gradients=gradients,
        chunk_bytes=CHUNK,
        **OPTIONS[options],
    )
    expected = dense(theirs, case["targets"], 0.7, OPTIONS[options])
    combine(out.loss, out.token_nll, out.sample_nll, upstream).backward()
    combine((weights * expected["objective"]).sum(), expected["token_nll"], expected["sample_nll"], upstream).backward()
    for name in PARTS:
        torch.testing.assert_close(
            ours[name].grad, theirs[name].grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_forward_mode_leaves_rows_without_a_gradient_and_keeps_no_hidden() -> None:
    case = make_case()
    leaves = leaves_of(case)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = linear_cross_entropy(
            leaves["hidden"], leaves["weight"], case["targets"], sample_ids=IDS, num_samples=B, gradients="forward"
        )
    assert out.loss.requires_grad
    assert not out.token_nll.requires_grad
    assert not out.sample_nll.requires_grad
    assert not any(x.data_ptr() in (leaves["hidden"].data_ptr(), leaves["weight"].data_ptr()) for x in saved)


@pytest.mark.parametrize(("gradients", "products"), [("forward", 3), ("auto", 3), ("recompute", 4)])
def test_products_of_a_step(recorder: Any, gradients: Any, products: int) -> None:
    case = make_case(ignored=0.0)
    leaves = leaves_of(case)
    with recorder() as record:
        linear_cross_entropy(
            leaves["hidden"],
            leaves["weight"],
            case["targets"],
            sample_ids=IDS,
            num_samples=B,
            gradients=gradients,
            chunk_bytes=2**30,
        ).loss.backward()
    assert len(record.products()) == products


def test_a_frozen_head_with_an_adapter_has_two_large_products(recorder: Any) -> None:
    case = make_case(ignored=0.0)
    leaves = leaves_of(case)
    with recorder() as record:
        linear_cross_entropy(
            leaves["hidden"],
            case["weight"],
            case["targets"],
            sample_ids=IDS,
            num_samples=B,
            chunk_bytes=2**30,
            lora=Lora(leaves["lora_a"], leaves["lora_b"], 0.7),
            gradients="forward",
        ).loss.backward()
    large = [shapes for shapes in record.products() if min(min(x) for x in shapes) > R]
    assert len(large) == 2
    assert leaves["lora_a"].grad is not None
    assert leaves["lora_b"].grad is not None


@pytest.mark.parametrize("trained", ["lora_a", "lora_b"])
def test_half_an_adapter_can_be_frozen(form: str, trained: str) -> None:
    case = make_case()
    leaves = {name: case[name].clone().requires_grad_(name == trained) for name in PARTS}
    for gradients in ("auto", "recompute"):
        leaves[trained].grad = None
        linear_cross_entropy(
            leaves["hidden"],
            leaves["weight"],
            case["targets"],
            sample_ids=IDS,
            num_samples=B,
            bias=leaves["bias"],
            lora=Lora(leaves["lora_a"], leaves["lora_b"], 0.7),
            gradients=gradients,
        ).loss.backward()  # type: ignore[arg-type]
        other = {name: case[name].clone().requires_grad_(name == trained) for name in PARTS}
        counted = (case["targets"] >= 0).sum()
        (dense(other, case["targets"], 0.7, {})["objective"].sum() / counted).backward()
        torch.testing.assert_close(leaves[trained].grad, other[trained].grad)
        assert all(leaves[name].grad is None for name in PARTS if name != trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradients", ["forward", "recompute"])
def test_error_with_an_adapter_is_that_of_unfused_pytorch(form: str, gradients: Any, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, ignored=0.0)

    def unfused(kind: torch.dtype) -> dict[str, Tensor]:
        x = {name: case[name].to(kind).requires_grad_() for name in PARTS}
        z = (
            F.linear(x["hidden"], x["weight"], x["bias"])
            + F.linear(F.linear(x["hidden"], x["lora_a"]), x["lora_b"]) * 0.5
        )
        nll = F.cross_entropy(z.to(torch.promote_types(kind, torch.float32)), case["targets"], reduction="none")
        nll.mean().backward()
        return {"token_nll": nll.detach(), **{name: x[name].grad for name in PARTS}}

    leaves = leaves_of(case)
    out = linear_cross_entropy(
        leaves["hidden"],
        leaves["weight"],
        case["targets"],
        sample_ids=IDS,
        num_samples=B,
        bias=leaves["bias"],
        gradients=gradients,
        lora=Lora(leaves["lora_a"], leaves["lora_b"], 0.5),
        chunk_bytes=CHUNK,
    )
    out.loss.backward()
    mine = {"token_nll": out.token_nll.detach(), **{name: leaves[name].grad for name in PARTS}}
    exact, theirs = unfused(torch.float64), unfused(dtype)
    for name, value in mine.items():
        error, bound = (float((x.double() - exact[name]).norm() / exact[name].norm()) for x in (value, theirs[name]))
        assert error <= 1.2 * bound + 2e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_logits_are_more_exact(form: str, dtype: torch.dtype) -> None:
    """The gradient, half as wide as the logits, is written over them; the loss is then as exact as fp32 arithmetic."""
    case = make_case(dtype=dtype)
    exact = dense({name: case[name].double() for name in PARTS}, case["targets"], 0.0, {})["token_nll"]
    errors = {}
    for logits_dtype in (None, torch.float32):
        leaves = leaves_of(case)
        out = linear_cross_entropy(
            leaves["hidden"],
            leaves["weight"],
            case["targets"],
            sample_ids=IDS,
            num_samples=B,
            bias=leaves["bias"],
            chunk_bytes=CHUNK,
            logits_dtype=logits_dtype,
        )
        out.loss.backward()
        errors[logits_dtype] = float((out.token_nll.detach().double() - exact).norm() / exact.norm())
        reference = {name: case[name].double().requires_grad_() for name in PARTS}
        count = (case["targets"] >= 0).sum()
        (dense(reference, case["targets"], 0.0, {})["objective"].sum() / count).backward()
        for name in ("hidden", "weight", "bias"):
            difference = (leaves[name].grad.double() - reference[name].grad).norm() / reference[name].grad.norm()
            assert float(difference) < torch.finfo(dtype).eps, name
    assert errors[torch.float32] < 1e-6 < errors[None]


def test_recomputed_fp16_gradients_do_not_underflow() -> None:
    """Weights of 1e-7 times probabilities of 1e-2 are below fp16; the gradient, times a loss scale of 2^16, is not."""
    case = make_case(dtype=torch.float16, ignored=0.0)
    grads = []
    for factor in (1.0, 1e-7):
        hidden = case["hidden"].clone().requires_grad_()
        out = linear_cross_entropy(
            hidden, case["weight"], case["targets"], sample_ids=IDS, num_samples=B, gradients="recompute"
        )
        scale = 2.0**16 if factor < 1 else 1.0
        (out.token_nll.sum() * factor * scale).backward()
        grads.append(hidden.grad.double() / scale / factor)
    torch.testing.assert_close(grads[0], grads[1], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("extra", [0, 3, 100])
def test_a_bound_on_the_rows_needs_no_look_at_the_device(
    monkeypatch: pytest.MonkeyPatch, no_host_reads: Any, extra: int
) -> None:
    case = make_case()
    counted = int((case["targets"] >= 0).sum())
    left, right = torch.randn(H, 4, dtype=torch.float64), torch.randn(H, 4, dtype=torch.float64)
    results = []
    for kernels in (False, True):
        monkeypatch.setattr(backend, "_kernels_on_cpu", kernels)
        leaves = leaves_of(case)
        leaves["hidden"].data[case["targets"] < 0] = torch.nan  # padding may hold anything

        def step(leaves: dict[str, Tensor] = leaves) -> Any:
            out = linear_cross_entropy(
                leaves["hidden"],
                leaves["weight"],
                case["targets"],
                sample_ids=IDS,
                num_samples=B,
                bias=leaves["bias"],
                signature=(left, right),
                chunk_bytes=CHUNK,
                max_rows=counted + extra,
                token_weight=torch.linspace(0, 1, T).double(),
            )
            (out.loss + out.sample_nll.square().sum()).backward()
            return out

        if kernels:
            with no_host_reads():
                out = step()
        else:
            out = step()
        results.append([*out[:5], *(leaves[name].grad for name in ("hidden", "weight", "bias"))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_without_a_bound_a_device_is_read_once(monkeypatch: pytest.MonkeyPatch, recorder: Any) -> None:
    monkeypatch.setattr(backend, "_kernels_on_cpu", True)
    case = make_case()
    with recorder() as record:
        linear_cross_entropy(case["hidden"], case["weight"], case["targets"], sample_ids=IDS, num_samples=B)
    assert sum(name in ("item", "_local_scalar_dense") for name, _ in record.calls) == 1
    counted = int((case["targets"] >= 0).sum())
    assert all(counted in (*shapes[0], *shapes[1]) for shapes in record.products())


def test_a_bound_that_is_too_small_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_kernels_on_cpu", True)
    case = make_case()
    with pytest.raises(RuntimeError, match="max_rows"):
        linear_cross_entropy(case["hidden"], case["weight"], case["targets"], sample_ids=IDS, num_samples=B, max_rows=3)
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        linear_cross_entropy(
            case["hidden"], case["weight"], case["targets"].clamp(min=0) + V, sample_ids=IDS, num_samples=B
        )


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
def test_ignored_rows_may_have_any_weight_and_hidden_state(form: str, gradients: Any) -> None:
    case = make_case()
    weights = torch.rand(T, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    results = []
    for padding in (0.0, torch.nan):
        leaves = leaves_of(case)
        leaves["hidden"].data[case["targets"] < 0] = padding
        out = linear_cross_entropy(
            leaves["hidden"],
            leaves["weight"],
            case["targets"],
            sample_ids=IDS,
            num_samples=B,
            gradients=gradients,
            token_weight=torch.where(case["targets"] < 0, padding, weights),
            chunk_bytes=CHUNK,
        )
        out.loss.backward()
        results.append([out.loss.detach(), leaves["hidden"].grad, leaves["weight"].grad])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_operands_may_be_strided(form: str) -> None:
    case = make_case()
    bias = torch.stack([case["bias"], case["bias"] + 1], 1)[:, 0]
    strided = {
        "hidden": case["hidden"].t().contiguous().t(),
        "weight": torch.cat([case["weight"]] * 2, 1)[:, :H],
        "bias": bias,
        "targets": torch.stack([case["targets"]] * 2, 1)[:, 1],
        "ids": torch.stack([IDS] * 2, 1)[:, 1],
    }
    plain = {**case, "ids": IDS}
    results = []
    for x in (plain, strided):
        leaves = [x[name].requires_grad_() for name in ("hidden", "weight", "bias")]
        assert x is plain or not any(leaf.is_contiguous() for leaf in leaves)
        out = linear_cross_entropy(
            leaves[0], leaves[1], x["targets"], sample_ids=x["ids"], num_samples=B, bias=leaves[2], chunk_bytes=CHUNK
        )
        results.append([*out[:4], *torch.autograd.grad(out.loss, leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("cut", [11, 25])
def test_signatures_add_up_over_micro_batches(form: str, cut: int) -> None:
    """Samples in two calls, and a sample whose rows are divided between them: n phi is a sum over rows."""
    case = make_case()
    left, right = torch.randn(H, 4, dtype=torch.float64), torch.randn(H, 4, dtype=torch.float64)

    def weighted(rows: slice) -> Tensor:
        out = linear_cross_entropy(
            case["hidden"][rows],
            case["weight"],
            case["targets"][rows],
            sample_ids=IDS[rows],
            num_samples=B,
            signature=(left, right),
            chunk_bytes=CHUNK,
        )
        return out.signature * out.sample_tokens[:, None, None]

    torch.testing.assert_close(weighted(slice(0, cut)) + weighted(slice(cut, T)), weighted(slice(0, T)))


@settings(deadline=None, max_examples=30)
@given(valid=st.lists(st.booleans(), min_size=1, max_size=40), spare=st.integers(0, 5))
def test_counted_rows_are_taken_and_put_back(valid: list[bool], spare: int) -> None:
    targets = torch.where(torch.tensor(valid), 1, -100)
    values = torch.arange(1.0, len(valid) + 1)
    expected = torch.where(torch.tensor(valid), values, 0.0)
    for kernels in (False, True):
        backend._kernels_on_cpu = kernels
        try:
            for bound in (None, sum(valid) + spare):
                counted = CountedRows.of(targets, -100, bound)
                taken = counted.take(values)
                assert taken.shape[0] <= len(valid)
                assert torch.equal(counted.put(taken), expected)
                assert torch.equal(taken[taken != 0], values[torch.tensor(valid)])
        finally:
            backend._kernels_on_cpu = False


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 30),
    vocabulary=st.integers(1, 90),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    shift=st.sampled_from([0.0, 1e4, -1e4]),
    kernels=st.booleans(),
)
def test_losses_and_gradients_of_any_logits(
    seed: int, rows: int, vocabulary: int, dtype: torch.dtype, shift: float, kernels: bool
) -> None:
    """The row pass alone, on logits of any size: errors of fp32 arithmetic, also far from 0; gradients sum to 0."""
    g = torch.Generator().manual_seed(seed)
    z = (torch.randn(rows, vocabulary, generator=g, dtype=torch.float64) * 3 + shift).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=g)
    wide = torch.promote_types(dtype, torch.float32)
    exact = F.cross_entropy(z.double(), targets, reduction="none")
    work, nll = (
        torch.empty(rows, row_pass.padded(vocabulary), dtype=dtype)[:, :vocabulary].copy_(z),
        torch.empty(rows, dtype=wide),
    )
    backend._kernels_on_cpu = kernels
    try:
        columns, outputs = row_pass.Columns(None, None), row_pass.Rows(targets, None, None, nll, None)
        row_pass.row_pass(work, work, None, columns, outputs, row_pass.RowLoss(), -100)
    finally:
        backend._kernels_on_cpu = False
    tolerance = 1e-12 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(nll.double(), exact, rtol=tolerance, atol=tolerance)
    p = torch.softmax(z.double(), -1)
    p[torch.arange(rows), targets] -= 1
    torch.testing.assert_close(work.double(), p, rtol=torch.finfo(dtype).eps + tolerance, atol=tolerance)


def test_rows_beyond_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 3 begins at element 2.4e9 of a buffer of which only the rows' own pages are ever touched."""
    monkeypatch.setattr(backend, "_kernels_on_cpu", True)
    stride, vocabulary = 800_000_000, 100
    z = torch.empty(3 * stride + 128, dtype=torch.bfloat16).as_strided((4, vocabulary), (stride, 1))
    values = torch.randn(4, vocabulary).bfloat16()
    z.copy_(values)
    targets, nll = torch.tensor([1, 2, 3, 99]), torch.empty(4)
    columns, outputs = row_pass.Columns(None, None), row_pass.Rows(targets, None, None, nll, None)
    row_pass.row_pass(z, z, None, columns, outputs, row_pass.RowLoss(), -100)
    torch.testing.assert_close(nll, F.cross_entropy(values.float(), targets, reduction="none"))
    assert float(z[3].float().sum().abs()) < 0.02
