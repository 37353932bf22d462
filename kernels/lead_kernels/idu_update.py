"""The running estimate of every sample's utility (instance-level dynamic uncertainty)."""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from lead_kernels.backend import KernelBuild, cdiv, current_device, num_warps, tl, triton, uses_kernels
from lead_kernels.checks import check_device, check_shape

LOSS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = THREADS = 256  # a step has some thousand samples: one for each thread, and as many programs as that makes
NO_FUSION = {"enable_fp_fusion": False}
"""A fused multiply-add rounds once, the host twice: the last bit of U, and so the order of samples, would differ."""


@triton.jit
@no_type_check
def _idu_kernel(
    utility, visits, sample_ids, loss, change, share_new, share_old, num_ids, num_samples, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sample a lane: utility and visits, both [N + 1], of the samples that a step has trained."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_ids
    sample = tl.load(sample_ids + place, mask=inside, other=0)
    real = inside & (sample < num_samples)
    before = tl.load(loss + place, mask=real, other=0.0).to(tl.float32)
    seen = before + tl.load(change + place, mask=real, other=0.0).to(tl.float32)
    old = tl.load(utility + sample, mask=real, other=0.0)
    tl.store(utility + sample, share_new * seen + share_old * old, mask=real)
    tl.store(visits + sample, tl.load(visits + sample, mask=real, other=0) + 1, mask=real)


def _on_gpu(
    utility: Tensor, visits: Tensor, sample_ids: Tensor, loss: Tensor, change: Tensor, smoothing: float
) -> None:
    num_ids = sample_ids.numel()
    _idu_kernel[(cdiv(num_ids, BLOCK),)](
        utility, visits, sample_ids.contiguous(), loss.contiguous(), change.contiguous(), 1.0 - smoothing, smoothing,
        num_ids, utility.shape[0] - 1,
        BLOCK=BLOCK, num_warps=num_warps(THREADS, utility), **NO_FUSION,
    )  # fmt: skip


def _on_host(
    utility: Tensor, visits: Tensor, sample_ids: Tensor, loss: Tensor, change: Tensor, smoothing: float
) -> None:
    ids = sample_ids.flatten()
    real = ids < utility.shape[0] - 1
    ids, seen = ids[real], loss.flatten()[real].float() + change.flatten()[real].float()
    utility[ids] = (1.0 - smoothing) * seen + smoothing * utility[ids]
    visits[ids] += 1


@torch.library.custom_op("lead_kernels::idu_update", mutates_args=("utility", "visits"))
def _idu_update(
    utility: Tensor, visits: Tensor, sample_ids: Tensor, loss: Tensor, change: Tensor, smoothing: float
) -> None:
    if sample_ids.numel() == 0:
        return
    form = _on_gpu if uses_kernels(utility) else _on_host
    with current_device(utility):
        form(utility, visits, sample_ids, loss, change, smoothing)


@_idu_update.register_fake
def _(utility: Tensor, visits: Tensor, sample_ids: Tensor, loss: Tensor, change: Tensor, smoothing: float) -> None:
    return None


def idu_update(
    utility: Tensor, visits: Tensor, sample_ids: Tensor, loss: Tensor, change: Tensor, smoothing: float
) -> None:
    """In place: U_i <- (1 - b) (L_i + dL_i) + b U_i and one more visit, for the samples of one optimizer step.

    Source: arXiv 2505.07437, the definition of IDU. The arithmetic is fp32.

    Args:
        utility: fp32 [N+1], contiguous; U. The last entry belongs to the dummy id N.
        visits: int32 [N+1], contiguous.
        sample_ids: int64 of any shape, each real id at most once. N may stand any number of times: nothing of it is
            read or written, so that the state stays deterministic.
        loss, change: L and dL, fp32, bf16 or fp16 in the shape of sample_ids.
        smoothing: b.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not match.
    """
    check_shape("utility", utility, (utility.shape[0],), (torch.float32,))
    check_shape("visits", visits, tuple(utility.shape), (torch.int32,))
    check_shape("sample_ids", sample_ids, tuple(sample_ids.shape), (torch.int64,))
    check_shape("loss", loss, tuple(sample_ids.shape), LOSS_DTYPES)
    check_shape("change", change, tuple(sample_ids.shape), LOSS_DTYPES)
    check_device(utility.device, visits=visits, sample_ids=sample_ids, loss=loss, change=change)
    if not (utility.is_contiguous() and visits.is_contiguous()):
        raise ValueError("utility and visits must be contiguous: they are changed in place")
    _idu_update(utility, visits, sample_ids, loss.detach(), change.detach(), smoothing)


def builds() -> list[KernelBuild]:
    """The types that a head's loss and an estimated change come in."""
    numbers = {"share_new": "fp32", "share_old": "fp32", "num_ids": "i32", "num_samples": "i32", "BLOCK": "constexpr"}
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        signature = {
            "utility": "*fp32", "visits": "*i32", "sample_ids": "*i64", "loss": f"*{kind}", "change": "*fp32",
            **numbers,
        }  # fmt: skip
        found.append(
            KernelBuild(f"idu_update {kind}", _idu_kernel, signature, {"BLOCK": BLOCK}, THREADS, options=NO_FUSION)
        )
    return found
