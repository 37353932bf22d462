"""The head against its dense float64 reference: values, gradients, options, ignored rows, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lead_kernels import chunk_size, linear_cross_entropy, reference, row_pass_host

T, H, V, B, Q = 75, 24, 131, 7, 5
CHUNK = 4 * V * 16  # 16 rows: five chunks, none of them full
WEIGHTS = {
    "mean": None,
    "float": 0.3,
    "scalar": torch.tensor(0.02),
    "rows": torch.rand(T, generator=torch.Generator().manual_seed(1)),
}
WEIGHTS["rows"][::4] = 0.0
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "softcap": {"softcap": 4.0},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "scale": {"logit_scale": 0.6},
    "all": {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 0.6},
}


def make_case(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (T,), generator=g)
    targets[torch.rand(T, generator=g) < 0.25] = -100
    sizes = [9, 0, 1, 30, 0, 25, 10]  # two empty samples, one of one row
    return {
        "hidden": torch.randn(T, H, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),
        "weight": (0.6 * torch.randn(V, H, generator=g, dtype=torch.float64)).to(dtype).requires_grad_(),
        "bias": torch.randn(V, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),
        "targets": targets,
        "sample_ids": torch.repeat_interleave(torch.arange(B), torch.tensor(sizes)),
        "P": torch.randn(H, Q, generator=g, dtype=torch.float64),
        "Q": torch.randn(H, Q, generator=g, dtype=torch.float64),
    }


def run(function: Any, case: dict[str, Tensor], upstream: float = 1.0, **options: Any) -> tuple[Any, list[Tensor]]:
    """Result and gradients of hidden, weight and bias under an upstream gradient that is not 1."""
    leaves = [case[name].detach().clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    if function is linear_cross_entropy:
        options = {"chunk_bytes": CHUNK, **options}
    out = function(
        leaves[0],
        leaves[1],
        case["targets"],
        sample_ids=case["sample_ids"],
        num_samples=B,
        bias=leaves[2],
        signature=(case["P"], case["Q"]),
        **options,
    )
    (out.loss * upstream).backward()
    return out, [leaf.grad for leaf in leaves]


def assert_same(ours: tuple[Any, list[Tensor]], expected: tuple[Any, list[Tensor]], tolerance: float = 1e-12) -> None:
    names = (*ours[0]._fields, "dhidden", "dweight", "dbias")[: len(ours[0]._fields) + len(ours[1])]
    for name, a, b in zip(names, (*ours[0], *ours[1]), (*expected[0], *expected[1]), strict=True):
        assert (a is None) == (b is None), name
        if b is None:
            continue
        scale = float(b.detach().abs().max()) + 1
        torch.testing.assert_close(
            a, b.to(a.dtype), rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_agrees_with_float64_reference(form: str, options: str, weight: str) -> None:
    case = make_case()
    arguments = {**OPTIONS[options], "token_weight": WEIGHTS[weight]}
    ours = run(linear_cross_entropy, case, upstream=-2.7, **arguments)
    assert_same(ours, run(reference.linear_cross_entropy, case, upstream=-2.7, **arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    whole = run(linear_cross_entropy, case, chunk_bytes=2**30, token_weight=WEIGHTS["rows"])
    monkeypatch.setattr(row_pass_host, "CPU_TILE_BYTES", 4 * V * 3)
    monkeypatch.setattr(chunk_size, "CPU_CHUNK_ROWS", 20)
    tiled = run(linear_cross_entropy, case, chunk_bytes=2**30, token_weight=WEIGHTS["rows"])
    assert_same(tiled, whole, 1e-12 if dtype == torch.float64 else 2e-6)
    assert torch.equal(tiled[0].sample_tokens, whole[0].sample_tokens)
    one_row = run(linear_cross_entropy, case, chunk_bytes=1, token_weight=WEIGHTS["rows"])
    assert_same(one_row, whole, 1e-12 if dtype == torch.float64 else 2e-6)


def test_reference_and_operator_pass_gradcheck() -> None:
    case = make_case()
    few = case["hidden"][:8, :5], case["weight"][:9, :5], case["bias"][:9]
    leaves = tuple(x.detach().clone().requires_grad_() for x in few)
    targets, ids = case["targets"][:8] % 9, case["sample_ids"][:8]
    targets[3] = -100
    for function in (reference.linear_cross_entropy, linear_cross_entropy):

        def loss(h: Tensor, w: Tensor, b: Tensor, function: Any = function) -> Tensor:
            return function(
                h, w, targets, sample_ids=ids, num_samples=B, bias=b, softcap=3.0, label_smoothing=0.2, z_loss=0.05
            ).loss

        assert torch.autograd.gradcheck(loss, leaves)


def test_matches_torch_cross_entropy_with_all_rows_counted() -> None:
    case = make_case(dtype=torch.float32)
    targets = case["targets"].clamp(min=0)
    out = linear_cross_entropy(
        case["hidden"], case["weight"], targets, sample_ids=case["sample_ids"], num_samples=B, chunk_bytes=CHUNK
    )
    torch.testing.assert_close(out.loss, F.cross_entropy(case["hidden"] @ case["weight"].t(), targets))
    assert out.sample_tokens.tolist() == [9, 0, 1, 30, 0, 25, 10]
    assert out.sample_nll[1] == 0
    torch.testing.assert_close(out.sample_nll[3], out.token_nll[10:40].mean())


def test_cu_seqlens_is_the_same_as_sample_ids(form: str) -> None:
    case = make_case()
    signature = (case["P"], case["Q"])
    leading = case["hidden"], case["weight"], case["targets"]
    ids = linear_cross_entropy(*leading, sample_ids=case["sample_ids"], num_samples=B, signature=signature)
    cu = torch.tensor([0, 9, 9, 10, 40, 40, 65, 75], dtype=torch.int32)
    by_cu = linear_cross_entropy(*leading, cu_seqlens=cu, num_samples=B, signature=signature)
    for a, b in zip(ids[:5], by_cu[:5], strict=True):
        assert torch.equal(a, b)
    fewer = linear_cross_entropy(*leading, cu_seqlens=cu, num_samples=B - 2, signature=signature)
    assert torch.equal(fewer.sample_nll, ids.sample_nll[: B - 2])
    torch.testing.assert_close(
        fewer.signature, ids.signature[: B - 2]
    )  # the rows after the last sample belong to nobody


@pytest.mark.parametrize("where", ["first", "last", "sample", "all"])
def test_ignored_rows(form: str, where: str) -> None:
    case = make_case()
    rows = {"first": slice(0, 5), "last": slice(T - 20, T), "sample": slice(10, 40), "all": slice(0, T)}[where]
    case["targets"] = case["targets"].clamp(min=0)
    case["targets"][rows] = -100
    dirty = {**case, "hidden": case["hidden"].detach().clone()}
    dirty["hidden"][rows] = torch.nan  # padding may hold anything
    ours, expected = run(linear_cross_entropy, dirty), run(reference.linear_cross_entropy, case)
    assert_same(ours, expected)
    assert ours[1][0][rows].abs().max() == 0
    if where == "all":
        assert ours[0].loss == 0
        assert all(bool((grad == 0).all()) for grad in ours[1])


def test_one_sample_and_many_one_token_samples(form: str) -> None:
    case = make_case()
    for ids, count in ((torch.zeros(T, dtype=torch.int64), 1), (torch.arange(T), T)):
        arguments = {"sample_ids": ids, "num_samples": count, "signature": (case["P"], case["Q"])}
        ours = linear_cross_entropy(case["hidden"], case["weight"], case["targets"], chunk_bytes=CHUNK, **arguments)
        expected = reference.linear_cross_entropy(case["hidden"], case["weight"], case["targets"], **arguments)
        assert_same((ours, []), (expected, []))


def test_huge_logits_lose_no_digits(form: str) -> None:
    hidden = torch.zeros(4, 2)
    hidden[:, 0] = 1.0
    weight = torch.tensor([[1e4, 0.0], [1e4 - 3, 0.0], [-1e4, 0.0]], requires_grad=True)
    targets = torch.tensor([0, 1, 0, 2])
    out = linear_cross_entropy(
        hidden.requires_grad_(), weight, targets, sample_ids=torch.zeros(4, dtype=torch.int64), num_samples=1
    )
    z = weight.detach().double()[:, 0]
    torch.testing.assert_close(out.token_nll.double(), z.logsumexp(0) - z[targets], rtol=1e-6, atol=1e-6)
    out.loss.backward()
    assert bool(hidden.grad.isfinite().all())
    assert bool(weight.grad.isfinite().all())


def test_minus_infinity_in_the_bias_removes_a_word(form: str) -> None:
    case = make_case()
    case["bias"] = case["bias"].detach().clone()
    case["bias"][5:60] = -torch.inf
    case["targets"] = torch.where(case["targets"] >= 0, case["targets"] % 5, case["targets"])
    ours = run(linear_cross_entropy, case)
    assert_same(ours, run(reference.linear_cross_entropy, case))
    assert bool((ours[1][1][5:60] == 0).all())


def test_a_row_of_weight_zero_may_have_infinite_nll() -> None:
    case = make_case(dtype=torch.float32)
    targets = case["targets"].clamp(min=0)
    bias = torch.zeros(V)
    bias[targets[0]] = -torch.inf
    token_weight = (targets != targets[0]).float() / T
    out = linear_cross_entropy(
        case["hidden"],
        case["weight"],
        targets,
        sample_ids=case["sample_ids"],
        num_samples=B,
        bias=bias,
        token_weight=token_weight,
    )
    assert out.token_nll[0] == torch.inf
    assert bool(out.loss.isfinite())


def test_signature_ignores_token_weight(form: str) -> None:
    case = make_case()
    plain = run(linear_cross_entropy, case)[0].signature
    for name in ("rows", "float"):
        torch.testing.assert_close(run(linear_cross_entropy, case, token_weight=WEIGHTS[name])[0].signature, plain)


def products_of(recorder: Any, case: dict[str, Tensor], **options: Any) -> int:
    with recorder() as record:
        linear_cross_entropy(
            case["hidden"],
            case["weight"],
            case["targets"],
            sample_ids=case["sample_ids"],
            num_samples=B,
            chunk_bytes=2**30,
            **options,
        )
    return len(record.products())


def test_only_what_is_needed_is_computed(recorder: Any) -> None:
    case = make_case()
    assert products_of(recorder, case) == 3
    frozen = {**case, "weight": case["weight"].detach()}
    assert products_of(recorder, frozen) == 2
    assert products_of(recorder, {**case, "hidden": case["hidden"].detach()}) == 2
    with torch.no_grad():
        assert products_of(recorder, case) == 1
    samples = sum(bool((case["targets"][case["sample_ids"] == b] >= 0).any()) for b in range(B))
    signature = products_of(recorder, frozen, signature=(case["P"], case["Q"]))
    assert 4 + samples <= signature <= 4 + B  # two projections, a small product per sample, and no second V x H product
    assert products_of(recorder, frozen, signature=(case["P"], case["Q"]), label_smoothing=0.1) == signature + 1


def test_no_grad_gives_values_and_no_graph() -> None:
    case = make_case()
    expected = run(linear_cross_entropy, case)[0]
    with torch.no_grad():
        out = linear_cross_entropy(
            case["hidden"],
            case["weight"],
            case["targets"],
            sample_ids=case["sample_ids"],
            num_samples=B,
            bias=case["bias"],
            signature=(case["P"], case["Q"]),
            chunk_bytes=CHUNK,
        )
    assert not out.loss.requires_grad
    for a, b in zip(out[:5], expected[:5], strict=True):
        assert torch.equal(a, b)


def test_ignored_rows_stay_out_of_the_products(recorder: Any) -> None:
    case = make_case()
    counted = int((case["targets"] >= 0).sum())
    with recorder() as record:
        linear_cross_entropy(
            case["hidden"], case["weight"], case["targets"], sample_ids=case["sample_ids"], num_samples=B
        ).loss.backward()
    assert all(
        counted in (*shapes[0], *shapes[1]) and T not in (*shapes[0], *shapes[1]) for shapes in record.products()
    )


def test_gradients_once_and_not_twice() -> None:
    case = make_case()
    assert not run(linear_cross_entropy, case)[0].signature.requires_grad
    arguments = {"sample_ids": case["sample_ids"], "num_samples": B}
    hidden = case["hidden"].detach().clone().requires_grad_()
    loss = linear_cross_entropy(hidden, case["weight"], case["targets"], **arguments).loss
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, hidden)
    torch.testing.assert_close(second, 3 * first)
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    for name in ("loss", "sample_nll"):
        out = linear_cross_entropy(hidden, case["weight"], case["targets"], **arguments)
        with pytest.raises(RuntimeError):  # gradients of gradients are refused, not wrong
            torch.autograd.grad((getattr(out, name) * factor).sum(), hidden, create_graph=True)[0].sum().backward()


def test_autocast_takes_the_operands_as_a_linear_layer_would() -> None:
    case = make_case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, gradients = run(linear_cross_entropy, case)
    low = {name: x.detach().bfloat16() if x.is_floating_point() else x for name, x in case.items()}
    expected, expected_gradients = run(linear_cross_entropy, {**low, "P": case["P"], "Q": case["Q"]})
    assert_same((out, []), (expected, []), 0.0)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_agree_bit_for_bit(form: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (first, first_grads), (second, second_grads) = (
            run(linear_cross_entropy, case, token_weight=WEIGHTS["rows"]) for _ in range(2)
        )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip((*first[:5], *first_grads), (*second[:5], *second_grads), strict=True))
