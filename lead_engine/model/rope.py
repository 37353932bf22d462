"""Rotary embeddings whose frequencies depend on the length of the sequence, for rows that hold many sequences.

transformers looks at the largest position in the whole call, so a long sample would change the frequencies of its short
neighbours.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lead_engine.base.errors import UserError


def settle_rope(decoder: nn.Module, max_length: int) -> None:
    """Make every rotary embedding of a decoder the one that each sample would get alone, in place.

    max_length: longest sample in tokens.

    Raises UserError where that cannot be had.
    """
    for path, module in list(decoder.named_modules()):
        kinds = getattr(module, "rope_type", None)
        if kinds is None or not hasattr(module, "inv_freq"):
            if isinstance(kinds, dict) and (set(kinds.values()) & {"dynamic", "longrope"}):
                raise UserError(f"--model: rotary embeddings of kinds {kinds}, a layer each, are not known here")
            continue
        if kinds == "dynamic":
            if max_length > module.original_max_seq_len:
                raise UserError(
                    "--model: its dynamic rotary embeddings change with samples longer than "
                    f"{module.original_max_seq_len} tokens, and the pool has one of {max_length}: prepare it with "
                    f"--max-length {module.original_max_seq_len}"
                )
            module.rope_type = "default"  # within that length they are constant
        elif kinds == "longrope":
            limit = module.config.rope_parameters["original_max_position_embeddings"]
            if max_length > limit:
                owner, _, name = path.rpartition(".")
                setattr(decoder.get_submodule(owner), name, LongRope(module, limit))
            else:
                module.rope_type = "default"  # the short frequencies, always


class LongRope(nn.Module):
    """Longrope (Phi-3), a sample at a time.

    One set of frequencies for samples of up to `limit` tokens, another for longer ones.
    """

    def __init__(self, rotary: Any, limit: int):
        super().__init__()
        rotary.rope_type, self.limit = "default", limit
        self.short, self.long = rotary, copy.deepcopy(rotary)
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, rotary.inv_freq.device, seq_len=limit + 1)
        self.long.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1, T, D] for positions [1, T] that begin anew with every sample."""
        sample = (position_ids == 0).long().cumsum(-1)
        last = position_ids.new_zeros(1, position_ids.shape[1] + 1).scatter_reduce(1, sample, position_ids, "amax")
        is_long = (last.gather(1, sample) >= self.limit)[..., None]
        long_cos, long_sin = self.long(x, position_ids)
        short_cos, short_sin = self.short(x, position_ids)
        return torch.where(is_long, long_cos, short_cos), torch.where(is_long, long_sin, short_sin)
