"""The head's options against the float64 reference and PyTorch's own losses: what users of other fused heads expect of
this one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from lead_kernels import LinearCrossEntropy, Lora, backend, linear_cross_entropy, reference, row_pass

pytestmark = pytest.mark.slow

T, H, V, B = 24, 10, 37, 4
IDS = torch.repeat_interleave(torch.arange(B), torch.tensor([7, 0, 12, 5]))
RETURNED = {"return_lse": True, "return_entropy": True, "return_predicted": True}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of columns a row, the last one partly filled."""
    monkeypatch.setattr(row_pass, "_launch_shape", lambda vocabulary, simple: (16, 64))


def make_case(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (T,)) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    targets = torch.randint(0, V, shape, generator=g)
    targets[torch.rand(shape, generator=g) < 0.25] = -100
    shapes = {"hidden": (*shape, H), "weight": (V, H), "bias": (V,)}
    leaves = {name: torch.randn(*size, generator=g, dtype=torch.float64).to(dtype) for name, size in shapes.items()}
    rows = torch.rand(shape, generator=g).double()
    return {**leaves, "targets": targets, "classes": torch.rand(V, generator=g), "rows": rows}


def both(case: dict[str, Tensor], upstream: str = "loss", **options: Any) -> None:
    """Results and gradients of the operator are those of the reference."""
    found = []
    for function in (linear_cross_entropy, reference.linear_cross_entropy):
        leaves = [case[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
        more = {"chunk_bytes": 8 * V * 7} if function is linear_cross_entropy else {}
        out = function(leaves[0], leaves[1], case["targets"], bias=leaves[2], **options, **more)
        g = torch.Generator().manual_seed(0)
        total = (torch.randn(out.loss.shape, generator=g, dtype=torch.float64) * out.loss).sum()
        found.append([*out, *torch.autograd.grad(total, leaves)])
    for place, (ours, expected) in enumerate(zip(*found, strict=True)):
        assert (ours is None) == (expected is None), place
        if ours is not None:
            told = lambda m, p=place: f"{p}: {m}"  # noqa: E731
            torch.testing.assert_close(ours, expected.to(ours.dtype), rtol=1e-10, atol=1e-11, msg=told)


ALL = {"softcap": 3.0, "label_smoothing": 0.2, "z_loss": 0.05, "logit_scale": 0.7}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"z_loss": 0.05}, ALL], ids=["plain", "smoothing", "z-loss", "all"]
)
@pytest.mark.parametrize("classes", [False, True])
def test_agrees_with_the_reference(form: str, classes: bool, options: dict[str, float], reduction: str) -> None:
    case = make_case()
    both(case, reduction=reduction, class_weight=case["classes"] if classes else None, **RETURNED, **options)
    if classes and options.get("softcap"):  # with everything at once
        both(
            case,
            reduction=reduction,
            class_weight=case["classes"],
            token_weight=case["rows"],
            sample_ids=IDS,
            num_samples=B,
            signature=(torch.randn(H, 2).double(), torch.randn(H, 2).double()),
            **RETURNED,
            **options,
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_is_pytorchs_cross_entropy(smoothing: float) -> None:
    """Class weights of 0 among them, smoothing, reductions, any ignored index; torch's own fused operator where there
    is one."""
    case = make_case()
    fused = getattr(F, "linear_cross_entropy", None)
    classes = case["classes"].double()
    classes[::5] = 0.0
    for ignored, weights, reduction in itertools.product((-100, 3, V + 5), (None, classes), ("mean", "sum", "none")):
        targets = torch.where(case["targets"] < 0, ignored, case["targets"])
        arguments = {"label_smoothing": smoothing, "ignore_index": ignored, "reduction": reduction}
        found = []
        for which in ("ours", "unfused", "fused"):
            leaves = [case[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
            if which == "ours":
                arguments_of_ours = {"bias": leaves[2], "class_weight": weights, **arguments}
                loss = linear_cross_entropy(leaves[0], leaves[1], targets, **arguments_of_ours).loss
            elif which == "unfused":
                loss = F.cross_entropy(F.linear(*leaves), targets, weight=weights, **arguments)
            elif fused is not None:
                loss = fused(leaves[0], leaves[1], targets, linear_bias=leaves[2], weight=weights, **arguments)
            found.append([loss.detach(), *torch.autograd.grad(loss.square().sum(), leaves)])
        for ours, unfused, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, unfused, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_smallest_call(recorder: Any) -> None:
    """Three products, no sample, and nothing of what was not asked for."""
    case = make_case(torch.float32)
    hidden, weight, targets = (
        case["hidden"].requires_grad_(),
        case["weight"].requires_grad_(),
        case["targets"].clamp(min=0),
    )
    with recorder() as record:
        out = linear_cross_entropy(hidden, weight, targets)
        out.loss.backward()
    torch.testing.assert_close(out.loss, F.cross_entropy(hidden @ weight.t(), targets))
    assert out.sample_nll.shape == out.sample_tokens.shape == (0,)
    assert out[4:] == (None,) * 5
    assert len(record.products()) == 3
    names = {name for name, _ in record.calls}
    assert not names & {"argmax", "special_xlogy", "segment_reduce", "searchsorted", "frexp"}
    with recorder() as record:
        linear_cross_entropy(hidden, weight, targets, **RETURNED).loss.backward()
    assert len(record.products()) == 3


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int64])
def test_leading_dimensions_and_narrow_targets(dtype: torch.dtype) -> None:
    case = make_case(shape=(2, 3, 4))
    ids = torch.tensor([0, 0, 1, 1, 1, 3])[:, None].expand(6, 4).reshape(2, 3, 4)
    arguments = {"sample_ids": ids, "num_samples": B, "token_weight": case["rows"], **RETURNED}
    out = linear_cross_entropy(case["hidden"], case["weight"], case["targets"].to(dtype), **arguments)
    flat = {name: x.flatten() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    expected = linear_cross_entropy(case["hidden"].view(24, H), case["weight"], case["targets"].flatten(), **flat)
    for name, ours, theirs in zip(out._fields, out, expected, strict=True):
        assert (ours is None) or torch.equal(ours.flatten(), theirs.flatten()), name
        assert name not in ("token_nll", "lse", "entropy", "predicted") or ours.shape == (2, 3, 4)
    one = linear_cross_entropy(case["hidden"][0, 0, 0], case["weight"], torch.tensor(5), reduction="none")
    assert one.loss.shape == one.token_nll.shape == ()
    torch.testing.assert_close(one.loss, F.cross_entropy(case["weight"] @ case["hidden"][0, 0, 0], torch.tensor(5)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shift_is_the_causal_loss_of_hugging_face(form: str, reduction: str) -> None:
    case = make_case(shape=(3, 8))
    both(case, shift=True, reduction=reduction, **RETURNED)
    out = linear_cross_entropy(case["hidden"], case["weight"], case["targets"], shift=True)
    logits = case["hidden"][:, :-1] @ case["weight"].t()
    torch.testing.assert_close(out.loss, F.cross_entropy(logits.flatten(0, 1), case["targets"][:, 1:].flatten()))
    assert bool((out.token_nll[:, -1] == 0).all())


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_shift_of_nothing(shape: tuple[int, ...]) -> None:
    hidden, weight = torch.zeros(*shape, H, requires_grad=True), torch.zeros(V, H, requires_grad=True)
    out = linear_cross_entropy(hidden, weight, torch.zeros(shape, dtype=torch.int64), shift=True, **RETURNED)
    out.loss.backward()
    assert (float(out.loss.detach()), float(weight.grad.abs().sum()), out.lse.shape) == (0.0, 0.0, shape)


def test_shift_stays_within_packed_samples(form: str) -> None:
    case = make_case()
    cu = torch.tensor([0, 7, 7, 19, 24], dtype=torch.int32)
    both(case, shift=True, sample_ids=IDS, num_samples=B)
    operands = (case["hidden"], case["weight"], case["targets"])
    ids = linear_cross_entropy(*operands, shift=True, sample_ids=IDS, num_samples=B)
    packed = linear_cross_entropy(*operands, shift=True, cu_seqlens=cu)
    for ours, expected in zip(packed[:4], ids[:4], strict=True):
        assert torch.equal(ours, expected)
    apart = [
        linear_cross_entropy(operands[0][a:b], operands[1], operands[2][a:b], shift=True, reduction="none").loss
        for a, b in itertools.pairwise(cu.tolist())
        if b > a
    ]
    torch.testing.assert_close(torch.cat(apart), packed.token_nll)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_option_looks_at_the_device(monkeypatch: pytest.MonkeyPatch, no_host_reads: Any, reduction: str) -> None:
    case = make_case(torch.bfloat16)
    cu = torch.tensor([0, 7, 7, 19, 24])
    found = []
    for kernels in (False, True):
        monkeypatch.setattr(backend, "_kernels_on_cpu", kernels)
        leaves = [case[name].clone().requires_grad_() for name in ("hidden", "weight")]

        def step(x: list[Tensor] = leaves) -> list[Tensor]:
            out = linear_cross_entropy(
                *x,
                case["targets"].int(),
                cu_seqlens=cu,
                class_weight=case["classes"],
                max_rows=T,
                reduction=reduction,
                shift=True,
                **ALL,
                **RETURNED,
            )
            out.loss.sum().backward()
            return [x.detach() for x in out if x is not None]

        if kernels:
            with no_host_reads():
                out = step()
        else:
            out = step()
        found.append([*out, *(leaf.grad for leaf in leaves)])
    for host, device in zip(*found, strict=True):
        tolerance = 2**-6 if host.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(device, host, rtol=tolerance, atol=tolerance * float(host.abs().max()))


def test_statistics_of_extreme_rows(form: str) -> None:
    """Ties go to the first; logits of 1e4 and -inf; a certain row has no entropy, an even one log V."""
    bias = torch.zeros(V)
    bias[20:] = -torch.inf
    hidden = torch.tensor([[0.0], [1.0], [-1.0], [0.0]])
    weight = torch.zeros(V, 1)
    weight[7] = weight[9] = 1e4
    weight[11] = -1e4
    targets = torch.tensor([1, 9, 11, -100])
    out = linear_cross_entropy(hidden, weight, targets, bias=bias, **RETURNED)
    exact = (hidden.double() @ weight.double().t() + bias)[:3]
    torch.testing.assert_close(out.lse[:3].double(), exact.logsumexp(-1), rtol=1e-6, atol=0)
    p = exact.softmax(-1)
    torch.testing.assert_close(out.entropy[:3].double(), torch.special.entr(p).sum(-1), rtol=1e-6, atol=1e-6)
    assert out.predicted.tolist() == [0, 7, 11, -1]
    assert float(out.token_accuracy) == pytest.approx(1 / 3)
    assert out.lse[3] == out.entropy[3] == 0
    nothing = linear_cross_entropy(hidden, weight, targets.clamp(max=-100), **RETURNED)
    assert nothing.loss == nothing.token_accuracy == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_come_from_the_same_logits(form: str, dtype: torch.dtype) -> None:
    case = make_case(dtype)
    out = linear_cross_entropy(case["hidden"], case["weight"], case["targets"], **RETURNED, softcap=9.0)
    logits = 9.0 * torch.tanh((case["hidden"] @ case["weight"].t()).double() / 9.0)
    kept = case["targets"] >= 0
    torch.testing.assert_close(out.lse.double()[kept], logits.logsumexp(-1)[kept], rtol=1e-5, atol=1e-5)
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    torch.testing.assert_close(out.entropy.double()[kept], entropy[kept], rtol=1e-4, atol=1e-5)
    assert torch.equal(out.predicted[kept], logits.argmax(-1)[kept])
    assert not any(x.requires_grad for x in (out.lse, out.entropy, out.predicted))


def test_what_others_name_is_an_expression_here() -> None:
    """The z-loss by itself from lse; rows scaled by their own probability, from token_nll."""
    case = make_case()
    kept = case["targets"] >= 0
    leaf, dense = (case["hidden"].clone().requires_grad_() for _ in range(2))
    with_z = linear_cross_entropy(leaf, case["weight"], case["targets"], z_loss=0.3, return_lse=True)
    plain = linear_cross_entropy(leaf, case["weight"], case["targets"])
    torch.testing.assert_close(with_z.loss - plain.loss, 0.3 * with_z.lse.square().sum() / kept.sum())

    scaled = (plain.token_nll * plain.token_nll.detach().neg().exp()).sum() / kept.sum()
    nll = F.cross_entropy(dense @ case["weight"].t(), case["targets"], reduction="none")
    expected = (nll * nll.detach().neg().exp())[kept].mean()
    torch.testing.assert_close(scaled, expected)
    for ours, theirs in zip(torch.autograd.grad(scaled, leaf), torch.autograd.grad(expected, dense), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_some_operands_alone(reduction: str, trained: tuple[str, ...]) -> None:
    case = make_case()
    leaves = {name: case[name].clone().requires_grad_(name in trained) for name in ("hidden", "weight", "bias")}
    options = {"bias": leaves["bias"], "reduction": reduction}
    out = linear_cross_entropy(leaves["hidden"], leaves["weight"], case["targets"], **options)
    out.loss.mean().backward()
    other = {name: case[name].clone().requires_grad_(name in trained) for name in leaves}
    F.cross_entropy(F.linear(*other.values()), case["targets"], reduction=reduction).mean().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name not in trained)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, other[name].grad)


def test_compiled_with_every_option() -> None:
    torch._dynamo.reset()
    case = make_case(torch.float32, shape=(2, 12))

    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        out = linear_cross_entropy(
            hidden,
            weight,
            case["targets"],
            class_weight=case["classes"],
            label_smoothing=0.1,
            reduction="none",
            shift=True,
            **RETURNED,
        )
        return out.loss, out.lse, out.entropy, out.token_accuracy

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [case[name].clone().requires_grad_() for name in ("hidden", "weight")]
        out = function(*leaves)
        found.append([*(x.detach() for x in out), *torch.autograd.grad(out[0].square().sum(), leaves)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_module_takes_leading_dimensions() -> None:
    case = make_case(torch.float32, shape=(2, 12))
    module = LinearCrossEntropy(H, V, shift=True)
    out = module(case["hidden"], case["targets"], return_predicted=True)
    assert torch.equal(out.loss, linear_cross_entropy(case["hidden"], module.weight, case["targets"], shift=True).loss)
    assert out.predicted.shape == (2, 12)


NAN, INF = float("nan"), float("inf")
WHOLE, ROWS = torch.ones(T, dtype=torch.int64), torch.tensor([0, T])
REFUSED: list[tuple[str, dict[str, Any]]] = [
    *[(f"softcap is {x}", {"softcap": x}) for x in (0.0, -1.0, NAN, INF)],
    *[(f"label_smoothing is {x}", {"label_smoothing": x}) for x in (-0.1, 1.0, NAN)],
    *[(f"logit_scale is {x}", {"logit_scale": x}) for x in (0.0, NAN, -INF)],
    *[(f"z_loss is {x}", {"z_loss": x}) for x in (-1e-4, NAN, INF)],
    *[(f"token_weight is {x}", {"token_weight": x}) for x in (NAN, INF)],
    ("token_weight is torch.int64", {"token_weight": WHOLE}),
    ("token_weight is torch.bool", {"token_weight": WHOLE > 0}),
    ("token_weight has shape", {"token_weight": torch.ones(T, 1)}),
    ("hidden is torch.int64", {"hidden": torch.ones(T, H, dtype=torch.int64)}),
    ("hidden is torch.complex64", {"hidden": torch.ones(T, H, dtype=torch.complex64)}),
    ("weight has shape", {"weight": torch.ones(V, H - 1)}),
    ("targets has shape", {"targets": WHOLE[1:]}),
    ("targets hold 0 to 37", {"targets": torch.tensor([0, V]).repeat(T // 2)}),
    ("cu_seqlens has 3 entries", {"cu_seqlens": torch.tensor([0, 1, 2]), "num_samples": 3}),
    ("within 0 to 24", {"cu_seqlens": torch.tensor([0, T + 1])}),
    ("token_weight requires a gradient", {"token_weight": torch.ones(T, requires_grad=True)}),
    (r"signature\[1\] has shape", {"signature": (torch.ones(H, 2), torch.ones(H, 3)), "cu_seqlens": ROWS}),
    ("bias has shape", {"bias": torch.ones(V - 1)}),
    ("weight is torch.bfloat16", {"weight": torch.ones(V, H, dtype=torch.bfloat16)}),
    ("bias is torch.float64", {"bias": torch.ones(V, dtype=torch.float64)}),
    ("targets is torch.float32", {"targets": torch.ones(T)}),
    ("targets is torch.bool", {"targets": torch.ones(T) > 0}),
    ("targets hold", {"targets": torch.full((T,), -1)}),
    ("targets hold", {"targets": torch.full((T,), V)}),
    ("the vocabulary is empty", {"weight": torch.ones(0, H)}),
    ("class_weight has shape", {"class_weight": torch.ones(V - 1)}),
    ("class_weight is torch.int64", {"class_weight": torch.ones(V, dtype=torch.int64)}),
    ("class_weight requires a gradient", {"class_weight": torch.ones(V, requires_grad=True)}),
    ("max_rows is 3, but 24 targets are not ignored", {"max_rows": 3}),
    ("max_rows is -1", {"max_rows": -1}),
    ("chunk_bytes is 0", {"chunk_bytes": 0}),
    ("sample_ids hold -1 to 1", {"sample_ids": WHOLE.index_fill(0, torch.tensor([0]), -1), "num_samples": 2}),
    ("sample_ids hold 1 to 1", {"sample_ids": WHOLE, "num_samples": 1}),
    ("non-decreasing", {"sample_ids": WHOLE.index_fill(0, torch.tensor([9]), 0), "num_samples": 2}),
    ("sample_ids is torch.float32", {"sample_ids": torch.zeros(T), "num_samples": 2}),
    ("sample_ids needs num_samples", {"sample_ids": WHOLE}),
    ("num_samples is 0", {"sample_ids": WHOLE, "num_samples": 0}),
    ("num_samples is given without samples", {"num_samples": 2}),
    ("exactly one", {"sample_ids": WHOLE, "cu_seqlens": torch.tensor([0, T]), "num_samples": 1}),
    ("cu_seqlens must be non-decreasing", {"cu_seqlens": torch.tensor([0, 9, 5, T])}),
    ("cu_seqlens must be non-decreasing", {"cu_seqlens": torch.tensor([-1, T])}),
    ("cu_seqlens is torch.float32", {"cu_seqlens": torch.tensor([0.0, T])}),
    ("signature needs samples", {"signature": (torch.ones(H, 2), torch.ones(H, 2))}),
    ("gradients is 'backward'", {"gradients": "backward"}),
    ("reduction is 'median'", {"reduction": "median"}),
    ('reduction "none" has no gradients', {"reduction": "none", "gradients": "forward"}),
    ("logits_dtype is torch.bfloat16", {"logits_dtype": torch.bfloat16}),
    ("weight is on meta", {"weight": torch.ones(V, H, device="meta")}),
    ("lora.b has shape", {"lora": Lora(torch.ones(2, H), torch.ones(V, 3), 1.0)}),
]


@pytest.mark.parametrize(("message", "changes"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_refusals(message: str, changes: dict[str, Any]) -> None:
    arguments = {"hidden": torch.ones(T, H), "weight": torch.ones(V, H), "targets": torch.zeros(T, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **changes})


def test_a_device_refuses_ids_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host does not look: an assertion on the device."""
    monkeypatch.setattr(backend, "_kernels_on_cpu", True)
    arguments = (torch.ones(T, H), torch.ones(V, H), torch.zeros(T, dtype=torch.int64))
    for ids in (WHOLE, WHOLE - 2, WHOLE.index_fill(0, torch.tensor([9]), 0)):
        with pytest.raises(RuntimeError, match="sample_ids must be non-decreasing and within"):
            linear_cross_entropy(*arguments, sample_ids=ids, num_samples=1)


FUNC = torch.func
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "jvp": lambda f, x: FUNC.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: FUNC.jacfwd(f)(x),
    "grad": lambda f, x: FUNC.grad(f)(x),
    "jacrev": lambda f, x: FUNC.jacrev(f)(x),
    "hessian": lambda f, x: FUNC.hessian(f)(x),
    "vmap of grad": lambda f, x: FUNC.vmap(FUNC.grad(f))(torch.stack([x, x])),
}


@pytest.mark.parametrize("which", TRANSFORMS)
@pytest.mark.parametrize("place", ["hidden", "weight"])
def test_transforms_are_refused(which: str, place: str) -> None:
    case = make_case()
    operands = {name: case[name] for name in ("hidden", "weight", "targets")}
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        TRANSFORMS[which](lambda x: linear_cross_entropy(**{**operands, place: x}).loss, case[place])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        linear_cross_entropy(**{**operands, place: forward_ad.make_dual(case[place], torch.ones_like(case[place]))})


def test_vmap_is_a_loop() -> None:
    """Forward only: PyTorch calls the operator once for every element."""
    case = make_case()
    stack = torch.stack([case["hidden"], 2 * case["hidden"]])

    def loss(x: Tensor) -> Tensor:
        return linear_cross_entropy(x, case["weight"], case["targets"], label_smoothing=0.1).loss

    torch.testing.assert_close(FUNC.vmap(loss)(stack), torch.stack([loss(x) for x in stack]))


@pytest.mark.parametrize("gradients", ["auto", "forward", "recompute"])
def test_second_derivatives_are_refused(gradients: Any) -> None:
    case = make_case()
    leaf = case["hidden"].clone().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return linear_cross_entropy(x, case["weight"], case["targets"], gradients=gradients).loss

    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.hessian(loss, leaf)
