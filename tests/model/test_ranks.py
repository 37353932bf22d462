"""Architectures on two real ranks: an idle rank reduces the same gradients, and a trained model is what transformers
reads.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from forked import in_ranks
from lead_engine.cli import command_line as cli
from lead_engine.config import RuntimeConfig
from lead_engine.model.load import build_model, load_tokenizer
from lead_engine.model.packed import PackedLM
from lead_engine.model.shards import whole
from lead_engine.pool.store import TokenStore
from lead_engine.training import build
from model_kinds import KINDS
from separate import worst

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TRAINED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "phi",
    "phi3",
    "smollm3",
    "qwen3_moe",
    "mixtral",
    "olmoe",
    "glm4_moe",
]
MIXED = ["llama", "gemma2", "phi", "qwen3_moe", "mixtral", "glm4_moe"]


def test_a_rank_without_a_sample_reduces_what_others_do(make_model, make_pool, tmp_path: Path) -> None:
    """Rank 1's micro-batch is empty. Experts that no token of rank 0 chose have a gradient too, 0, on both."""
    store = TokenStore.open(make_pool(samples=30) / "store")
    folders = {kind: make_model(kind, all_random=True, **KINDS[kind]) for kind in MIXED}
    micro_batches = [[3, 17], []]
    weight = 1.0 / float(store.response_rows[micro_batches[0]].sum())

    def gradients(folder: Path, ids: list[int], **options) -> dict[str, Tensor]:
        model = build_model(folder, device=CPU, runtime=RuntimeConfig(precision="fp32"), max_length=64, **options)
        padded = torch.tensor(ids + [store.num_samples] * (3 - len(ids)))
        model(store.batch(padded, capacity=96, num_rows=64), token_weight=weight).loss.backward()
        return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}

    def work(rank: int) -> dict[str, dict[str, Tensor]]:
        mesh = init_device_mesh("cpu", (2,))
        return {kind: gradients(folder, micro_batches[rank], mesh=mesh) for kind, folder in folders.items()}

    together = in_ranks(2, tmp_path / "ranks", work)
    for kind, folder in folders.items():
        alone = gradients(folder, micro_batches[0])
        for rank in together:
            for name, gradient in alone.items():
                assert (rank[kind][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-8, (kind, name)


def fixed_batch(store: TokenStore):
    ids = torch.tensor([2, 5, 8, store.num_samples])
    return store.batch(ids, capacity=128, num_rows=int(store.response_rows[ids[:3]].sum()))


@pytest.mark.parametrize("kind", TRAINED)
def test_trained_on_two_ranks_and_read_by_transformers(kind: str, make_model, make_pool, tmp_path: Path) -> None:
    train_and_compare(
        2, make_model(kind, shards="40KB", all_random=True, **KINDS[kind]), make_pool(samples=40), tmp_path
    )


def test_a_vocabulary_that_three_ranks_do_not_divide(make_model, make_pool, tmp_path: Path) -> None:
    base = make_model("qwen3", shards="40KB", vocab_size=323, tie_word_embeddings=True)
    train_and_compare(3, base, make_pool(samples=40), tmp_path)


def train_and_compare(ranks: int, base: Path, pool: Path, tmp_path: Path) -> None:
    """Two steps of the command line; the losses of the trained model, on its ranks, are those of the saved one in
    transformers.
    """
    out = tmp_path / "run"
    load_tokenizer(base).save_pretrained(pool / "tokenizer")  # transformers reads it by the model's kind
    line = [
        "train",
        "--pool",
        pool,
        "--model",
        base,
        "--out",
        out,
        "--method",
        "random",
        "--budget",
        0.11 * ranks,
        "--batch.capacity",
        "96",
        "--batch.micro-batches",
        ranks,
        "--selection.round-steps",
        "2",
        "--optimizer.lr",
        "1e-2",
        "--runtime.precision",
        "fp32",
    ]
    store = TokenStore.open(pool / "store")

    def work(_rank: int) -> Tensor:
        """The trained model's own token losses, taken where it is saved."""
        found, save = [], build.save_model

        def save_and_measure(model: PackedLM, *arguments, **options) -> None:
            save(model, *arguments, **options)
            with torch.no_grad():
                found.append(model(fixed_batch(store)).token_nll)

        build.save_model = save_and_measure
        assert cli.main([str(part) for part in line]) == 0
        return found[0]

    ours, *others = in_ranks(ranks, tmp_path / "ranks", work, group=False)
    assert all(torch.equal(ours, other) for other in others)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    single, exact = (transformers_losses(out / "model", store, dtype) for dtype in (torch.float32, torch.float64))
    assert worst(ours, exact) <= 2 * worst(single, exact) + 2e-6
    assert worst(transformers_losses(base, store, torch.float64), exact) > 1e-2, "training moved nothing"
    assert header(base) == header(out / "model")


def transformers_losses(folder: Path, store: TokenStore, dtype: torch.dtype) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    losses = []
    for i in (2, 5, 8):
        low, high = int(store.offsets[i]), int(store.offsets[i + 1])
        tokens, mask = store.tokens[low:high].long(), store.response[low:high]
        with torch.no_grad():
            nll = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
        losses.append(nll[mask[1:]])
    return torch.cat(losses)


def header(folder: Path) -> dict[str, tuple]:
    """Name -> (file, shape, dtype) of every tensor of a checkpoint."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
                part = file.get_slice(name)
                found[name] = path.name, tuple(part.get_shape()), part.get_dtype()
    return found
