"""The head inside torch.compile, activation checkpointing, autocast, gradient scaling, FSDP2 and modules."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lead_kernels import LinearCrossEntropy, linear_cross_entropy
from lead_kernels.head_call import HeadCall, HeadOptions, HeadTensors
from lead_kernels.head_op import head

pytestmark = pytest.mark.slow

T, H, V, B = 40, 16, 97, 4
IDS = torch.arange(T) * B // T


def make_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, V, (T,), generator=g)
    targets[::5] = -100
    return torch.randn(T, H, generator=g).to(dtype), (0.5 * torch.randn(V, H, generator=g)).to(dtype), targets


def loss_of(hidden: Tensor, weight: Tensor, targets: Tensor, gradients: Any = "auto") -> tuple[Tensor, Tensor]:
    out = linear_cross_entropy(
        hidden, weight, targets, sample_ids=IDS, num_samples=B, softcap=5.0, gradients=gradients, chunk_bytes=4 * V * 16
    )
    return out.loss, out.sample_nll


def gradients_of(function: Any, *arguments: Any, upstream: str = "loss") -> list[Tensor]:
    hidden, weight, targets = make_case()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss, sample_nll = function(*leaves, targets, *arguments)
    (loss if upstream == "loss" else sample_nll.square().sum() + loss).backward()
    return [loss.detach(), sample_nll.detach(), *[x.grad for x in leaves]]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_operators_pass_opcheck() -> None:
    hidden, weight, targets = make_case()
    left, right = torch.randn(2, H, 3)
    tensors = HeadTensors(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        bias=torch.randn(V).requires_grad_(),
        lora_a=None,
        lora_b=None,
        targets=targets,
        class_weight=torch.rand(V),
        sample_ids=IDS,
        cu_seqlens=None,
        token_weight=torch.rand(T),
        left=left,
        right=right,
    )
    options = HeadOptions(
        num_samples=B,
        want_hidden=True,
        want_weight=True,
        want_bias=True,
        want_lora=False,
        want_rows=True,
        want_lse=True,
        want_entropy=True,
        want_predicted=True,
        rows_differentiable=True,
        lora_scale=1.0,
        softcap=None,
        logit_scale=1.0,
        label_smoothing=0.1,
        z_loss=0.0,
        ignore_index=-100,
        max_rows=None,
        chunk_bytes=None,
        logits_dtype=torch.float32,
    )
    call = HeadCall(tensors, options)
    assert HeadCall.from_flat(call.flat()) == call
    torch.library.opcheck(head, call.flat(), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))


@pytest.mark.parametrize(
    ("compiler", "gradients", "upstream"),
    [
        ("aot_eager", "auto", "loss"),
        ("aot_eager", "auto", "sample"),
        ("aot_eager", "forward", "loss"),
        ("aot_eager", "recompute", "loss"),
        ("aot_eager", "recompute", "sample"),
        ("inductor", "auto", "sample"),  # one combination is enough of the slow compiler
    ],
)
def test_compiled_without_a_graph_break(compiler: str, gradients: str, upstream: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend=compiler)
    assert_equal(
        gradients_of(compiled, gradients, upstream=upstream), gradients_of(loss_of, gradients, upstream=upstream)
    )


def test_compiled_together_with_what_comes_before() -> None:
    """Forward and backward of a layer before the head, in one graph each."""
    torch._dynamo.reset()

    def model(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return loss_of(torch.tanh(hidden) * 2, weight, targets, "forward")

    assert_equal(gradients_of(torch.compile(model, fullgraph=True, backend="aot_eager")), gradients_of(model))


def test_compiled_for_any_number_of_rows() -> None:
    torch._dynamo.reset()
    counts = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda h, w, y, s: linear_cross_entropy(h, w, y, sample_ids=s, num_samples=B).loss,
        fullgraph=True,
        dynamic=True,
        backend=counts,
    )
    hidden, weight, targets = make_case()
    graphs = []
    for rows in (T, T - 3, T - 7):
        h, y, s = (x[:rows].clone() for x in (hidden, targets, IDS))
        torch.testing.assert_close(
            compiled(h, weight, y, s), linear_cross_entropy(h, weight, y, sample_ids=s, num_samples=B).loss
        )
        graphs.append(counts.frame_count)
    assert graphs == graphs[:1] * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        return checkpoint(loss_of, hidden, weight, targets, use_reentrant=reentrant)

    assert_equal(gradients_of(checkpointed, upstream="sample"), gradients_of(loss_of, upstream="sample"))


def test_autocast_and_a_gradient_scaler() -> None:
    """fp32 parameters, bf16 products, the loss times 2^16 on the way back: gradients in fp32, as with nn.Linear."""
    hidden, weight, targets = make_case()
    results = []
    for ours in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if ours:
                loss = linear_cross_entropy(leaves[0] * 1.0, leaves[1], targets, sample_ids=IDS, num_samples=B).loss
            else:
                loss = nn.functional.cross_entropy(nn.functional.linear(leaves[0] * 1.0, leaves[1]).float(), targets)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss).backward()
        assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
        results.append([loss.detach(), *(leaf.grad / scaler.get_scale() for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        assert float((a - b).norm()) <= 2e-2 * float(b.norm())


def test_module_is_the_function_and_shares_what_it_is_made_of() -> None:
    hidden, weight, targets = make_case()
    embedding = nn.Embedding(V, H)
    embedding.weight.data.copy_(weight)
    linear = nn.Linear(H, V, bias=True)
    linear.weight = embedding.weight
    module = LinearCrossEntropy.of(linear, softcap=5.0)
    assert module.weight is embedding.weight
    out = module(hidden, targets, sample_ids=IDS, num_samples=B)
    expected = linear_cross_entropy(
        hidden, weight, targets, sample_ids=IDS, num_samples=B, bias=linear.bias, softcap=5.0
    )
    assert torch.equal(out.loss, expected.loss)


def test_module_with_an_adapter_trains_it_alone() -> None:
    hidden, _, targets = make_case()
    module = LinearCrossEntropy(H, V, lora_rank=2, lora_alpha=4.0)
    plain = linear_cross_entropy(hidden, module.weight, targets, sample_ids=IDS, num_samples=B).loss
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(20):
        loss = module(hidden, targets, sample_ids=IDS, num_samples=B).loss
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == float(plain)
    assert losses[-1] < losses[0]
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]
    assert module.weight.grad is None


def _sharded_rank(rank: int, ranks: int, port: int, lora: bool, out: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    hidden, _, targets = make_case()
    module = LinearCrossEntropy(H, V, lora_rank=3 if lora else 0)
    if lora:
        nn.init.normal_(module.lora_b)
    fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    own = slice(rank * T // ranks, (rank + 1) * T // ranks)
    leaf = hidden.bfloat16()[own].requires_grad_()
    counted = float((targets >= 0).sum())
    loss = module(leaf, targets[own], sample_ids=IDS[own], num_samples=B, token_weight=ranks / counted).loss
    loss.backward()
    refused = ""
    try:
        linear_cross_entropy(leaf, module.weight, targets[own], sample_ids=IDS[own], num_samples=B)
    except ValueError as error:
        refused = str(error)
    gradients = {name: p.grad.full_tensor() for name, p in module.named_parameters() if p.grad is not None}
    assert all(isinstance(p.grad, DTensor) for p in module.parameters() if p.grad is not None)
    total = loss.detach() / ranks
    dist.all_reduce(total)
    if rank == 0:
        out.put(({name: x.numpy() for name, x in gradients.items()}, float(total), refused))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("lora", [False, True])
def test_sharded_over_two_ranks(lora: bool) -> None:
    """FSDP2 over gloo, bf16 parameters, fp32 reduction: both ranks' gradient is that of all rows in one process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(_sharded_rank, (2, port, lora, queue), nprocs=2, join=True)
    gradients, loss, refused = queue.get()

    torch.manual_seed(0)
    hidden, _, targets = make_case()
    module = LinearCrossEntropy(H, V, lora_rank=3 if lora else 0)
    if lora:
        nn.init.normal_(module.lora_b)
    low = LinearCrossEntropy(H, V, lora_rank=3 if lora else 0, dtype=torch.bfloat16)
    low.load_state_dict(module.state_dict())
    expected = low(hidden.bfloat16(), targets, sample_ids=IDS, num_samples=B).loss
    expected.backward()
    assert abs(loss - float(expected)) < 1e-5
    trained = {name: p.grad for name, p in low.named_parameters() if p.grad is not None}
    assert set(gradients) == set(trained) == ({"lora_a", "lora_b"} if lora else {"weight"})
    for name, gradient in trained.items():
        ours = torch.from_numpy(gradients[name])
        assert ours.dtype == torch.float32
        assert float((ours - gradient.float()).norm()) < 2**-7 * float(gradient.float().norm()), name
    assert "fully_shard" in refused
