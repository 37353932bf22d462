"""A Hugging Face causal language model that takes a packed micro-batch and returns the loss.

The final norm and the LM head become one module whose forward *is* the loss, applied to the rows that predict a
response token and to no others. Under FSDP it is a unit of its own, so the head's weight is an ordinary unsharded
tensor while the loss op reads it (taking `full_tensor()` of a sharded weight instead gives a wrong gradient under mixed
precision).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from lead_engine.base.errors import UserError
from lead_engine.model import adapter
from lead_engine.model.attention import Held, Packing
from lead_engine.model.stored import Layout
from lead_kernels import HeadLoss, PackedBatch, linear_cross_entropy, segment_reduce

FINAL_NORMS = ("norm", "final_layernorm")
"""What decoders call their last norm; the second is Phi's."""


class LossHead(nn.Module):
    """Final norm, LM head (and its adapter, if it has one) and cross-entropy.

    keep_gradient: keep the normed rows and, after the backward pass, the loss gradient there (for the exact inner
    product).
    """

    def __init__(
        self,
        norm: nn.Module,
        projection: nn.Module,
        *,
        softcap: float | None,
        logit_scale: float,
        chunk_bytes: int | None,
    ):
        super().__init__()
        self.norm = norm
        self.projection: Any = projection
        """nn.Linear, or peft's layer around one."""
        self.softcap, self.logit_scale, self.chunk_bytes = softcap, logit_scale, chunk_bytes
        self.keep_gradient = False
        self.hidden_RH: Tensor | None = None
        self.hidden_grad_RH: Tensor | None = None

    def forward(
        self,
        hidden_TH: Tensor,
        batch: PackedBatch,
        token_weight: Tensor | float | None,
        signature: tuple[Tensor, Tensor] | None,
    ) -> HeadLoss:
        hidden_RH = self.norm(hidden_TH.index_select(0, batch.rows))
        if self.keep_gradient and hidden_RH.requires_grad:
            self.hidden_RH, self.hidden_grad_RH = hidden_RH.detach(), None
            hidden_RH.register_hook(self._keep)
        return linear_cross_entropy(
            hidden_RH,
            self.projection.weight,
            batch.targets,
            sample_ids=batch.row_slots,
            num_samples=batch.sample_ids.shape[0],
            token_weight=token_weight,
            signature=signature,
            bias=self.projection.bias,
            lora=adapter.lora_of(self.projection),
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            gradients="forward",
            max_rows=batch.targets.shape[0],  # nearly all of them count, and the device need not be asked how many
            chunk_bytes=self.chunk_bytes,
        )

    def _keep(self, gradient: Tensor) -> None:
        self.hidden_grad_RH = gradient.detach()


class PackedLM(nn.Module):
    """decoder (embedding and blocks of a transformers model) followed by a LossHead.

    Parameter names are `decoder.*`, `head.norm.*` and `head.projection.*`; `checkpoint_names` maps them to Hugging
    Face's. `stored` says where they lie in the checkpoint that they were loaded from.
    """

    def __init__(self, model: PreTrainedModel, *, attention: str, max_length: int, chunk_bytes: int | None):
        super().__init__()
        # Attributes of transformers' decoders vary with the architecture, so mypy cannot know them.
        decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
        projection: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        final_norm = next((name for name in FINAL_NORMS if hasattr(decoder, name)), FINAL_NORMS[0])
        for name in (final_norm, "layers", "embed_tokens"):
            if not hasattr(decoder, name):
                raise UserError(
                    f"--model: a {model.config.model_type} model has no decoder.{name}; Llama-like decoders are "
                    "supported"
                )
        if not isinstance(adapter.base_layer(projection), nn.Linear):
            kind = type(projection).__name__
            raise UserError(
                f"--model: the LM head of a {model.config.model_type} model is a {kind}, not a linear layer"
            )
        self.config, self.generation_config = model.config, model.generation_config
        self.peft_config = getattr(model, "peft_config", {}).get("default")
        self.stored: Layout
        """Set by `weights.load`."""
        self.compute_dtype = torch.float32
        self.transforms, self.base_prefix = get_model_conversion_mapping(model), model.base_model_prefix
        within = {module: name for name, module in model.named_modules()}
        norm = getattr(decoder, final_norm)
        # Ours -> theirs: a multimodal model's decoder is not `model`, and Phi's last norm is not `norm`.
        self._names = {"decoder": within[decoder], "head.norm": within[norm], "head.projection": within[projection]}
        self.attention, self.max_length = attention, max_length
        self.compiled = False
        self.keeps_gathered = False
        """Whether sharded weights stay gathered from a step's first micro-batch to its last."""
        setattr(decoder, final_norm, nn.Identity())
        self.decoder: Any = decoder
        text = model.config.get_text_config()
        self.head = LossHead(
            norm,
            projection,
            softcap=getattr(text, "final_logit_softcapping", None),
            logit_scale=getattr(text, "logit_scale", None) or 1.0 / getattr(text, "logits_scaling", 1.0),
            chunk_bytes=chunk_bytes,
        )
        trained = (name for name, parameter in self.named_parameters() if parameter.requires_grad)
        self.adapter_parameters = frozenset(trained if self.peft_config else ())
        """Names of what an adapter's file holds: everything that is trained beside a frozen base."""

    @property
    def hidden_size(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    @property
    def tied(self) -> bool:
        return self.head.projection.weight is self.decoder.embed_tokens.weight

    def hidden(self, batch: PackedBatch, held: Held | None = None) -> Tensor:
        """Last block's output, before the final norm: [T, H]. held: what the host knows of the batch; with it no
        attention kernel is launched for the empty slots at its end.
        """
        # Compiled blocks take the shapes that every micro-batch has: others would be compiled anew.
        known = None if self.compiled else held
        packing = Packing(batch.cu_seqlens, self.max_length, self.attention, batch.input_ids.shape[0], known)
        output = self.decoder(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            return_dict=True,
            packing=packing,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def forward(
        self,
        batch: PackedBatch,
        *,
        token_weight: Tensor | float | None = None,
        signature: tuple[Tensor, Tensor] | None = None,
        held: Held | None = None,
    ) -> HeadLoss:
        """Loss of one micro-batch.

        See `lead_kernels.linear_cross_entropy` for the result (its T is the batch's R rows here), and `hidden` for
        `held`.
        """
        head_loss: HeadLoss = self.head(self.hidden(batch, held), batch, token_weight, signature)
        return head_loss

    def checkpoint_names(self) -> dict[str, str]:
        """Name of a parameter or persistent buffer -> its name in transformers.

        Adapters' own keep a name with `lora_` in it.
        """
        parameters = [name for name, _ in self.named_parameters(remove_duplicate=False)]
        return {name: self._checkpoint_name(name) for name in (*parameters, *self.persistent_buffers())}

    def persistent_buffers(self) -> dict[str, Tensor]:
        """Buffers that belong to the checkpoint (a router's score correction, say; not rotary tables), by name."""
        return {
            f"{prefix}.{name}": buffer
            for prefix, module in self.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }

    def _checkpoint_name(self, name: str) -> str:
        for ours, theirs in self._names.items():
            if name.startswith(f"{ours}."):
                return str(theirs) + name.removeprefix(ours).replace(".base_layer.", ".")
        raise AssertionError(name)


@torch.no_grad()
def mean_hidden(model: PackedLM, batch: PackedBatch, held: Held | None = None) -> Tensor:
    """Mean last-block output over each sample's tokens: fp32 [B, H], 0 for empty slots. held: see `PackedLM.hidden`."""
    hidden_TH = model.hidden(batch, held)
    slots = batch.sample_ids.shape[0]
    place = torch.arange(hidden_TH.shape[0], device=hidden_TH.device, dtype=batch.cu_seqlens.dtype)
    segment = torch.searchsorted(batch.cu_seqlens, place, right=True) - 1  # `slots` in the tail
    sums = segment_reduce(hidden_TH, segment, slots + 1)
    lengths = batch.cu_seqlens.diff()[:slots].clamp(min=1)
    return sums[:slots] / lengths[:, None]
