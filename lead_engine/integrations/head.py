"""The engine's loss op behind a transformers model's `forward`, and the questions put to it before it is trusted.

The model is called as ever, so that whatever wraps it (DDP, peft, autocast) takes part; with the argument `lead` its forward goes through
the decoder and the loss op, and makes no logits.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lead_engine.base.errors import UserError
from lead_kernels import HeadLoss, linear_cross_entropy

CHECKED_ROWS = 64
"""Response tokens of the first batch whose loss is computed by the model's own logits too."""
LEAK = 1e-3
"""Nats by which a sample's token losses may move when its neighbour in a flattened batch is another one. They should not move at all."""


@dataclass
class HeadCall:
    """One micro-batch's argument to the loss op. R rows, B slots."""

    rows: Tensor
    """int64 [R]: flat places in the batch whose next token is to be learned."""
    targets: Tensor
    """int64 [R]: that token; -100 in a batch without any."""
    row_slots: Tensor
    """int64 [R]: the sample's slot, non-decreasing."""
    slots: int
    token_weight: Tensor | float | None = None
    signature: tuple[Tensor, Tensor] | None = None
    keep_gradient: bool = False
    with_metrics: bool = False
    """Also every row's entropy and prediction, at no further product."""
    kept: list[Tensor] = field(default_factory=list)
    """With keep_gradient: the hidden rows and, after the backward pass, the loss gradient there, each [R, H]."""


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside peft's."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def install(model: nn.Module) -> None:
    """Give the model's forward the argument `lead`. Nothing changes without it. UserError for models whose head it cannot compute."""
    base = base_of(model)
    if getattr(base, "_lead_installed", False):
        return
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise UserError("model: prompt-learning adapters shift the tokens' places; LEAD works with LoRA and its kin")
    projection_of(base)
    text = base.config.get_text_config()
    if getattr(text, "output_router_logits", False) and getattr(text, "router_aux_loss_coef", 0.0):
        raise UserError(
            "model: its router's auxiliary loss would be left out; switch it off (SFTConfig(router_aux_loss_coef=0.0), or "
            "model.config.output_router_logits = False)"
        )
    original = base.forward
    own = getattr(original, "__self__", None) is base  # of a copy of the model, it must be the copy's

    @functools.wraps(type(base).forward)
    def forward(self: nn.Module, *args: Any, lead: HeadCall | None = None, **kwargs: Any) -> Any:
        if lead is None:
            return original.__func__(self, *args, **kwargs) if own else original(*args, **kwargs)
        for name in ("labels", "logits_to_keep", "num_items_in_batch", "return_dict"):
            kwargs.pop(name, None)
        hidden = self.get_decoder()(*args, **kwargs, return_dict=True).last_hidden_state
        return _loss(self, hidden, lead)

    base.forward = MethodType(forward, base)
    base._lead_installed = True


def projection_of(base: nn.Module) -> nn.Module:
    """The LM head as a module with weight [V, H] and bias. UserError where it is another thing, or wears an adapter."""
    kind = base.config.model_type
    if getattr(base.config, "is_encoder_decoder", False):
        raise UserError(f"model: a {kind} model is an encoder and a decoder; LEAD works with decoders alone")
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is not None and hasattr(head, "modules_to_save"):  # peft's: a trained copy of the whole head
        head = head.modules_to_save[head.active_adapters[0]]
    if hasattr(head, "base_layer"):
        raise UserError(
            "model: an adapter on the LM head is not computed here; take lm_head out of target_modules (modules_to_save works)"
        )
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point() or not hasattr(base, "get_decoder"):
        raise UserError(
            f"model: a {kind} model with the head {type(head).__name__}; decoders with a linear LM head in floating point work"
        )
    return head


def _loss(base: nn.Module, hidden: Tensor, call: HeadCall) -> HeadLoss:
    head, text = projection_of(base), base.config.get_text_config()
    rows = hidden.flatten(0, 1).index_select(0, call.rows)
    if call.keep_gradient and rows.requires_grad:
        call.kept.append(rows.detach())
        rows.register_hook(lambda gradient: call.kept.append(gradient.detach()))
    if not torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(head.weight.dtype)
    scale = getattr(text, "logit_scale", None) or 1.0 / (getattr(text, "logits_scaling", None) or 1.0)
    return linear_cross_entropy(
        rows,
        head.weight,
        call.targets,
        sample_ids=call.row_slots,
        num_samples=call.slots,
        token_weight=call.token_weight,
        signature=call.signature,
        bias=head.bias,
        softcap=getattr(text, "final_logit_softcapping", None),
        logit_scale=scale,
        gradients="forward",
        max_rows=len(call.targets),
        return_entropy=call.with_metrics,
        return_predicted=call.with_metrics,
    )


@torch.no_grad()
def check(model: nn.Module, inputs: dict[str, Any], call: HeadCall, flattened: bool) -> None:
    """Two questions to the first batch: are these the model's own losses, and does no sample see another? UserError if not.

    Models differ in what stands between the last hidden state and the logits (scales, soft caps), and whether samples that share a row are
    kept apart depends on attention kind, versions and options: both are measured rather than read from a list. Changes the model's mode
    for the time of the check.
    """
    training = model.training
    model.eval()
    try:
        plain = HeadCall(call.rows, call.targets, call.row_slots, call.slots)
        ours = model(**inputs, lead=plain).token_nll
        _check_head(model, inputs, plain, ours)
        if flattened:
            _check_isolation(model, inputs, plain, ours)
    finally:
        model.train(training)


def _check_head(model: nn.Module, inputs: dict[str, Any], call: HeadCall, ours: Tensor) -> None:
    """One row of the batch, so that the logits take little memory."""
    length = inputs["input_ids"].shape[1]
    mine = (call.rows < length).nonzero()[:CHECKED_ROWS, 0]
    one = {
        k: v[:1] if isinstance(v, Tensor) and v.ndim and v.shape[0] == inputs["input_ids"].shape[0] else v
        for k, v in inputs.items()
    }
    few = "logits_to_keep" in inspect.signature(type(base_of(model)).forward).parameters
    logits = model(**one, **({"logits_to_keep": call.rows[mine]} if few else {})).logits[0].float()
    logits = logits if few else logits[call.rows[mine]]
    counts = call.targets[mine] != -100
    theirs = nn.functional.cross_entropy(logits[counts], call.targets[mine][counts], reduction="none")
    error = (theirs - ours[mine][counts]).abs().mean()
    limit = 0.02 * (1 + theirs.abs().mean()) if ours.numel() else 0.0
    if counts.any() and not bool(error <= limit):
        raise UserError(
            f"model: the mean loss of {int(counts.sum())} tokens is {float(theirs.mean()):.4f} by the model's own logits and "
            f"{float(ours[mine][counts].mean()):.4f} by its last hidden state and LM head: something else stands between them"
        )


def _check_isolation(model: nn.Module, inputs: dict[str, Any], call: HeadCall, ours: Tensor) -> None:
    """Other tokens in the first sample must leave the other samples' losses as they are: same shapes, so even rounding is the same."""
    start = (
        int((inputs["position_ids"][0] == 0).nonzero()[1]) if bool((inputs["position_ids"][0] == 0).sum() > 1) else 0
    )
    if start == 0:
        return
    tokens = inputs["input_ids"].clone()
    tokens[0, :start] = tokens[0, :start].flip(0).roll(1) + 1
    tokens.clamp_(max=base_of(model).config.get_text_config().vocab_size - 1)
    moved = (model(**{**inputs, "input_ids": tokens}, lead=call).token_nll - ours)[call.rows >= start].abs()
    if moved.numel() and not bool(moved.max() <= LEAK):
        raise UserError(
            f"padding-free batches: samples see each other (losses moved by up to {float(moved.max()):.3f} nats when the sample before was "
            "changed); use attn_implementation='flash_attention_2' or 'sdpa' with position_ids, or padding_free=False"
        )
