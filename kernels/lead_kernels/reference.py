"""Slow and obvious versions of the operators for the tests, in whatever precision they are given (mostly float64).

Loops over samples, dense [T, V] logits, Python arithmetic. Each has the arguments and the result of the operator of the
same name.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from lead_kernels.gather_batch import PackedBatch
from lead_kernels.linear_cross_entropy import HeadLoss
from lead_kernels.pack_plan import LOOK_AHEAD, PackedPlan


def segment_reduce(values: Tensor, sample_ids: Tensor, num_samples: int) -> Tensor:
    return torch.stack([values[sample_ids == sample].sum(0) for sample in range(num_samples)])


def gradient_signature(
    hidden: Tensor, hidden_grad: Tensor, left: Tensor, right: Tensor, sample_ids: Tensor, num_samples: int
) -> Tensor:
    out = hidden.new_zeros(num_samples, left.shape[1], right.shape[1])
    for sample in range(num_samples):
        rows = (sample_ids == sample).nonzero().flatten().tolist()
        for row in rows:
            out[sample] += torch.outer(left.t() @ hidden_grad[row], right.t() @ hidden[row]) / len(rows)
    return out


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    sample_ids: Tensor | None = None,
    num_samples: int = 0,
    token_weight: Tensor | float | None = None,
    class_weight: Tensor | None = None,
    signature: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    shift: bool = False,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_predicted: bool = False,
) -> HeadLoss:
    if shift:
        moved = torch.full_like(targets, ignore_index)
        for place in torch.cartesian_prod(*map(torch.arange, targets.shape)).view(-1, targets.dim()).tolist():
            after = (*place[:-1], place[-1] + 1)
            if after[-1] < targets.shape[-1] and (sample_ids is None or sample_ids[after] == sample_ids[tuple(place)]):
                moved[tuple(place)] = targets[after]
        targets = moved
    shape = targets.shape
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    kept = targets != ignore_index
    y, size = targets[kept], weight.shape[0]
    weights = hidden.new_ones(size) if class_weight is None else class_weight.to(hidden.dtype)

    def logits_of(states: Tensor) -> Tensor:
        logits = states @ weight.t() if bias is None else states @ weight.t() + bias
        logits = logits * logit_scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def row_nll(logits: Tensor) -> Tensor:
        return torch.logsumexp(logits, -1) - logits.gather(1, y[:, None]).squeeze(1)

    def spread(rows: Tensor, fill: float = 0) -> Tensor:
        return torch.full_like(targets, fill, dtype=rows.dtype).masked_scatter(kept, rows)

    logits = logits_of(hidden[kept])
    nll, lse = row_nll(logits), torch.logsumexp(logits, -1)
    objective = (1 - label_smoothing) * weights[y] * nll
    if label_smoothing:
        objective = objective + label_smoothing / size * (weights.sum() * lse - (logits * weights).sum(-1))
    if z_loss:
        objective = objective + z_loss * lse**2
    if token_weight is None:
        counted = float(weights[y].sum()) if class_weight is not None else max(int(kept.sum()), 1)
        token_weight = 1.0 / counted if reduction == "mean" else 1.0
    if isinstance(token_weight, Tensor) and token_weight.dim() > 0:
        token_weight = token_weight.reshape(-1)[kept]
    rows = token_weight * objective
    token_nll = spread(nll.detach())

    sample_nll, sample_tokens, phi = nll.new_empty(0), y.new_empty(0), None
    if sample_ids is not None:
        sample_ids = sample_ids.reshape(-1)
        samples = sample_ids[kept]
        sample_tokens = torch.stack([(samples == sample).sum() for sample in range(num_samples)])
        sample_nll = segment_reduce(token_nll, sample_ids, num_samples) / sample_tokens.clamp(min=1)
        if signature is not None:
            states = hidden[kept].detach().requires_grad_()
            with torch.enable_grad():
                (errors,) = torch.autograd.grad(row_nll(logits_of(states)).sum(), states)
            phi = gradient_signature(states.detach(), errors, *signature, samples, num_samples)

    p = torch.softmax(logits.detach(), -1)
    predicted = logits.argmax(-1)
    return HeadLoss(
        loss=spread(rows).reshape(shape) if reduction == "none" else rows.sum(),
        token_nll=token_nll.reshape(shape),
        sample_nll=sample_nll,
        sample_tokens=sample_tokens,
        signature=phi,
        lse=spread(lse.detach()).reshape(shape) if return_lse else None,
        entropy=spread(torch.special.entr(p).sum(-1)).reshape(shape) if return_entropy else None,
        predicted=spread(predicted, -1).reshape(shape) if return_predicted else None,
        token_accuracy=(predicted == y).sum() / max(len(y), 1) if return_predicted else None,
    )


def grad_inner_product(
    hidden: Tensor, hidden_grad: Tensor, mean_grad: Tensor, sample_ids: Tensor, num_samples: int, sample_weight: Tensor
) -> Tensor:
    out = hidden.new_zeros(num_samples)
    for sample in range(num_samples):
        rows = sample_ids == sample
        weighted_gradient = hidden_grad[rows].t() @ hidden[rows]  # w_i m_i
        if sample_weight[sample] != 0:
            out[sample] = (weighted_gradient * mean_grad).sum() / sample_weight[sample]
    return out


def select_topk(
    utility: Tensor,
    eligible: Tensor,
    task: Tensor,
    num_tasks: int,
    k: int,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    entries = []
    for label in range(num_tasks):
        members = [i for i in range(len(utility)) if eligible[i] and task[i] == label]
        members.sort(key=lambda i: (-float(utility[i]), i))
        share = len(members) if weight is None else int(weight[label])
        if share > 0:
            first = Fraction(1, 2) if offset is None else Fraction(int(offset[label]), 4096)
            entries += [((rank + first) / share, label, i) for rank, i in enumerate(members)]
    order = [i for _, _, i in sorted(entries)][:k]
    return torch.tensor(order + [len(utility)] * (k - len(order)), dtype=torch.int64)


def pack_plan(
    order: Tensor, lengths: Tensor, *, num_bins: int, capacity: int, slots: int, max_tokens: int | Tensor | None = None
) -> PackedPlan:
    size, dummy = lengths.tolist(), len(lengths)
    budget = float("inf") if max_tokens is None else int(max_tokens)
    left = [sample for sample in order.tolist() if sample != dummy]
    while sum(size[sample] for sample in left) > budget:
        left.pop()
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for samples in bins:
        while left and len(samples) < slots and sum(size[i] for i in [*samples, left[0]]) <= capacity:
            samples.append(left.pop(0))
        ahead = left[: min(LOOK_AHEAD, slots - len(samples))]
        while fitting := [i for i in ahead if i in left and sum(size[j] for j in [*samples, i]) <= capacity]:
            longest = max(size[i] for i in fitting)
            samples.append(next(i for i in fitting if size[i] == longest))
            left.remove(samples[-1])
    ids = torch.tensor([samples + [dummy] * (slots - len(samples)) for samples in bins], dtype=torch.int64)
    return PackedPlan(ids, torch.tensor([sum(size[i] for i in samples) for samples in bins], dtype=torch.int64))


def gather_batch(
    tokens: Tensor, response: Tensor, offsets: Tensor, sample_ids: Tensor, *, capacity: int, num_rows: int
) -> PackedBatch:
    num_samples, slots = len(offsets) - 1, len(sample_ids)
    input_ids: list[int] = []
    position_ids: list[int] = []
    cu_seqlens = [0]
    rows: list[int] = []
    targets: list[int] = []
    row_slots: list[int] = []
    for slot, sample in enumerate(sample_ids.tolist()):
        span = range(int(offsets[sample]), int(offsets[sample + 1])) if sample < num_samples else range(0)
        for local, source in enumerate(span):
            if local > 0 and response[source]:
                rows.append(len(input_ids) - 1)
                targets.append(int(tokens[source]))
                row_slots.append(slot)
            input_ids.append(int(tokens[source]))
            position_ids.append(local)
        cu_seqlens.append(len(input_ids))
    tail, padding = capacity - len(input_ids), num_rows - len(rows)

    def long(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return PackedBatch(
        input_ids=long(input_ids + [0] * tail),
        position_ids=long(position_ids + list(range(tail))),
        cu_seqlens=torch.tensor([*cu_seqlens, capacity], dtype=torch.int32),
        rows=long(rows + [capacity - 1] * padding),
        targets=long(targets + [-100] * padding),
        row_slots=long(row_slots + [slots - 1] * padding),
        sample_ids=sample_ids,
    )


def idu_update(
    utility: Tensor, visits: Tensor, sample_ids: Tensor, loss: Tensor, change: Tensor, smoothing: float
) -> None:
    for sample, value, delta in zip(sample_ids.flatten().tolist(), loss.flatten(), change.flatten(), strict=True):
        if sample < len(utility) - 1:
            utility[sample] = (1 - smoothing) * (value + delta) + smoothing * utility[sample]
            visits[sample] += 1


def exp3_probabilities(log_weights: Tensor, available: Tensor, gamma: float) -> Tensor:
    weights = torch.exp(log_weights)
    probabilities = ((1 - gamma) * weights / weights.sum() + gamma / len(weights)) * available
    return probabilities / probabilities.sum()


def exp3_update(
    log_weights: Tensor, probabilities: Tensor, arm: Tensor, reward: Tensor, gamma: float, alpha: float = 0.0
) -> Tensor:
    weights, num_arms = torch.exp(log_weights), len(log_weights)
    new = weights.clone()
    new[arm] *= torch.exp(gamma / num_arms * reward / probabilities[arm])
    new = new + torch.e * alpha / num_arms * weights.sum()
    return torch.log(new / new.max())


def draw_arm(probabilities: Tensor, uniform: Tensor) -> Tensor:
    rest = float(uniform) * float(probabilities.sum())
    for arm, probability in enumerate(probabilities.tolist()):
        if rest < probability:
            return torch.tensor(arm)
        rest -= probability
    raise ValueError("no arm has a positive probability")
