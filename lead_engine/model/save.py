"""Writing a trained model in Hugging Face format: a whole model, or a peft adapter folder."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lead_engine.base import fingerprint
from lead_engine.base.errors import UserError
from lead_engine.base.files import publish
from lead_engine.base.fingerprint import Parts
from lead_engine.model import adapter, nf4, weights
from lead_engine.model.adapter_config import name_base
from lead_engine.model.packed import PackedLM
from lead_engine.model.shards import whole
from lead_engine.model.stored import Checkpoint, Layout, Piece
from lead_engine.pool.end_of_turn import write_stop_tokens

BESIDE = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
"""Files that training does not change, copied where the base has them."""


def save_model(
    model: PackedLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    base: Path,
    rank: int,
    parts: Parts | None = None,
) -> None:
    """Write `folder` (model or adapter, config, tokenizer); a collective over all ranks, files by rank 0.

    The folder appears whole: it is written beside its place and renamed. A whole model has the files, names and dtypes
    of the checkpoint that it was loaded from; tensors there that the model does not use (a vision tower, say) are
    copied. generation_config.json stops at the end of turn that the tokenizer's chat template writes, too; in an
    adapter's folder it is for those who read it: transformers and peft take the base's. parts: what the model was
    loaded from (`identity.model_parts`), noted beside an adapter: without its base it is worth nothing.
    """
    building = folder.with_name(folder.name + ".writing")
    if model.peft_config is not None:
        _save_adapter(model, building, base, rank)
    else:
        _save_whole(model, building, rank)
    if rank != 0:
        return
    tokenizer.save_pretrained(building)
    write_stop_tokens(building, tokenizer, model.stored.folder)
    if model.peft_config is not None and parts is not None:
        fingerprint.write(building, {"base": parts.get("base", parts)})
    publish(building, folder)


def _begin(building: Path) -> None:
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)


def _save_adapter(model: PackedLM, building: Path, base: Path, rank: int) -> None:
    tensors = weights.gather_adapter(model, rank)
    if rank == 0:
        _begin(building)
        save_file(tensors, building / adapter.WEIGHTS, {"format": "pt"})
        config = model.peft_config
        assert config is not None
        name_base(config, model.stored.folder)
        config.inference_mode = True
        config.save_pretrained(building)
        if any(nf4.layers(model)):
            nf4.write_config(building, model.compute_dtype)


def _save_whole(model: PackedLM, building: Path, rank: int) -> None:
    """Write a whole model.

    One parameter is whole at a time, on the device; rank 0's host holds only the files that are begun and not finished.
    """
    aliases, files = weights.aliases_of(model), _Files(building, model.stored) if rank == 0 else None
    for name, tensor in weights.base_tensors(model):
        value = whole(tensor)
        if files is not None:
            files.add([piece for alias in aliases[name] for piece in model.stored.pieces.get(alias, [])], value)
    if files is not None:
        files.finish()
        model.config.save_pretrained(building)
        for own in BESIDE:
            if (model.stored.folder / own).exists():
                shutil.copy(model.stored.folder / own, building)
        if model.generation_config is not None and not (building / BESIDE[0]).exists():
            model.generation_config.save_pretrained(building)


class _Files:
    """Safetensors files with a checkpoint's names, each written when the last of its tensors has come.

    What goes wrong is raised by `finish`, not before: the other ranks still wait for this one to gather what is left.
    """

    def __init__(self, folder: Path, stored: Layout):
        self.folder, self.stored = folder, stored
        self.waiting = Counter(stored.file_of[name] for name in stored.dtype_of)
        self.begun: dict[str, dict[str, Tensor]] = {}
        self.sizes: list[int] = []
        self.failure: Exception | None = None
        self._try(_begin, folder)

    def add(self, pieces: list[Piece], value: Tensor) -> None:
        for piece in pieces if self.failure is None else ():
            file = self.stored.file_of[piece.name]
            part = value[piece.index].to("cpu", self.stored.dtype_of[piece.name], copy=True).contiguous()
            self.begun.setdefault(file, {})[piece.name] = part
            self.waiting[file] -= 1
            if not self.waiting[file]:
                self._try(self._write, file)

    def _try(self, action: Callable[..., None], *arguments: object) -> None:
        try:
            action(*arguments)
        except (OSError, SafetensorError, UserError) as error:
            self.failure = self.failure or error
            self.begun.clear()

    def finish(self) -> None:
        """Files of which nothing was trained, and the index.

        Raises OSError, SafetensorError or UserError for what could not be written.
        """
        if self.failure is not None:
            raise self.failure
        files = dict.fromkeys(self.stored.file_of.values())
        for file in files:
            if file not in self.waiting:
                self._write(file)
        if list(files) != [weights.SINGLE]:
            index = {"metadata": {"total_size": sum(self.sizes)}, "weight_map": self.stored.file_of}
            (self.folder / f"{weights.SINGLE}.index.json").write_text(
                json.dumps(index, indent=2, sort_keys=True) + "\n"
            )

    def _write(self, file: str) -> None:
        tensors = self.begun.pop(file, {})
        unused = [
            name for name, there in self.stored.file_of.items() if there == file and name not in self.stored.dtype_of
        ]
        if unused:
            try:
                checkpoint = Checkpoint(self.stored.folder, weights.SINGLE)
                tensors |= {name: checkpoint.tensor(name)[...] for name in unused}
            except (KeyError, UserError) as error:
                raise UserError(
                    f"{self.stored.folder}: {unused[0]} is to be copied from it beside the trained weights; {error}"
                ) from None
        self.sizes += [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
        save_file(tensors, self.folder / file, {"format": "pt"})
