"""What the head hands to a CPU's matrix products: nothing beside the rows that such a unit may load and must not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from inside_operators import InsideOperators
from lead_kernels import Lora, linear_cross_entropy
from lead_kernels.dtypes import HALVES

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "addmv_", "matmul", "linear")
CREATED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


def gap(matrix: Tensor) -> Tensor:
    """What lies in memory between the rows of a matrix, or between its columns where those are the contiguous ones."""
    if matrix.dim() != 2 or matrix.is_contiguous() or matrix.t().is_contiguous():
        return matrix.new_empty(0)
    lines = matrix if matrix.stride(1) == 1 else matrix.t()
    assert lines.stride(1) == 1, "neither rows nor columns are contiguous"
    between = lines.stride(0) - lines.shape[1]
    whole = lines.untyped_storage().nbytes() // lines.element_size()
    start = lines.storage_offset() + lines.shape[1]
    count = lines.shape[0] if start + lines.stride(0) * (lines.shape[0] - 1) + between <= whole else lines.shape[0] - 1
    return lines.as_strided((count, between), (lines.stride(0), 1), start)


class Operands(InsideOperators):
    """Looks at both operands of every product; fresh memory holds NaN, as memory may."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def see(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.products += 1
            for operand in [x for x in args if isinstance(x, Tensor)][-2:]:
                clean = not bool((gap(operand) != 0).any())
                assert clean, f"{func}: {list(operand.shape)} with strides {operand.stride()}"
        result = func(*args, **kwargs)
        if name in CREATED:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    tensor.fill_(torch.nan)
        return result


@contextmanager
def watched() -> Iterator[Operands]:
    with Operands() as operands:
        yield operands
    assert operands.products


LAYOUTS = {
    "rows": lambda x, between: x,
    "columns": lambda x, between: x.t().contiguous().t(),
    "gaps": lambda x, between: torch.cat([x, torch.full_like(x, between)], 1)[:, : x.shape[1]],
}


DTYPES = [*[(dtype, logits) for dtype in HALVES for logits in (None, torch.float32)], (torch.float32, None)]


@settings(deadline=None, max_examples=40)
@given(
    dtypes=st.sampled_from(DTYPES),
    rows=st.integers(1, 23),
    width=st.integers(1, 37),
    vocabulary=st.sampled_from([2, 5, 50, 67, 96, 131]),
    rank=st.integers(0, 5),
    sketch=st.integers(0, 3),
    chunk=st.integers(1, 9),
    options=st.sampled_from([{}, {"label_smoothing": 0.1, "softcap": 5.0}]),
    weights=st.booleans(),
    gradients=st.sampled_from(["auto", "forward", "recompute"]),
    ignored=st.booleans(),
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2),
    seed=st.integers(0, 99),
)
def test_no_operand_has_anything_between_its_rows(
    dtypes: tuple[torch.dtype, torch.dtype | None],
    rows: int,
    width: int,
    vocabulary: int,
    rank: int,
    sketch: int,
    chunk: int,
    options: dict[str, float],
    weights: bool,
    gradients: Any,
    ignored: bool,
    layouts: tuple[str, str],
    seed: int,
) -> None:
    """Over all shapes, options and layouts: results from memory full of NaN are those from clean memory."""
    dtype, logits_dtype = dtypes
    g = torch.Generator().manual_seed(seed)
    names = {"hidden": (rows, width), "weight": (vocabulary, width), "bias": (vocabulary,)}
    names |= {"a": (rank, width), "b": (vocabulary, rank)} if rank else {}
    values = {name: torch.randn(*shape, generator=g).to(dtype) for name, shape in names.items()}
    targets = torch.randint(0, vocabulary, (rows,), generator=g)
    targets[1::3] = torch.where(torch.tensor(ignored), -100, targets[1::3])
    half = {"token_weight": torch.rand(rows, generator=g)} if weights else {}
    if sketch:
        half["signature"] = tuple(torch.randn(2, width, sketch, generator=g))
    results = []
    for mode, between in ((Operands(), torch.nan), (None, 0.0)):
        leaves = {name: x.clone() for name, x in values.items()}
        laid = zip(("hidden", "weight"), layouts, strict=True)
        leaves |= {name: LAYOUTS[layout](leaves[name], between) for name, layout in laid}
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}

        def step(x: dict[str, Tensor] = leaves) -> list[Tensor]:
            out = linear_cross_entropy(
                x["hidden"],
                x["weight"],
                targets,
                sample_ids=torch.arange(rows) // 4,
                num_samples=6,
                bias=x["bias"],
                **options,
                **half,
                lora=Lora(x["a"], x["b"], 0.5) if rank else None,
                logits_dtype=logits_dtype,
                gradients=gradients,
                chunk_bytes=chunk * 4 * vocabulary,
            )
            upstream = out.loss if gradients == "forward" else out.loss + out.sample_nll.square().sum()
            found = torch.autograd.grad(upstream, list(x.values()))
            return [*(x.detach() for x in out if x is not None), *found]

        if mode is None:
            results.append(step())
        else:
            with mode:
                results.append(step())
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("vocabulary", [67, 96])
def test_a_row_that_is_nan_spoils_no_other(vocabulary: int) -> None:
    """The hidden gradient of every other row stays what it was; with zeros between the rows that holds on any CPU."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 33, generator=g).bfloat16(), torch.randn(vocabulary, 33, generator=g).bfloat16()
    targets, results = torch.randint(0, vocabulary, (9,), generator=g), []
    for value in (0.5, torch.nan):
        leaf = hidden.clone()
        leaf[4] = value
        leaf.requires_grad_()
        with watched():
            out = linear_cross_entropy(leaf, weight, targets, sample_ids=torch.arange(9), num_samples=9)
            out.loss.backward()
        results.append((out.sample_nll.detach(), leaf.grad))
    for clean, spoilt in zip(*results, strict=True):
        others = torch.arange(9) != 4
        assert torch.equal(clean[others], spoilt[others])
        assert bool(spoilt[4].isnan().all())


def test_the_mode_sees_what_it_should() -> None:
    whole = torch.zeros(3, 8)
    with Operands():
        whole[:, :5] @ torch.ones(5, 2)
        with pytest.raises(AssertionError, match="strides"):
            (whole + 1)[:, :5] @ torch.ones(5, 2)
        assert bool(torch.empty(3).isnan().all())
