"""Argument checks of `linear_cross_entropy`: shapes, dtypes, devices, plain numbers; no values of tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from lead_kernels.checks import check_device, check_shape
from lead_kernels.dtypes import HALVES
from lead_kernels.head_types import Lora

OPERANDS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_transforms(*tensors: Tensor | None) -> None:
    """Forward-mode derivatives would be 0, and torch.func's would fail deep inside: NotImplementedError instead."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is None:
            continue
        if torch._C._functorch.is_gradtrackingtensor(tensor) or forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "linear_cross_entropy has no forward-mode derivative and does not work inside torch.func's jvp, "
                "jacfwd, vjp, grad and hessian: call loss.backward() or torch.autograd.grad, or take "
                "torch.nn.functional.cross_entropy on hidden @ weight.T there"
            )


def check_operands(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, lora: Lora | None) -> None:
    """ValueError unless hidden [..., H], weight [V, H], targets [...], bias [V] and the adapter fit each other."""
    adapter = () if lora is None else (("lora.a", lora.a), ("lora.b", lora.b))
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias), *adapter):
        if hasattr(tensor, "full_tensor"):  # importing DTensor, only to ask, would take as long as importing torch
            raise ValueError(
                f"{name} is a DTensor, a shard: call linear_cross_entropy in the forward of a module that fully_shard "
                "wraps, where parameters are whole (lead_kernels.LinearCrossEntropy is such a module)"
            )
    if hidden.dim() < 1 or weight.dim() != 2:
        found = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"hidden must be [..., H] and weight a matrix [V, H], got shapes {found}")
    (*leading, width), vocabulary = hidden.shape, weight.shape[0]
    if hidden.dtype not in OPERANDS:
        raise ValueError(f"hidden is {hidden.dtype}, expected {' or '.join(map(str, OPERANDS))}")
    if vocabulary == 0:
        raise ValueError("weight has no rows: the vocabulary is empty")
    check_shape("weight", weight, (vocabulary, width), (hidden.dtype,))
    check_shape("targets", targets, tuple(leading), INTEGERS)
    check_device(hidden.device, weight=weight, targets=targets, bias=bias)
    if bias is not None:
        check_shape("bias", bias, (vocabulary,), (hidden.dtype,))
    if lora is not None:
        rank = lora.a.shape[0]
        check_shape("lora.a", lora.a, (rank, width), (hidden.dtype,))
        check_shape("lora.b", lora.b, (vocabulary, rank), (hidden.dtype,))
        check_device(hidden.device, **{"lora.a": lora.a, "lora.b": lora.b})


def check_samples(
    sample_ids: Tensor | None, cu_seqlens: Tensor | None, num_samples: int | None, targets: Tensor
) -> int:
    """The number of samples; 0 where none are asked for. ValueError where the arguments do not say it."""
    check_device(targets.device, sample_ids=sample_ids, cu_seqlens=cu_seqlens)
    if sample_ids is None and cu_seqlens is None:
        if num_samples is not None:
            raise ValueError("num_samples is given without samples: give one of sample_ids and cu_seqlens with it")
        return 0
    if sample_ids is not None and cu_seqlens is not None:
        raise ValueError("give exactly one of sample_ids and cu_seqlens, or neither")
    if sample_ids is not None:
        check_shape("sample_ids", sample_ids, tuple(targets.shape), (torch.int64, torch.int32))
        if num_samples is None:
            raise ValueError("sample_ids needs num_samples: their number is not read from the ids")
    elif cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype not in (torch.int64, torch.int32):
            found = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            raise ValueError(f"cu_seqlens is {found}, expected int64 or int32 [num_samples + 1]")
        num_samples = cu_seqlens.shape[0] - 1 if num_samples is None else num_samples
        if cu_seqlens.shape[0] < num_samples + 1:
            wanted = f"at least num_samples + 1 = {num_samples + 1}"
            raise ValueError(f"cu_seqlens has {cu_seqlens.shape[0]} entries, expected {wanted}")
    assert num_samples is not None
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected at least 1")
    return num_samples


def check_token_weight(token_weight: Tensor | float | None, targets: Tensor, dtype: torch.dtype) -> Tensor | None:
    """token_weight as a tensor of floats, 0-d or of targets' shape."""
    if token_weight is None:
        return None
    if not isinstance(token_weight, Tensor):
        if not math.isfinite(token_weight):
            raise ValueError(f"token_weight is {token_weight}, expected a finite number")
        return torch.full((), token_weight, dtype=dtype, device=targets.device)
    if token_weight.requires_grad:
        raise ValueError("token_weight requires a gradient, which linear_cross_entropy does not give: detach it")
    if not token_weight.is_floating_point():
        raise ValueError(f"token_weight is {token_weight.dtype}, expected a floating-point dtype")
    check_device(targets.device, token_weight=token_weight)
    if token_weight.dim() != 0:
        check_shape("token_weight", token_weight, tuple(targets.shape))
    return token_weight


def check_class_weight(class_weight: Tensor | None, weight: Tensor) -> None:
    if class_weight is None:
        return
    if class_weight.requires_grad:
        raise ValueError("class_weight requires a gradient, which linear_cross_entropy does not give: detach it")
    if not class_weight.is_floating_point():
        raise ValueError(f"class_weight is {class_weight.dtype}, expected a floating-point dtype")
    check_shape("class_weight", class_weight, (weight.shape[0],))
    check_device(weight.device, class_weight=class_weight)


def check_signature(
    signature: tuple[Tensor, Tensor] | None, hidden: Tensor, num_samples: int
) -> tuple[Tensor | None, Tensor | None]:
    if signature is None:
        return None, None
    if not num_samples:
        raise ValueError("signature needs samples: give sample_ids or cu_seqlens")
    left, right = signature
    for name, matrix in (("signature[0]", left), ("signature[1]", right)):
        check_shape(name, matrix, (hidden.shape[-1], left.shape[-1]))
        check_device(hidden.device, **{name: matrix})
        if not matrix.is_floating_point():
            raise ValueError(f"{name} is {matrix.dtype}, expected a floating-point dtype")
    return left, right


def check_numbers(
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    max_rows: int | None,
    chunk_bytes: int | None,
) -> None:
    """ValueError on a number that gives no loss, NaN among them."""
    inf = float("inf")
    _number("softcap", softcap, softcap is None or 0 < softcap < inf, "a number above 0, or None")
    _number("logit_scale", logit_scale, -inf < logit_scale < inf and logit_scale != 0, "a finite number other than 0")
    _number("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "a number in [0, 1)")
    _number("z_loss", z_loss, 0 <= z_loss < inf, "a finite number from 0")
    _number("max_rows", max_rows, max_rows is None or max_rows >= 0, "a whole number from 0, or None")
    _number("chunk_bytes", chunk_bytes, chunk_bytes is None or chunk_bytes > 0, "a whole number above 0, or None")


def _number(name: str, value: Any, right: bool, expected: str) -> None:
    if not right:
        raise ValueError(f"{name} is {value}, expected {expected}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} is {value!r}, expected one of {listed}")


def check_logits_dtype(asked: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the logits: that of the operands, or fp32 for narrower ones."""
    if asked in (None, dtype):
        return dtype
    if asked == torch.float32 and dtype in HALVES:
        return torch.float32
    allowed = f"{dtype} or torch.float32" if dtype in HALVES else str(dtype)
    raise ValueError(f"logits_dtype is {asked}, expected {allowed}")
