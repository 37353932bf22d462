"""Which groups of the pool still have a sample for which a mask holds."""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from lead_kernels.backend import KernelBuild, current_device, num_warps, tl, triton, uses_kernels
from lead_kernels.checks import GROUP_DTYPES, check_device, check_shape
from lead_kernels.radix_kernels import load_block
from lead_kernels.radix_select import THREADS, launch_shape


@triton.jit(do_not_specialize=["tiles"])
@no_type_check
def present_kernel(mask, group, present, num_samples, tiles, BLOCK: tl.constexpr):
    """present[group] = 1 where `mask` holds. Only the first to see a 0 writes: a pool would queue at few addresses."""
    for tile in range(tiles):
        start = (tl.program_id(0).to(tl.int64) * tiles + tile) * BLOCK
        holds = load_block(mask, start, num_samples, BLOCK) != 0
        label = load_block(group, start, num_samples, BLOCK).to(tl.int64)
        new = tl.load(present + label, mask=holds, other=1) == 0
        tl.store(present + label, tl.full([BLOCK], 1, tl.uint8), mask=new)


@torch.library.custom_op("lead_kernels::groups_present", mutates_args=())
def _groups_present(mask: Tensor, group: Tensor, num_groups: int) -> Tensor:
    present = torch.zeros(num_groups, dtype=torch.uint8, device=mask.device)
    if uses_kernels(mask):
        launch = launch_shape(mask.shape[0], 1)
        with current_device(mask):
            present_kernel[(launch.programs,)](
                mask.contiguous(), group.contiguous(), present, mask.shape[0], launch.tiles,
                BLOCK=launch.block, num_warps=num_warps(THREADS, mask),
            )  # fmt: skip
    else:
        present.scatter_reduce_(0, group.long(), mask.to(torch.uint8), "amax")
    return present.view(torch.bool)


@_groups_present.register_fake
def _(mask: Tensor, group: Tensor, num_groups: int) -> Tensor:
    return mask.new_empty((num_groups,))


def groups_present(mask: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """bool [num_groups]: whether `mask` holds for at least one sample of each group.

    Answers which clusters still have eligible samples without counting them: atomics of a whole pool on a few counters
    would queue up. Reads each sample once.

    Args:
        mask: bool [N].
        group: integer [N] in [0, num_groups), which is not checked.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    check_shape("group", group, (mask.shape[0],), GROUP_DTYPES)
    check_shape("mask", mask, (mask.shape[0],), (torch.bool,))
    check_device(mask.device, group=group)
    present: Tensor = _groups_present(mask, group, num_groups)
    return present


def builds() -> list[KernelBuild]:
    """Every type of `group`."""
    found = []
    for kind in ("u8", "i16", "i32", "i64"):
        signature = {
            "mask": "*i1", "group": f"*{kind}", "present": "*u8", "num_samples": "i32", "tiles": "i32",
            "BLOCK": "constexpr",
        }  # fmt: skip
        constants = {"BLOCK": launch_shape(1, 1).block}
        found.append(KernelBuild(f"groups_present {kind}", present_kernel, signature, constants, THREADS))
    return found
