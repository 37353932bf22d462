"""What wrapping a model changes (memory, speed, where things lie) and what it must not (gradients, names)."""

from __future__ import annotations

import datetime
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from lead_engine.base.errors import UserError
from lead_engine.config import LoraConfig, RuntimeConfig
from lead_engine.model.load import build_model
from lead_engine.model.packed import PackedLM
from lead_engine.model.parallelize import compile_block, end_of_step, keep_gathered, move_buffers
from lead_engine.model.recompute import keep_products, recompute
from lead_engine.model.segment_attention import segment_attention, traceable_segment_attention
from lead_engine.training.distributed import data_mesh, process_group
from lead_kernels import PackedBatch, gather_batch

pytestmark = pytest.mark.slow

LENGTHS = torch.tensor([17, 40, 5, 23, 38, 11])
CPU = torch.device("cpu")


def batch(*samples: int, capacity: int = 128) -> PackedBatch:
    """Samples of a small pool, in one micro-batch; every token counts. Ids from 6 on are empty slots."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)])
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 300, (int(offsets[-1]),), generator=generator, dtype=torch.int32)
    response = torch.ones(len(tokens), dtype=torch.bool)
    return gather_batch(tokens, response, offsets, torch.tensor(samples), capacity=capacity, num_rows=128)


BATCHES = [batch(0, 1, 2, 6), batch(3, 4, 5, 0), batch(2, 6, 6, 6)]


def build(folder: Path, **options: object) -> PackedLM:
    lora = options.pop("lora", None)
    mesh = options.pop("mesh", None)
    runtime = RuntimeConfig(**{"precision": "fp32", **options})
    return build_model(folder, device=CPU, runtime=runtime, max_length=40, lora=lora, mesh=mesh)


def gradients(model: PackedLM, batches: list[PackedBatch] = BATCHES) -> dict[str, Tensor]:
    """Of the sum of the micro-batches' losses."""
    for each in batches:
        model(each, token_weight=1e-2).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.fixture
def one_rank() -> Iterator:
    with process_group() as ranks:
        yield ranks


RECOMPUTED = {
    "fp32": {},
    "bf16, mask": {"precision": "bf16", "attention": "mask"},
    "LoRA": {"lora": LoraConfig(rank=4)},
}


@pytest.mark.parametrize("variant", RECOMPUTED)
def test_recomputing_changes_no_bit_and_no_name(variant: str, make_model) -> None:
    folder, options = make_model("llama"), RECOMPUTED[variant]
    with process_group() as ranks:
        plain = build(folder, mesh=ranks.mesh, **options)
        expected = gradients(plain)
        assert any(bool(g.full_tensor().abs().sum() > 0) for g in expected.values())
        for mode in ("full", "selective"):
            model = build(folder, mesh=ranks.mesh, checkpointing=mode, **options)
            assert model.checkpoint_names() == plain.checkpoint_names()
            for name, gradient in gradients(model).items():
                assert torch.equal(gradient.full_tensor(), expected[name].full_tensor()), (mode, name)


@pytest.mark.parametrize("variant", ["bf16", "LoRA", "tied"])
@pytest.mark.parametrize("recomputed", ["none", "selective"])
def test_weights_stay_gathered_through_a_step(variant: str, recomputed: str, make_model, monkeypatch) -> None:
    """Cast once a step and unit instead of twice a micro-batch; the same bits after three steps, for weights are cast
    anew in each.
    """
    folder = make_model("qwen3", tie_word_embeddings=True) if variant == "tied" else make_model("llama")
    lora = LoraConfig(rank=4) if variant == "LoRA" else None
    gathered: list[object] = []
    seen = FSDPParam.init_unsharded_param
    monkeypatch.setattr(FSDPParam, "init_unsharded_param", lambda self: (gathered.append(self), seen(self))[1])
    found, counts = [], []
    with process_group() as ranks:
        for keeps in (False, True):
            model = build(folder, mesh=ranks.mesh, precision="bf16", lora=lora, checkpointing=recomputed)
            if keeps:
                keep_gathered(model)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            gathered.clear()
            for _ in range(3):
                for place, each in enumerate(BATCHES):
                    end_of_step(model, place == len(BATCHES) - 1)
                    model(each, token_weight=1e-2).loss.backward()
                assert all(
                    isinstance(p, DTensor) and p.dtype == torch.float32 for p in optimizer.param_groups[0]["params"]
                )
                optimizer.step()
                optimizer.zero_grad()
            counts.append(Counter(map(id, gathered)))
            found.append([p.to_local().clone() for p in model.parameters()])
            assert len(counts[-1]) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert set(counts[1].values()) == {3}
    assert max(counts[0].values()) == 3 * 2 * len(BATCHES)


class Alive(TorchDispatchMode):
    """Storages that operators have made, to be asked later which of them somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self, model: nn.Module) -> int:
        """Of those that are not the model's own (a view of a weight is an operator's result too)."""
        own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        return sum(size for place, (storage, size) in self.made.items() if place not in own and not storage.expired())


def activation_bytes(folder: Path, mode: str) -> int:
    """Held by the blocks for the backward pass of one micro-batch."""
    model = build(folder, checkpointing=mode)
    with Alive() as alive:
        hidden = model.hidden(BATCHES[1])
    found = alive.bytes(model)
    assert hidden.requires_grad
    return found


def test_memory_of_activations(make_model) -> None:
    folder = make_model("llama", num_hidden_layers=4)
    none, selective, full = (activation_bytes(folder, mode) for mode in ("none", "selective", "full"))
    print(f"bytes kept of 4 blocks: none {none:,}, selective {selective:,}, full {full:,}")
    assert none > 1.6 * selective
    assert selective > 5 * full
    assert full < 1.5 * 4 * 128 * 32 * 4, "more than the blocks' inputs and what they share"


def test_what_selective_keeps() -> None:
    """By the operators' real names, of kernels that only run on a GPU too."""
    import torch.nn.attention.varlen
    import transformers.integrations.moe  # noqa: F401  both register theirs when they are imported

    ops = torch.ops
    kept = [
        ops.aten.mm.default,
        ops.aten._grouped_mm.default,
        ops.aten._scaled_dot_product_flash_attention.default,
        ops.torch_attn._varlen_attn.default,
        ops.lead_engine.segment_attention.default,
        ops.transformers.grouped_mm_fallback.default,
    ]
    assert {keep_products(None, op) for op in kept} == {CheckpointPolicy.MUST_SAVE}
    again = [
        ops.aten.silu.default,
        ops.aten.bmm.default,
        ops.aten.rsqrt.default,
        ops.lead_engine.segment_attention_backward.default,
    ]
    assert {keep_products(None, op) for op in again} == {CheckpointPolicy.PREFER_RECOMPUTE}


def test_dropout_is_the_same_the_second_time() -> None:
    block = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Tanh())
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for mode in ("none", "full"):
        recompute(block, mode)
        torch.manual_seed(3)
        block(x).sum().backward()
        torch.rand(5)  # others draw in between
        found.append(block[0].weight.grad.clone())
        block.zero_grad()
    assert torch.equal(*found)


def test_segment_attention_as_one_operator() -> None:
    """Values bit for bit those of the plain function; gradients to the rounding of fp32, which float64 shows."""
    generator = torch.Generator().manual_seed(0)
    bounds = [0, 9, 9, 30, 47, 50, 64]  # an empty segment, one token short of it, and the dummy tail
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    q, upstream = (torch.randn(1, 4, 64, 8, generator=generator) for _ in range(2))
    k, v = (torch.randn(1, 2, 64, 8, generator=generator) for _ in range(2))
    for scaling, window in ((None, None), (0.2, 6)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = traceable_segment_attention(*leaves, cu_seqlens, scaling, window)
        got = torch.autograd.grad(out, leaves, upstream.transpose(1, 2))
        plain = [x.clone().requires_grad_() for x in (q, k, v)]
        expected = segment_attention(*plain, bounds, scaling, window)
        assert torch.equal(out, expected)
        same = torch.autograd.grad(expected, plain, upstream.transpose(1, 2))
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        reference = segment_attention(*exact, bounds, scaling, window)
        for a, b, c in zip(
            got, same, torch.autograd.grad(reference, exact, upstream.transpose(1, 2).double()), strict=True
        ):
            assert (a - c).norm() <= 1.5 * (b - c).norm() + 1e-7 * c.norm()
    torch.library.opcheck(
        torch.ops.lead_engine.segment_attention.default,
        (*(x.clone().requires_grad_() for x in (q, k, v)), cu_seqlens, None, None),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


KINDS = {
    "llama": (1, {"num_hidden_layers": 10}),
    "qwen3_moe": (1, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "gemma2": (
        2,
        {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 7},
    ),
}
"""Kinds of layers, and what is special about the model: more layers than torch.compile bears versions of a function;
experts; soft caps.
"""


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_share_one_compilation(kind: str, make_model, one_rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all blocks of a kind and all micro-batches, recomputation and FSDP included; one more for passes
    without gradients.

    What the compiler makes of it is left out here, as it takes most of the time; test_equivalence_classes.py runs that.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    graphs, options = KINDS[kind]
    folder = make_model(kind, **{"num_hidden_layers": 3, **options})
    plain = build(folder, mesh=one_rank.mesh)
    model = build(folder, compile=True, checkpointing="selective", mesh=one_rank.mesh)
    expected = gradients(plain)
    for name, gradient in gradients(model).items():
        expect = expected[name].full_tensor()
        assert (gradient.full_tensor() - expect).norm() <= 1e-5 * expect.norm(), name
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == graphs, counters
    with torch.no_grad():
        for each in BATCHES:
            torch.testing.assert_close(model(each).token_nll, plain(each).token_nll, rtol=1e-6, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2 * graphs, counters
    assert not counters["graph_break"], counters


def test_a_block_that_cannot_be_compiled_is_refused() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum().item() > 0 else x

    block = Reads()
    compile_block(block)
    with pytest.raises(
        UserError, match=r"--runtime.compile: Reads cannot be compiled as one graph \(.+\); leave the flag out"
    ):
        block(torch.ones(3))


def test_offloaded_parameters_stay_on_the_host_and_buffers_do_not(make_model, one_rank) -> None:
    """On a CPU run both are the host; that the policy is set, and what moves, is what can be seen here."""
    model = build(make_model("llama"), mesh=one_rank.mesh, offload=True)
    for unit in (*model.decoder.layers, model.head, model):
        assert isinstance(unit._get_fsdp_state()._fsdp_param_group.offload_policy, CPUOffloadPolicy)
    plain = gradients(build(make_model("llama"), mesh=one_rank.mesh))
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient.full_tensor(), plain[name].full_tensor()), name
    move_buffers(model, torch.device("meta"))
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_the_mesh_of_replicas() -> None:
    """Neighbouring ranks share a replica."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    try:
        ranks = SimpleNamespace(
            size=8, device=CPU, mesh=init_device_mesh("cpu", (8,)), timeout=datetime.timedelta(seconds=60)
        )
        assert data_mesh(ranks, 1) is ranks.mesh
        mesh = data_mesh(ranks, 2)
        assert mesh.mesh.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert mesh["replicate"].mesh.tolist() == [1, 5]
        assert mesh["shard"].mesh.tolist() == [4, 5, 6, 7]
    finally:
        torch.distributed.destroy_process_group()
