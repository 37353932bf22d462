"""AdamW with moments in 8 bits, over FSDP2's shards.

The quantisation is bitsandbytes' blockwise dynamic one (arXiv 2110.02861).

bitsandbytes' own AdamW8bit knows no DTensor, counts steps on the host, and cuts blocks of 256 out of whatever flat
piece of a parameter it is given. Here a block never crosses a row, and FSDP shards rows; so codes and scales are
sharded like the parameter itself, are the same on any number of ranks, and go through torch.distributed.checkpoint as
they are: a checkpoint holds 8 bits, not the moments in full. Where rows are multiples of 256 long, the blocks are
bitsandbytes'.

Legend: n rows, c columns (all further dimensions of a parameter), k blocks in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from lead_engine.model.bnb import bitsandbytes_functional

_BLOCKS = (64, 128, 256)
"""Block sizes; rows shorter than a block are padded to one.

bitsandbytes' GPU kernels know none below 64, its optimizer takes 256.
"""
_SMALL = 4096
"""Parameters of fewer numbers keep fp32 moments, as bitsandbytes' do; so do vectors, of any size."""
_PIECE = 1 << 24
"""Numbers whose moments are fp32 at a time: bounds the scratch memory to about 250 MiB."""


class _Piece(NamedTuple):
    """Some rows of a parameter on this rank, and their state: views."""

    parameter: Tensor
    gradient: Tensor
    step: Tensor
    moments: tuple[_Moment, _Moment]
    """Of first and second order."""


class _Moment(NamedTuple):
    """A moment: fp32 [n, c], or 8-bit codes.

    `values`: the moment itself (`levels` is None), or codes uint8 [n, c]; `scales`: fp32 [n, k]; `levels`: the 256
    numbers that codes stand for.
    """

    values: Tensor
    scales: Tensor | None
    levels: Tensor | None

    def read(self) -> Tensor:
        if self.scales is None or self.levels is None:
            return self.values
        width, block = _blocks(self.values.shape[1])
        codes = _pad(self.values, width)
        scales = self.scales.reshape(-1)
        whole: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(codes, scales, self.levels, block, torch.float32)
        return whole[:, : self.values.shape[1]].contiguous()

    def write(self, moment: Tensor, skip: Tensor | None) -> None:
        """Store [n, c], unless `skip` (0-d bool): rounding a moment that was read need not give back its codes."""
        if self.scales is None:
            return  # updated in place
        width, block = _blocks(moment.shape[1])
        codes, scales = torch.ops.bitsandbytes.quantize_blockwise(_pad(moment, width), self.levels, block)
        codes, scales = codes.view(-1, width)[:, : moment.shape[1]], scales.view(self.scales.shape)
        for held, new in ((self.values, codes), (self.scales, scales)):
            if skip is None:
                held.copy_(new)
            else:
                torch.where(skip, held, new, out=held)


class AdamW8bit(torch.optim.Optimizer):
    """`torch.optim.AdamW` with both moments of matrices in 8 bits; parameters and gradients are fp32.

    Honours the attributes `found_inf` (0-d fp32 on the parameters' device: 1 leaves parameters and state as they are,
    bit for bit) and `grad_scale` as torch's fused optimizers do. No step waits for the device. Raises UserError where
    bitsandbytes is missing, ValueError for parameters that are not fp32 or are sharded other than by rows.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        functional = bitsandbytes_functional("--optimizer.kind adamw8bit")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for parameter in self._parameters():
            _check(parameter)
        maps = [functional.create_dynamic_map(signed=signed) for signed in (True, False)]
        self._levels = {
            device: [levels.to(device) for levels in maps] for device in {_local(p).device for p in self._parameters()}
        }

    def _parameters(self) -> Iterable[nn.Parameter]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for group in self.param_groups:
            stepped = [p for p in group["params"] if p.grad is not None]
            for parameter in stepped:
                if not self.state[parameter]:
                    self.state[parameter] = _new_state(parameter)
            for pieces in _together(chain.from_iterable(self._pieces(p) for p in stepped)):
                _update(pieces, group, found_inf, grad_scale)
            for parameter in stepped:
                step = self.state[parameter]["step"]
                step += 1 if found_inf is None else 1 - found_inf.to(step.device)
        return loss

    def _pieces(self, parameter: nn.Parameter) -> Iterator[_Piece]:
        """This rank's rows of a parameter that has a gradient, few enough at a time."""
        assert parameter.grad is not None
        state, value, gradient = self.state[parameter], _rows(parameter), _rows(parameter.grad)
        levels: list[Tensor | None] = [None, None]
        if "exp_avg_scales" in state:
            levels = [*self._levels[value.device]]
        moments = [
            (_rows(state[name]), _rows(state[f"{name}_scales"]) if f"{name}_scales" in state else None)
            for name in ("exp_avg", "exp_avg_sq")
        ]
        count = max(1, _PIECE // _blocks(value.shape[1])[0])
        for low in range(0, value.shape[0], count):
            rows = slice(low, low + count)
            first, second = (
                _Moment(values[rows], None if scales is None else scales[rows], level)
                for (values, scales), level in zip(moments, levels, strict=True)
            )
            yield _Piece(value[rows], gradient[rows], state["step"], (first, second))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but codes stay uint8 (torch's own makes all state the parameter's dtype).

        Raises ValueError for foreign state.
        """
        super().load_state_dict({**state_dict, "state": {}})
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for number, parameter in zip(numbers, self._parameters(), strict=True):
            saved = state_dict["state"].get(number)
            if saved is None:
                continue
            state = _new_state(parameter)
            if saved.keys() != state.keys() or any(saved[key].dtype != state[key].dtype for key in state):
                raise ValueError(f"state of another optimizer: {sorted(saved)}, expected {sorted(state)}")
            for key, value in state.items():
                value.copy_(saved[key])
            self.state[parameter] = state


def _update(pieces: list[_Piece], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
    """AdamW on some pieces by torch's fused kernel, which reads the step count and found_inf on the device."""
    if not pieces:
        return
    first, second = ([piece.moments[order].read() for piece in pieces] for order in (0, 1))
    rounded = [place for place, piece in enumerate(pieces) if piece.moments[0].scales is not None]
    if rounded and (bound := _bound(*group["betas"])):
        least = torch._foreach_mul([first[place] for place in rounded], [first[place] for place in rounded])
        torch._foreach_mul_(least, 1 / bound)
        torch._foreach_maximum_([second[place] for place in rounded], least)
    adamw(
        [piece.parameter for piece in pieces],
        [piece.gradient for piece in pieces],
        first,
        second,
        [],
        [piece.step.clone() for piece in pieces],  # it counts; a parameter's pieces must all see the same count
        fused=True,
        found_inf=found_inf,
        grad_scale=grad_scale,
        amsgrad=False,
        maximize=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )
    skip = None if found_inf is None else found_inf.to(pieces[0].step.device) != 0
    for piece, *moments in zip(pieces, first, second, strict=True):
        for moment, value in zip(piece.moments, moments, strict=True):
            moment.write(value, skip)


def _bound(beta1: float, beta2: float) -> float:
    """The most that m^2 / v can be; 0 where there is no bound.

    By Cauchy-Schwarz over the gradients' history: m^2 <= (1-b1)^2 sum_k (b1^2/b2)^k sum_k b2^k g_k^2 = (1-b1)^2 / (1 -
    b1^2/b2) v / (1-b2). Rounded moments break it where v fell to level 0 and m did not; the next step would then be m /
    eps, thousands of learning rates long. Raising v to m^2 / bound restores it.
    """
    return (1 - beta1) ** 2 / ((1 - beta2) * (1 - beta1**2 / beta2)) if beta1**2 < beta2 else 0.0


def _together(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces in lists of at most _PIECE numbers (or one piece): small parameters share a kernel."""
    group: list[_Piece] = []
    numbers = 0
    for piece in pieces:
        if group and numbers + piece.parameter.numel() > _PIECE:
            yield group
            group, numbers = [], 0
        group.append(piece)
        numbers += piece.parameter.numel()
    yield group


def _new_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Zero moments, sharded as the parameter is."""
    local, shape = _local(parameter), parameter.shape
    state = {"step": torch.zeros((), dtype=torch.float32, device=local.device)}
    # Of the whole parameter: not a matter of how many ranks there are.
    small = parameter.ndim < 2 or parameter.numel() < _SMALL
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = _sharded(torch.zeros_like(local, dtype=torch.float32 if small else torch.uint8), parameter, shape)
        if not small:
            width, block = _blocks(math.prod(shape[1:]))
            scales = local.new_zeros(local.shape[0], width // block, dtype=torch.float32)
            state[f"{name}_scales"] = _sharded(scales, parameter, torch.Size([shape[0], width // block]))
    return state


def _blocks(columns: int) -> tuple[int, int]:
    """(columns padded to whole blocks, block size)."""
    block = next((size for size in _BLOCKS if columns <= size), _BLOCKS[-1])
    return -(-columns // block) * block, block


def _pad(rows: Tensor, width: int) -> Tensor:
    return rows if rows.shape[1] == width else nn.functional.pad(rows, (0, width - rows.shape[1]))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows(tensor: Tensor) -> Tensor:
    """A view of this rank's part as a matrix [n, c]."""
    local = _local(tensor)
    return local.view(local.shape[0], -1) if local.numel() else local.reshape(0, 1)


def _sharded(local: Tensor, parameter: Tensor, shape: torch.Size) -> Tensor:
    """`local` as this rank's part of a tensor of `shape`, placed as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return local
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def _check(parameter: nn.Parameter) -> None:
    if parameter.dtype != torch.float32:
        raise ValueError(f"a parameter is {parameter.dtype}; 8-bit AdamW updates fp32 parameters")
    for place in parameter.placements if isinstance(parameter, DTensor) else ():
        if not place.is_replicate() and not place.is_shard(0):
            raise ValueError(f"a parameter is sharded as {place}; 8-bit AdamW wants whole rows on a rank (Shard(0))")
