"""The engine's loss op behind a transformers model's `forward`, and two checks of it before it is trusted.

The model is called as ever, so whatever wraps it (DDP, peft, autocast) takes part. With the argument `lead` its forward
runs the decoder and then the loss op, and computes no logits.
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

CHECKED_POSITIONS = 64
"""Of the first batch: as many losses are also computed from the model's own logits."""
LEAK = 1e-3
"""Nats by which a sample's token losses may move when its neighbour changes. They should not move at all."""


@dataclass
class HeadCall:
    """The loss op's arguments for one micro-batch of B slots, in which R positions predict a token to learn."""

    positions: Tensor
    """int64 [R], in the batch flattened to one row, as in `rows.Located`."""
    targets: Tensor
    """int64 [R], the token that each position predicts; -100 in a batch with nothing to learn."""
    slots: Tensor
    """int64 [R], the slot of each position's sample, non-decreasing."""
    num_slots: int
    """B."""
    token_weight: Tensor | float | None = None
    """Weight of each token's loss in the sum; None: 1."""
    signature: tuple[Tensor, Tensor] | None = None
    """The fixed random matrices P and Q of the gradient sketch, if one is wanted."""
    keep_gradient: bool = False
    """Whether to keep the hidden states and the loss gradient there, in `kept`."""
    with_metrics: bool = False
    """Whether to return every position's entropy and prediction too; they cost no further matrix product."""
    kept: list[Tensor] = field(default_factory=list)
    """With keep_gradient: the hidden states [R, H] and, after the backward pass, the loss gradient there [R, H]."""


def base_of(model: Any) -> Any:
    """The transformers model inside a peft model; any other model itself."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def text_config(base: Any) -> Any:
    """A transformers model's configuration of its text decoder."""
    return base.config.get_text_config()


def install(model: nn.Module) -> None:
    """Give the model's forward the argument `lead`. Calls without it stay as they are.

    Raises UserError for models whose loss the op cannot compute.
    """
    base = base_of(model)
    if getattr(base, "_lead_installed", False):
        return
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise UserError("model: prompt-learning adapters shift the positions of tokens; use LoRA or a relative of it")
    projection_of(base)
    text = text_config(base)
    if getattr(text, "output_router_logits", False) and getattr(text, "router_aux_loss_coef", 0.0):
        raise UserError(
            "model: the auxiliary loss of its router would be left out; switch it off "
            "(SFTConfig(router_aux_loss_coef=0.0), or model.config.output_router_logits = False)"
        )
    original = base.forward
    # A bound method of this very model is called through its function, so that a deep copy of the model runs on the
    # copy's weights. A forward that something else has replaced (a hook's closure) is called as it is.
    function = original.__func__ if getattr(original, "__self__", None) is base else None

    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, lead: HeadCall | None = None, **kwargs: Any) -> Any:
        if lead is None:
            return original(*args, **kwargs) if function is None else function(self, *args, **kwargs)
        for name in ("labels", "logits_to_keep", "num_items_in_batch", "return_dict"):
            kwargs.pop(name, None)
        hidden = self.get_decoder()(*args, **kwargs, return_dict=True).last_hidden_state
        return _loss(self, hidden, lead)

    base.forward = MethodType(forward, base)
    base._lead_installed = True


def projection_of(base: Any) -> nn.Linear:
    """The LM head, a module with weight [V, H] and bias. Raises UserError if it is not linear or wears an adapter."""
    kind = base.config.model_type
    if getattr(base.config, "is_encoder_decoder", False):
        raise UserError(f"model: a {kind} model is an encoder and a decoder; LEAD works with decoder-only models")
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is not None and hasattr(head, "modules_to_save"):  # peft's: a trained copy of the whole head
        head = head.modules_to_save[head.active_adapters[0]]
    if hasattr(head, "base_layer"):
        raise UserError(
            "model: the loss op cannot compute an adapter on the LM head; take lm_head out of target_modules "
            "(modules_to_save works)"
        )
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point() or not hasattr(base, "get_decoder"):
        raise UserError(
            f"model: a {kind} model with the head {type(head).__name__}; LEAD works with decoders that have a linear "
            "LM head in floating point"
        )
    return head


def _loss(base: Any, hidden: Tensor, call: HeadCall) -> HeadLoss:
    """hidden: [b, T, H], the decoder's last hidden state."""
    head, text = projection_of(base), text_config(base)
    states = hidden.flatten(0, 1).index_select(0, call.positions)
    if call.keep_gradient and states.requires_grad:
        call.kept.append(states.detach())
        states.register_hook(lambda gradient: call.kept.append(gradient.detach()))
    if not torch.is_autocast_enabled(states.device.type):
        states = states.to(head.weight.dtype)
    # Models name the factor on their logits in two ways: as a factor (Cohere) or as a divisor (Granite).
    scale = getattr(text, "logit_scale", None) or 1.0 / (getattr(text, "logits_scaling", None) or 1.0)
    return linear_cross_entropy(
        states,
        head.weight,
        call.targets,
        sample_ids=call.slots,
        num_samples=call.num_slots,
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
    """Check on the first batch that these are the model's own losses and that no sample sees another.

    Models differ in what stands between the last hidden state and the logits (scales, soft caps). Whether samples that
    share a row are kept apart depends on the kind of attention, on versions and on options. So both are measured rather
    than read from a list. inputs: the batch, without labels. flattened: whether its samples share one row. Raises
    UserError if either check fails. The model is in evaluation mode for the time of the check.
    """
    training = model.training
    model.eval()
    try:
        plain = HeadCall(call.positions, call.targets, call.slots, call.num_slots)
        token_nll = model(**inputs, lead=plain).token_nll
        _check_head(model, inputs, plain, token_nll)
        if flattened:
            _check_isolation(model, inputs, plain, token_nll)
    finally:
        model.train(training)


def _check_head(model: nn.Module, inputs: dict[str, Any], call: HeadCall, token_nll: Tensor) -> None:
    """Compare losses of the batch's first row with those of the model's own logits. token_nll: fp32 [R], the op's."""
    num_rows, length = inputs["input_ids"].shape
    chosen = (call.positions < length).nonzero()[:CHECKED_POSITIONS, 0]
    positions, targets, ours = call.positions[chosen], call.targets[chosen], token_nll[chosen]
    first_row = {
        name: value[:1] if isinstance(value, Tensor) and value.ndim and value.shape[0] == num_rows else value
        for name, value in inputs.items()
    }
    # The logits of a whole row may take more memory than the step itself; most models can compute a few of them.
    if "logits_to_keep" in inspect.signature(type(base_of(model)).forward).parameters:
        logits = model(**first_row, logits_to_keep=positions).logits[0].float()
    else:
        logits = model(**first_row).logits[0].float()[positions]
    learned = targets != -100
    theirs = nn.functional.cross_entropy(logits[learned], targets[learned], reduction="none")
    error = (theirs - ours[learned]).abs().mean()
    limit = 0.02 * (1 + theirs.abs().mean())  # far above rounding in bf16, far below a forgotten scale or cap
    if learned.any() and not bool(error <= limit):
        raise UserError(
            f"model: the mean loss of {int(learned.sum())} tokens is {float(theirs.mean()):.4f} by the model's own "
            f"logits and {float(ours[learned].mean()):.4f} by its last hidden state and LM head: something else stands "
            "between them"
        )


def _check_isolation(model: nn.Module, inputs: dict[str, Any], call: HeadCall, token_nll: Tensor) -> None:
    """Change the first sample of a flattened batch: the losses of the others must stay. token_nll: fp32 [R]."""
    starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0]
    if len(starts) < 2:
        return
    second = int(starts[1])
    # The shapes stay the same, so even rounding is the same in samples that do not see the change.
    tokens = inputs["input_ids"].clone()
    tokens[0, :second] = tokens[0, :second].flip(0).roll(1) + 1
    tokens.clamp_(max=text_config(base_of(model)).vocab_size - 1)
    changed = model(**{**inputs, "input_ids": tokens}, lead=call).token_nll
    moved = (changed - token_nll)[call.positions >= second].abs()
    if moved.numel() and not bool(moved.max() <= LEAK):
        raise UserError(
            f"padding-free batches: samples see each other (losses moved by up to {float(moved.max()):.3f} nats when "
            "the sample before was changed); use attn_implementation='flash_attention_2' or 'sdpa' with position_ids, "
            "or padding_free=False"
        )
