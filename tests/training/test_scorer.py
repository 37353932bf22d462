"""The pool's losses under the model in training: those of a plain forward pass, on any number of ranks, and the model
stays as it is.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lead_engine.config import BatchConfig, RuntimeConfig
from lead_engine.model.load import build_model
from lead_engine.model.scoring import pack_by_length
from lead_engine.pool.store import TokenStore
from lead_engine.training.scorer import PoolScorer

pytestmark = pytest.mark.slow

BATCH = BatchConfig(capacity=96)
SAMPLES = 45


@pytest.fixture(scope="module")
def pool(make_pool) -> Path:
    return make_pool(samples=SAMPLES)


def one_at_a_time(folder: Path, store: TokenStore, ids: Tensor) -> Tensor:
    """Mean NLL of each sample's response tokens, alone through transformers, in fp64: [n]; 0 where there are none
    behind the first.
    """
    model, losses = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager"), []
    for i in ids.tolist():
        low, high = int(store.offsets[i]), int(store.offsets[i + 1])
        tokens, mask = store.tokens[low:high].long(), store.response[low:high]
        with torch.no_grad():
            nll = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")[
                mask[1:]
            ]
        losses.append(nll.mean() if len(nll) else nll.new_zeros(()))
    return torch.stack(losses)


def make_scorer(model: Path, pool: Path) -> PoolScorer:
    store = TokenStore.open(pool / "store")
    lm = build_model(
        model, device=torch.device("cpu"), runtime=RuntimeConfig(precision="fp32"), max_length=int(store.lengths.max())
    )
    return PoolScorer(lm, store, lambda: TokenStore.open(pool / "answers"), BATCH)


def test_losses_are_those_of_samples_alone(make_model, pool: Path) -> None:
    model = make_model("llama")
    scorer = make_scorer(model, pool)
    before = {name: value.clone() for name, value in scorer.model.state_dict().items()}
    ids = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))[:31]
    for found, store in ((scorer.given(ids), "store"), (scorer.alone(ids), "answers")):
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.double(), one_at_a_time(model, TokenStore.open(pool / store), ids), rtol=1e-5, atol=1e-6
        )
    assert scorer.seconds > 0
    for name, value in scorer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in scorer.model.parameters())


def test_losses_follow_the_model(make_model, pool: Path) -> None:
    """It is the model as it is now, not as it was when the scorer was made."""
    scorer, ids = make_scorer(make_model("llama"), pool), torch.arange(7)
    before = scorer.given(ids)
    with torch.no_grad():
        for parameter in scorer.model.parameters():
            parameter.mul_(0.0)
    after = scorer.given(ids)
    rows = next(
        p.shape[0] for p in scorer.model.parameters() if p.ndim == 2 and p.shape[0] == scorer.model.config.vocab_size
    )
    torch.testing.assert_close(after, torch.full_like(after, rows).log(), rtol=1e-5, atol=0)
    assert (before - after).abs().min() > 1e-4


IN_RANKS = """
import sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from lead_engine.config import BatchConfig, RuntimeConfig
from lead_engine.model.load import build_model
from lead_engine.pool.store import TokenStore
from lead_engine.training.distributed import process_group
from lead_engine.training.scorer import PoolScorer

model, pool, out = map(Path, sys.argv[1:4])
with process_group() as ranks:
    store = TokenStore.open(pool / "store", "auto", ranks.device)
    longest, runtime = int(store.lengths.max()), RuntimeConfig(precision="fp32")
    lm = build_model(model, device=ranks.device, mesh=ranks.mesh, runtime=runtime, max_length=longest)
    answers = lambda: TokenStore.open(pool / "answers", "auto", ranks.device)
    scorer = PoolScorer(lm, store, answers, BatchConfig(capacity=96), ranks.rank, ranks.size)
    found = {}
    for count in map(int, sys.argv[4:]):
        ids = torch.arange(count)
        found[count] = torch.stack([scorer.given(ids), scorer.alone(ids)]).cpu()
    # Nothing is left behind: what is saved next is the sharded fp32 weights, the head's too.
    assert all(isinstance(parameter, DTensor) for parameter in lm.parameters())
    assert all(module.training for module in lm.modules())
    torch.save(found, out / f"rank{ranks.rank}.pt")
"""


@pytest.mark.timeout(120)
def test_any_number_of_micro_batches_on_two_ranks(make_model, pool: Path, tmp_path: Path) -> None:
    """Under FSDP a rank that did one forward pass fewer would leave the other waiting for its parameters."""
    model, scorer = make_model("llama"), make_scorer(make_model("llama"), pool)
    lengths = scorer.store.lengths.numpy()
    groups = {
        count: len(pack_by_length(lengths[:count], BATCH.capacity, BATCH.num_slots)) for count in range(1, SAMPLES + 1)
    }
    counts = [1, max(c for c, n in groups.items() if n % 2 == 1), max(c for c, n in groups.items() if n % 2 == 0)]
    assert groups[counts[0]] == 1
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "in_ranks.py"
    script.write_text(IN_RANKS)
    line += [str(script), str(model), str(pool), str(tmp_path), *map(str, counts)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for count in counts:
        assert torch.equal(first[count], second[count])
        one = torch.stack([scorer.given(torch.arange(count)), scorer.alone(torch.arange(count))])
        torch.testing.assert_close(first[count], one, rtol=1e-6, atol=1e-6)
