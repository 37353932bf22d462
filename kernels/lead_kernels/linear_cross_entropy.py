"""The LM head and its cross-entropy as one operator that never holds a [T, V] tensor beyond one chunk of rows.

Legend: T rows, H hidden size, V vocabulary, B samples, R rank, q sketch width; e_t the gradient of row t's NLL at its hidden state.
"""
from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lead_kernels.checks import check_device, check_shape, without_autocast
from lead_kernels.head_chunks import Lora
from lead_kernels.head_op import head
from lead_kernels.products import HALVES, wide

Gradients = Literal["auto", "forward", "recompute"]


class HeadLoss(NamedTuple):
    """What the head returns."""

    loss: Tensor
    """fp32, 0-d: sum of token_weight times the row's loss (NLL, with label smoothing and z-loss where asked for)."""
    token_nll: Tensor
    """fp32 [T]: the plain negative log-likelihood of every row (no smoothing, no z-loss); 0 where ignored."""
    sample_nll: Tensor
    """fp32 [B]: mean of token_nll over the sample's counted rows; 0 where it has none."""
    sample_tokens: Tensor
    """int64 [B]: counted rows of each sample."""
    signature: Tensor | None
    """fp32 [B, q, q] or None."""


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, lora: Lora | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias), *(() if lora is None else (("lora.a", lora.a), ("lora.b", lora.b)))):
        if hasattr(tensor, "full_tensor"):  # importing DTensor, only to ask, would take as long as importing torch
            raise ValueError(
                f"{name} is a DTensor, a shard: call linear_cross_entropy in the forward of a module that fully_shard wraps, where "
                "parameters are whole (lead_kernels.LinearCrossEntropy is such a module)"
            )
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"hidden and weight must be matrices, got shapes {list(hidden.shape)} and {list(weight.shape)}")
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    check_shape("weight", weight, (vocabulary, width), (hidden.dtype,))
    check_shape("targets", targets, (rows,), (torch.int64,))
    check_device(hidden.device, weight=weight, targets=targets, bias=bias)
    if bias is not None:
        check_shape("bias", bias, (vocabulary,))
    if lora is not None:
        rank = lora.a.shape[0]
        check_shape("lora.a", lora.a, (rank, width), (hidden.dtype,))
        check_shape("lora.b", lora.b, (vocabulary, rank), (hidden.dtype,))
        check_device(hidden.device, **{"lora.a": lora.a, "lora.b": lora.b})


def _check_samples(sample_ids: Tensor | None, cu_seqlens: Tensor | None, num_samples: int, targets: Tensor) -> None:
    if (sample_ids is None) == (cu_seqlens is None):
        raise ValueError("give exactly one of sample_ids and cu_seqlens")
    check_device(targets.device, sample_ids=sample_ids, cu_seqlens=cu_seqlens)
    if sample_ids is not None:
        check_shape("sample_ids", sample_ids, tuple(targets.shape))
    elif cu_seqlens is not None and cu_seqlens.shape[0] < num_samples + 1:
        raise ValueError(f"cu_seqlens has {cu_seqlens.shape[0]} entries, expected at least num_samples + 1 = {num_samples + 1}")


def _token_weight(token_weight: Tensor | float | None, targets: Tensor, dtype: torch.dtype) -> Tensor | None:
    if token_weight is None:
        return None
    if not isinstance(token_weight, Tensor):
        return torch.full((), token_weight, dtype=dtype, device=targets.device)
    if token_weight.requires_grad:
        raise ValueError("token_weight requires a gradient, which linear_cross_entropy does not give: detach it")
    check_device(targets.device, token_weight=token_weight)
    if token_weight.dim() != 0:
        check_shape("token_weight", token_weight, tuple(targets.shape))
    return token_weight


def _check_signature(signature: tuple[Tensor, Tensor] | None, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if signature is None:
        return None, None
    left, right = signature
    for name, matrix in (("signature[0]", left), ("signature[1]", right)):
        check_shape(name, matrix, (hidden.shape[1], left.shape[1]))
        check_device(hidden.device, **{name: matrix})
    return left, right


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The operands as `torch.nn.Linear` would take them: inside `torch.autocast`, in its dtype. Gradients come back in their own."""
    device = next(x for x in tensors if x is not None).device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    sample_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_samples: int,
    token_weight: Tensor | float | None = None,
    signature: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    gradients: Gradients = "auto",
    max_rows: int | None = None,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> HeadLoss:
    """Cross-entropy of `softcap(logit_scale * (hidden @ weight.T + bias))` with statistics per token and per sample.

    hidden: [T, H] and weight: [V, H], one dtype (bf16, fp16, fp32; float64 for tests); targets: int64 [T]; bias: [V]. Inside
    `torch.autocast` they are taken in its dtype. lora: (a [R, H], b [V, R], scale), for a weight of W + scale * b a that is never built.
    sample_ids: int64 [T], non-decreasing, in [0, num_samples); or cu_seqlens: integers [>= num_samples + 1], rows of each sample.
    token_weight: float, 0-d or [T]; by default 1 / counted rows, the mean. softcap: c, for c tanh(x / c).

    loss = sum_t token_weight_t * ((1 - s) NLL_t + s (lse_t - mean_j z_tj) + z_loss * lse_t^2); `token_nll` and `sample_nll` are the plain
    NLL. Differentiable, once, with respect to hidden, weight, bias and lora, each where it requires a gradient.

    gradients: when they are computed.
      "forward": those of `loss` with the loss, chunk by chunk, and scaled by the upstream scalar in the backward pass: 3 products of
      2 T V H FLOPs, 2 where the weight is frozen. token_nll and sample_nll carry none.
      "recompute": in the backward pass, from the logits computed anew (4 products), for any upstream gradients at loss, token_nll and
      sample_nll.
      "auto": as "forward" while a gradient arrives at loss alone, else as "recompute"; it holds on to hidden for that. In a function
      compiled by torch.compile, results that it returns are taken to have upstream gradients: give "forward" there, or detach them.

    signature: (P, Q), each [H, q]: phi_i = (1/n_i) sum_t (P^T e_t)(Q^T h_t)^T over sample i's counted rows, e_t the gradient of the plain
    NLL of row t at its hidden state, whatever its token_weight. It costs two thin products; with smoothing or z-loss, where e_t differs
    from the loss's gradient, one more V x H product and a second block of logits.

    Memory beside inputs and gradients: one chunk of logits of at most `chunk_bytes` (by default 64 MiB on a CPU; 1 GiB, and at least 2048
    rows, on a GPU), and, with several chunks, the weight's gradient in fp32. logits_dtype: by default the inputs', as in unfused PyTorch;
    torch.float32 keeps the products' accumulator, at twice the bytes.

    Ignored rows are left out of the products. On a GPU their number is read from the device, unless max_rows, the most that can count, is
    given: then nothing waits for the device, and that many rows are computed (more counted targets than that: a device-side assertion).
    All rows ignored: loss 0, gradients 0. Logits' gradients are formed in fp32, the one-hot subtracted before rounding; the weight's are
    added up in fp32. No atomics: two runs agree bit for bit.

    Raises ValueError on shapes, dtypes, devices, a DTensor, or a target outside [0, V) (on a GPU a device-side assertion).
    """
    hidden, weight, bias, *adapter = _autocast(hidden, weight, bias, *(() if lora is None else lora[:2]))  # type: ignore[assignment]
    lora = None if lora is None else Lora(*adapter, float(lora[2]))  # type: ignore[arg-type]
    _check(hidden, weight, targets, bias, lora)
    _check_samples(sample_ids, cu_seqlens, num_samples, targets)
    left, right = _check_signature(signature, hidden)
    token_weight = _token_weight(token_weight, targets, wide(hidden.dtype))
    logits_dtype = _logits_dtype(logits_dtype, hidden.dtype)
    if gradients not in ("auto", "forward", "recompute"):
        raise ValueError(f'gradients is {gradients!r}, expected "auto", "forward" or "recompute"')

    tracks = torch.is_grad_enabled()
    now = tracks and gradients != "recompute"
    a, b = (None, None) if lora is None else (lora.a, lora.b)
    wants = [now and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    want_lora = now and lora is not None and (lora.a.requires_grad or lora.b.requires_grad)
    with without_autocast(hidden.device):
        loss, token_nll, sample_nll, sample_tokens, _, phi, *_ = head(
            hidden, weight, bias, a, b, targets, sample_ids, cu_seqlens, num_samples, token_weight, left, right, *wants, want_lora,
            tracks and gradients != "forward", 1.0 if lora is None else lora.scale, softcap, logit_scale, label_smoothing, z_loss,
            ignore_index, max_rows, chunk_bytes, logits_dtype,
        )  # fmt: skip
    if gradients == "forward":
        token_nll, sample_nll = token_nll.detach(), sample_nll.detach()
    return HeadLoss(loss, token_nll, sample_nll, sample_tokens.detach(), None if signature is None else phi.detach())


def _logits_dtype(asked: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    if asked in (None, dtype):
        return dtype
    if asked == torch.float32 and dtype in HALVES:
        return torch.float32
    raise ValueError(f"logits_dtype is {asked}, expected {dtype}{' or torch.float32' if dtype in HALVES else ''}")
